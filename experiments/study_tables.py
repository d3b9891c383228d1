"""Tables of the study: variants side by side, their learning rates, codecs on them, conversions."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvjax.paired import (
    Ranked,
    RateFit,
    at_best_rate,
    best_rate,
    mean_losses,
    paired,
    ranking,
    rate_fit,
    t_interval,
)

Rows = dict[str, dict[str, Any]]
REFERENCE = "mha"
"""Of files that name none."""


def variants(files: Rows) -> str:
    """One line a variant, most cache bytes first: means over seeds, and paired differences to the reference."""
    rows, reference = _all(files, "rows"), _reference(files)
    lines = [
        "| variant | cache bytes/token | parameters | MLP width | best rate | seeds | bits/byte (95 %) "
        f"| perplexity | bits/byte above `{reference}`, paired (95 %) | detectable | verdict (Holm) | rank |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    best = {label: at_best_rate(_of(rows, label)) for label in labels}
    others = [label for label in labels if label != reference] if reference in labels else []
    comparisons = {label: paired(rows, label, reference) for label in others}
    ranked = {one.label: one for one in ranking(list(comparisons.values()))} if comparisons else {}
    for label in sorted(labels, key=lambda label: -_first(best[label])["cache_bytes_per_token"]):
        runs, first = best[label], _first(best[label])
        bits = [row["bits_per_byte"] for row in runs.values()]
        perplexity = np.mean([row["perplexity"] for row in runs.values()])
        lines.append(
            f"| `{label}` | {first['cache_bytes_per_token']:,.0f} | {_millions(first['parameters'])} "
            f"| {first['config']['decoder']['mlp_width']} | {_rate(_of(rows, label), first)} | {len(runs)} "
            f"| {_spread(bits, '.4f')} | {perplexity:.2f} {_against(comparisons.get(label), ranked.get(label))} |"
        )
    return "\n".join(lines)


def _against(comparison: Any, ranked: Ranked | None) -> str:
    if comparison is None or ranked is None:
        rank = "" if ranked is None else _rank(ranked)
        return f"| | | | {rank}"
    detectable = "" if comparison.detectable is None else f"{comparison.detectable:.4f}"
    verdict = f"{ranked.verdict} ({ranked.verdict_holm})"
    return f"| {_spread(comparison.differences, '+.4f')} | {detectable} | {verdict} | {_rank(ranked)}"


def _rank(ranked: Ranked) -> str:
    low, high = ranked.ranks
    return str(low) if low == high else f"{low} to {high}"


def _rate(rows: Sequence[dict[str, Any]], first: dict[str, Any]) -> str:
    """The best rate, with the fitted one; flagged at an end of what was tried, or of too few to fit."""
    rate, fit = f"{first['peak_lr']:.1e}", _fit(rows)
    if fit is None:
        return f"{rate}, of {len(mean_losses(rows)[0])} tried"
    fitted = "" if fit.optimum is None else f" (fit {fit.optimum:.1e})"
    return rate + fitted + (", at an end" if fit.at_end else "")


def rates(files: Rows) -> str:
    """Bits per byte at every rate, over the seeds that all rates have; the best rate's is bold. Last, what the
    fit expects at its optimum, if that lies within what was tried.
    """
    rows = _all(files, "rows")
    tried = sorted({row["peak_lr"] for row in rows})
    lines = _head(["variant"], [*(f"{rate:.1e}" for rate in tried), "at the fitted optimum"])
    for label in dict.fromkeys(row["label"] for row in rows):
        means, _ = mean_losses(_of(rows, label))
        best = best_rate(_of(rows, label))
        cell = lambda rate, means=means, best=best: (
            "" if rate not in means else f"**{means[rate]:.4f}**" if rate == best else f"{means[rate]:.4f}"
        )
        lines.append(f"| `{label}` | {' | '.join(map(cell, tried))} | {_at_optimum(_of(rows, label))} |")
    return "\n".join(lines)


def _at_optimum(rows: Sequence[dict[str, Any]]) -> str:
    fit = _fit(rows)
    return f"{fit.loss:.4f} ({fit.optimum:.1e})" if fit is not None and fit.within else ""


def _fit(rows: Sequence[dict[str, Any]]) -> RateFit | None:
    """None of fewer than three rates that did not diverge."""
    means, _ = mean_losses(rows)
    return rate_fit(rows) if sum(map(math.isfinite, means.values())) >= 3 else None


def codecs(files: Rows) -> str:
    """Bytes a token and perplexity against the variant's own exact cache, mean (and range) over seeds."""
    rows = [row for row in _all(files, "codecs") if row["codec"] != "exact"]
    names = list(dict.fromkeys(row["codec"] for row in rows))
    lines = _head(["variant"], [f"`{name}`" for name in names])
    for label in dict.fromkeys(row["label"] for row in rows):
        cells = []
        for name in names:
            found = [row for row in _of(rows, label) if row["codec"] == name]
            percent = [row["perplexity_percent"] for row in found]
            spread = f" ({min(percent):+.2f} to {max(percent):+.2f})" if len(percent) > 1 else ""
            size = f"{found[0]['cache_bytes']['per_token']:,.0f} B" if found else ""
            cells.append(f"{size}, {np.mean(percent):+.2f} %{spread}" if found else "")
        lines.append(f"| `{label}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def conversions(files: Rows) -> str:
    """Bits per byte of converted weights, by how long they were trained on, and parameters of all compared."""
    rows = _all(files, "conversions")
    fractions = sorted({row["fraction"] for row in rows})
    heads = [f"{fraction:.0%} of the steps" if fraction else "as converted" for fraction in fractions]
    numbers = ["parameters", *heads, "from scratch", "its parameters", "source"]
    lines = _head([f"from `{_reference(files)}` to", "method"], numbers)
    for label, method in dict.fromkeys((row["label"], row["method"]) for row in rows):
        found = {row["fraction"]: row for row in rows if (row["label"], row["method"]) == (label, method)}
        cell = lambda fraction, found=found: f"{found[fraction]['bits_per_byte']:.4f}" if fraction in found else ""
        any_of = next(iter(found.values()))
        scratch = any_of["scratch_bits_per_byte"]
        lines.append(
            f"| `{label}` | {method} | {_millions(any_of.get('parameters'))} | {' | '.join(map(cell, fractions))} "
            f"| {'' if scratch is None else f'{scratch:.4f}'} | {_millions(any_of.get('scratch_parameters'))} "
            f"| {any_of['source_bits_per_byte']:.4f} |"
        )
    return "\n".join(lines)


def _head(texts: Sequence[str], numbers: Sequence[str]) -> list[str]:
    """First lines of a table: columns of text, then columns of numbers."""
    return [f"| {' | '.join([*texts, *numbers])} |", "|" + "---|" * len(texts) + "---:|" * len(numbers)]


def _spread(values: Sequence[float], form: str) -> str:
    """Mean with its t interval."""
    interval, mean = t_interval(values), float(np.mean(values))
    return f"{mean:{form}}" + ("" if interval is None else f" ({interval[0]:{form}}, {interval[1]:{form}})")


def _millions(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.3f} M"


def _reference(files: Rows) -> str:
    """The label that variants are compared with; ValueError where files disagree on it."""
    named = {file.get("reference") or REFERENCE for file in files.values()} or {REFERENCE}
    if len(named) > 1:
        raise ValueError(f"reference={', '.join(sorted(named))} must be one in all files of a study")
    return named.pop()


def _all(files: Rows, kind: str) -> list[dict[str, Any]]:
    return [row for file in files.values() for row in file.get(kind, [])]


def _of(rows: Sequence[dict[str, Any]], label: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["label"] == label]


def _first(runs: dict[int, Any]) -> dict[str, Any]:
    return next(iter(runs.values()))


STUDY_TABLES: dict[str, Callable[[Rows], str]] = {
    "study": variants,
    "study_rates": rates,
    "study_codecs": codecs,
    "study_conversions": conversions,
}
