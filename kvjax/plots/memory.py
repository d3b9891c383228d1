"""What a cache costs as the context grows: memory in closed form, and measured time of a decode step."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from kvjax.accounting import declared_bytes_per_token
from kvjax.attention.grouped import Grouped
from kvjax.config import Config
from kvjax.decoder import DecoderConfig
from kvjax.plots.figure import DASHES, MARKERS, SHADES, End, label_ends, pyplot

LLAMA_7B = Config(Grouped(32, 32, head_dim=128), DecoderConfig(width=4096, depth=32, mlp_width=11008))
"""Touvron et al. 2023, table 2."""
CONTEXTS = tuple(2**n for n in range(10, 21))


def memory_against_context(
    config: Config,
    kv_heads: Sequence[int] = (32, 8, 4, 1),
    dtypes: Sequence[str] = ("bfloat16",),
    contexts: Sequence[int] = CONTEXTS,
    batch: int = 1,
    budgets_gib: Sequence[float] = (24, 80),
) -> Any:
    """Cache GiB against context (tokens) for a model of grouped attention with other numbers of kv heads.

    `budgets_gib` are drawn as lines, for scale: a device also holds weights.
    """
    if not isinstance(config.attention, Grouped):
        raise ValueError(f"attention={type(config.attention).__name__} has no num_kv_heads; choose Grouped")
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7.6, 5), layout="constrained")
    ends: list[End] = []
    contexts = sorted(contexts)
    for place, heads in enumerate(kv_heads):
        attention = dataclasses.replace(config.attention, num_kv_heads=heads)
        for dash, dtype in zip(DASHES, dtypes):
            variant = dataclasses.replace(config, attention=attention)
            token = declared_bytes_per_token(variant, jnp.dtype(dtype).itemsize)
            gib = [batch * context * token / 2**30 for context in contexts]
            style = {"ls": dash, "marker": MARKERS[place % len(MARKERS)], "mfc": "white", "ms": 5}
            axis.plot(contexts, gib, color="black", **style)
            name = {attention.num_heads: "MHA", 1: "MQA"}.get(heads, f"GQA-{heads}")
            kind = f", {dtype}" if len(dtypes) > 1 else ""
            ends.append((contexts[-1], gib[-1], f"{name}{kind}: {token / 2**10:,.6g} KiB/token"))
    for budget in budgets_gib:
        axis.axhline(budget, color="0.5", lw=1, ls=":")
        text = {"textcoords": "offset points", "fontsize": 8, "color": "0.35"}
        axis.annotate(f"{budget:g} GiB", (contexts[0], budget), xytext=(0, 3), **text)
    stored = f", {dtypes[0]}" if len(dtypes) == 1 else ""
    shape = f"{config.decoder.depth} layers, {config.attention.num_heads} heads of {config.attention.head_dim}"
    axis.set(title=f"Cache of {shape}, batch {batch}{stored}", xlabel="context (tokens)", ylabel="cache (GiB)")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=10)
    axis.set_xticks(contexts, [_short(context) for context in contexts])
    room = 0.3 if len(dtypes) == 1 else 0.4  # of the range, for the labels
    axis.set_xlim(contexts[0] / 1.3, contexts[-1] * (contexts[-1] / contexts[0]) ** room)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.25, lw=0.6)
    figure.get_layout_engine().execute(figure)
    label_ends(axis, ends)
    return figure


def plot_memory_savings(seq_lengths: Sequence[int] = (512, 1024, 2048, 4096)) -> Any:
    """Cache memory of a Llama-7B with 32, 8, 4 and 1 kv heads at these lengths, as a copied project asks."""
    return memory_against_context(LLAMA_7B, contexts=seq_lengths)


def decode_time_against_context(rows: Sequence[dict[str, Any]], title: str = "Time of a decode step") -> Any:
    """Milliseconds of one token for every row of a batch against tokens in the cache, one panel a batch size.

    Rows as `experiments.benchmark_decode` writes them: name, batch, filled, and seconds_per_token with median, min
    and max, which bars join.
    """
    plt = pyplot()
    batches, names = sorted({row["batch"] for row in rows}), list(dict.fromkeys(row["name"] for row in rows))
    width = max(1, len(batches))
    figure, axes = plt.subplots(1, width, figsize=(3.9 * width + 0.6, 4.4), layout="constrained", squeeze=False)
    written = []
    for axis, batch in zip(axes[0], batches):
        ends: list[End] = []
        for place, name in enumerate(names):
            series = sorted(
                (r for r in rows if (r["name"], r["batch"]) == (name, batch)), key=lambda r: r["filled"]
            )
            if not series:
                continue
            low, middle, high = (
                [row["seconds_per_token"][key] * 1e3 for row in series] for key in ("min", "median", "max")
            )
            spread = [[m - x for m, x in zip(middle, low)], [x - m for m, x in zip(middle, high)]]
            style = {"ls": DASHES[place % len(DASHES)], "color": SHADES[place % 2], "mfc": "white", "ms": 5}
            lengths = [row["filled"] for row in series]
            axis.errorbar(lengths, middle, spread, marker=MARKERS[place], capsize=2, elinewidth=0.7, **style)
            ends.append((lengths[-1], middle[-1], name))
        ticks = sorted({row["filled"] for row in rows if row["batch"] == batch})
        axis.set(title=f"batch {batch}", xlabel="tokens in the cache", xscale="log", yscale="log")
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8, rotation=30)
        axis.minorticks_off()
        axis.set_xlim(ticks[0] / 1.2, ticks[-1] * (ticks[-1] / ticks[0]) ** 0.5 * 1.3)
        axis.grid(alpha=0.25, lw=0.6)
        written.append(ends)
    axes[0][0].set_ylabel("time of a token for every row (ms)")
    figure.suptitle(title)
    for axis in axes[0, : len(batches)]:
        _plain_ticks(axis)
    figure.get_layout_engine().execute(figure)
    for axis, ends in zip(axes[0], written):
        label_ends(axis, ends)
    return figure


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import LogLocator

    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")


def _short(tokens: int) -> str:
    """4096 as 4K."""
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"
