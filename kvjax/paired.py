"""Variants compared by paired seeds: rates fitted, differences with t intervals, and no rank inside an interval.

Rows are of trained runs: label, matching, peak_lr, seed, bits_per_byte, ..., and `best`, true at the rate that a
study chose, where that is known. Runs of one seed share data order, and initial weights wherever shapes agree, so
that differences by seed are free of what both owe to them. Values are losses: less is better.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import optimize, stats

from kvjax.checks import one_of

CONFIDENCE = 0.95
POWER = 0.8
LOSSES = ("bits_per_byte", "perplexity")
FAR = 10.0  # half ranges of log rate from the middle, past which a parabola is flat
Row = Mapping[str, Any]
Verdict = Literal["better", "worse", "not resolved"]


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Student's t interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    mean, error = np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values))
    half = stats.t.ppf(0.5 + confidence / 2, len(values) - 1) * error
    return float(mean - half), float(mean + half)


@dataclass(frozen=True)
class RateFit:
    """A parabola in log rate, by least squares through the mean loss of every rate."""

    rates: tuple[float, ...]
    """As measured, ascending."""
    losses: tuple[float, ...]
    """Bits per byte at each, the mean over the same seeds; inf where a run diverged, which is not fitted."""
    seeds: tuple[int, ...]
    """That every rate has."""
    parabola: np.polynomial.Polynomial
    """Of the natural logarithm of the rate."""
    best: float
    """As of `best_rate`."""
    optimum: float | None
    """Rate at the parabola's bottom; None where it opens downwards or is as good as flat."""
    loss: float | None
    """Bits per byte there."""

    @property
    def within(self) -> bool:
        """Whether there is a fitted optimum, and it lies within the rates that were measured."""
        return self.optimum is not None and self.rates[0] <= self.optimum <= self.rates[-1]

    @property
    def at_end(self) -> bool:
        """Whether the best measured rate is the smallest or largest, or no fitted optimum lies between these."""
        return self.best in (self.rates[0], self.rates[-1]) or not self.within


def rate_fit(rows: Sequence[Row]) -> RateFit:
    """Fit the rates of one label and matching; ValueError for fewer than three whose runs did not diverge."""
    means, seeds = mean_losses(rows)
    rates = sorted(means)
    finite = [rate for rate in rates if math.isfinite(means[rate])]
    if len(finite) < 3:
        found = ", ".join(f"{rate:g}" for rate in finite)
        raise ValueError(f"label={rows[0]['label']!r} has finite losses at {found}: a fit needs 3 rates")
    parabola = np.polynomial.Polynomial.fit(np.log(finite), [means[rate] for rate in finite], 2)
    _, slope, curvature = map(float, parabola.coef)  # of log rate, scaled to -1 ... 1
    optimum = loss = None
    if curvature > 0 and abs(slope) < 2 * FAR * curvature:
        bottom = parabola.deriv().roots()[0].real
        optimum, loss = math.exp(bottom), float(parabola(bottom))
    losses = tuple(means[rate] for rate in rates)
    return RateFit(tuple(rates), losses, seeds, parabola, best_rate(rows), optimum, loss)


def best_rate(rows: Sequence[Row]) -> float:
    """The rate that the rows of one label and matching call best; where none does, that of least mean loss."""
    _by_rate(rows)
    chosen = {row["peak_lr"] for row in rows if row.get("best")}
    if len(chosen) > 1:
        found = ", ".join(f"{rate:g}" for rate in sorted(chosen))
        raise ValueError(f"best of label={rows[0]['label']!r} is true at rates {found}; it must be at one")
    if chosen:
        return chosen.pop()
    means, _ = mean_losses(rows)
    return min(sorted(means), key=means.__getitem__)


def at_best_rate(rows: Sequence[Row], rate: float | None = None) -> dict[int, Row]:
    """By seed, the runs of one label and matching at their own best rate, or at the given one."""
    rate = best_rate(rows) if rate is None else rate
    found = {row["seed"]: row for row in rows if row["peak_lr"] == rate}
    if not found:
        tried = ", ".join(f"{rate:g}" for rate in sorted({row["peak_lr"] for row in rows}))
        raise ValueError(f"rate={rate:g} of label={rows[0]['label']!r} was not run; choose from {tried}")
    return dict(sorted(found.items()))


def mean_losses(rows: Sequence[Row]) -> tuple[dict[float, float], tuple[int, ...]]:
    """Mean loss of every rate over the seeds that all rates have: others would add their seeds' luck."""
    losses = _by_rate(rows)
    shared = sorted(set.intersection(*map(set, losses.values())))
    if not shared:
        raise ValueError(f"label={rows[0]['label']!r} must have a seed that was run at every rate")
    return {rate: sum(of[seed] for seed in shared) / len(shared) for rate, of in losses.items()}, tuple(shared)


def _by_rate(rows: Sequence[Row]) -> dict[float, dict[int, float]]:
    """Losses by rate and seed; ValueError for rows of several variants, or of one run twice."""
    if len({(row["label"], row["matching"]) for row in rows}) != 1:
        found = ", ".join(sorted({f"{row['label']} ({row['matching']})" for row in rows})) or "none"
        raise ValueError(f"rows of {found} must be of one label and matching")
    losses: dict[float, dict[int, float]] = {}
    for row in rows:
        of_rate = losses.setdefault(row["peak_lr"], {})
        if row["seed"] in of_rate:
            raise ValueError(f"{row['label']} at peak_lr={row['peak_lr']:g}, seed={row['seed']} is there twice")
        of_rate[row["seed"]] = math.inf if row["bits_per_byte"] is None else row["bits_per_byte"]
    return losses


@dataclass(frozen=True)
class Paired:
    """A variant's values minus another's, seed by seed."""

    label: str
    reference: str
    value: str
    seeds: tuple[int, ...]
    """That both have."""
    differences: tuple[float, ...]
    """One a seed."""

    @property
    def mean(self) -> float:
        """Mean difference."""
        return float(np.mean(self.differences))

    @property
    def sd(self) -> float | None:
        """Standard deviation of the differences; None for one pair."""
        return float(np.std(self.differences, ddof=1)) if len(self.differences) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % t interval of the mean difference; None for one pair, which says nothing of chance."""
        return t_interval(self.differences)

    @property
    def p_value(self) -> float | None:
        """Two-sided p-value of Student's paired t test; None for one pair."""
        if self.sd is None:
            return None
        if self.sd == 0:
            return float(self.mean == 0)
        t = self.mean * math.sqrt(len(self.differences)) / self.sd
        return float(2 * stats.t.sf(abs(t), len(self.differences) - 1))

    @property
    def detectable(self) -> float | None:
        """True difference that so many pairs with this spread would show at 5 % with 80 % power; None for one."""
        return None if self.sd is None else detectable(self.sd, len(self.differences))


def detectable(sd: float, pairs: int) -> float:
    """Smallest true mean difference that a two-sided 5 % paired t test of n pairs finds with 80 % power.

    d = x sd / sqrt(n), where x solves P(T'(n - 1, x) > t(0.975; n - 1)) = 0.8 for the noncentral t (Cohen 1988,
    chapter 2; the other tail's share is below 1e-5). `sd` is itself an estimate, and so is this.
    """
    if pairs < 2:
        raise ValueError(f"pairs={pairs} must be at least 2")
    return sd * _noncentrality(pairs - 1) / math.sqrt(pairs)


@functools.cache
def _noncentrality(df: int) -> float:
    critical = stats.t.ppf(0.5 + CONFIDENCE / 2, df)
    return optimize.root_scalar(
        lambda x: stats.nct.sf(critical, df, x) - POWER, bracket=(0.0, 2 * critical + 3), method="brentq"
    ).root


def paired(
    rows: Sequence[Row],
    label: str,
    reference: str,
    value: str = "bits_per_byte",
    rates: Mapping[str, float] | None = None,
) -> Paired:
    """Differences of `label` from `reference` over the seeds that both have.

    Each is taken at its own best rate, or at the one that `rates` gives for its label. ValueError where either has
    no runs, runs of two matchings, no seed in common, or a null value.
    """
    found = {}
    for name in (label, reference):
        one_of("label", name, {row["label"] for row in rows})
        found[name] = at_best_rate([row for row in rows if row["label"] == name], (rates or {}).get(name))
        for seed, row in found[name].items():
            if row[value] is None:
                raise ValueError(f"{value} of {name}, seed={seed} is null: it diverged")
    ours, theirs = found[label], found[reference]
    seeds = tuple(seed for seed in ours if seed in theirs)
    if not seeds:
        raise ValueError(f"{label} and {reference} must have a seed in common at their best rates")
    return Paired(label, reference, value, seeds, tuple(ours[s][value] - theirs[s][value] for s in seeds))


def verdict(paired: Paired) -> Verdict:
    """Of a loss, less is better; an interval that holds 0, or none, resolves nothing."""
    one_of("value", paired.value, LOSSES)
    return _sign(paired, paired.interval is not None and not paired.interval[0] <= 0 <= paired.interval[1])


def _sign(paired: Paired, resolved: bool) -> Verdict:
    if not resolved:
        return "not resolved"
    return "better" if paired.mean < 0 else "worse"


@dataclass(frozen=True)
class Ranked:
    """A variant among others, as far as their intervals tell them apart."""

    label: str
    ranks: tuple[int, int]
    """Least and most: 1 + those resolved as better, and all - those resolved as worse."""
    alike: tuple[str, ...]
    """Those that it cannot be told from."""
    mean: float
    """Difference from the reference."""
    verdict: Verdict | None = None
    """Against the reference, by its own 95 % interval; None of the reference itself."""
    verdict_holm: Verdict | None = None
    """The same at 5 % for all comparisons with the reference together (Holm 1979)."""


def ranking(comparisons: Sequence[Paired]) -> list[Ranked]:
    """Ranges of ranks of variants compared with one reference, and of that, the least mean first.

    Every two are compared over the seeds they share, by a 95 % paired t interval each: of many such pairs, one in
    twenty that are equal is told apart by chance. Ranges as in Klein, Wright & Wieczorek 2020.
    """
    if len({(c.reference, c.value) for c in comparisons}) != 1:
        raise ValueError("comparisons must be with one reference, in one value")
    reference = comparisons[0].reference
    by_label = {c.label: c for c in comparisons}
    labels = [reference, *by_label]
    if len(by_label) < len(comparisons) or reference in by_label:
        raise ValueError(f"labels {', '.join(c.label for c in comparisons)} must differ, and from {reference}")
    verdicts = {(c.label, reference): verdict(c) for c in comparisons}
    for a, b in itertools.combinations(comparisons, 2):
        verdicts[a.label, b.label] = verdict(_between(a, b)) if set(a.seeds) & set(b.seeds) else "not resolved"
    opposite: dict[Verdict, Verdict] = {"better": "worse", "worse": "better", "not resolved": "not resolved"}
    verdicts |= {(b, a): opposite[told] for (a, b), told in verdicts.items()}
    adjusted = dict(zip(by_label, holm([c.p_value for c in comparisons])))
    ranked = []
    for label in labels:
        against = {other: verdicts[label, other] for other in labels if other != label}
        told = list(against.values())
        ranks = 1 + told.count("worse"), len(labels) - told.count("better")
        alike = tuple(other for other in against if against[other] == "not resolved")
        if label == reference:
            ranked.append(Ranked(label, ranks, alike, 0.0))
            continue
        c, p = by_label[label], adjusted[label]
        corrected = _sign(c, p is not None and p < 1 - CONFIDENCE)
        ranked.append(Ranked(label, ranks, alike, c.mean, verdict(c), corrected))
    return sorted(ranked, key=lambda one: one.mean)


def _between(a: Paired, b: Paired) -> Paired:
    """a - b, of two differences from one reference."""
    ours, theirs = dict(zip(a.seeds, a.differences)), dict(zip(b.seeds, b.differences))
    seeds = tuple(seed for seed in a.seeds if seed in theirs)
    return Paired(a.label, b.label, a.value, seeds, tuple(ours[seed] - theirs[seed] for seed in seeds))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for how many there are (Holm 1979); None, which proves nothing, counts among them."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    for place, (p, i) in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - place) * p))
        adjusted[i] = least
    return adjusted
