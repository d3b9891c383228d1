"""The best caches within a number of bytes a token, as far as seeds can tell them apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvjax.checks import positive
from kvjax.paired import Paired, ranking, t_interval

LOSS = "bits_per_byte"


@dataclass(frozen=True)
class Candidate:
    """A variant under a codec, among all that fit."""

    label: str
    codec: str
    bytes_per_token: float
    bits_per_byte: float
    """Mean over seeds."""
    interval: tuple[float, float] | None
    """95 % t interval of that mean; None for one seed."""
    seeds: tuple[int, ...]
    ranks: tuple[int, int]
    """Least and most: 1 + those resolved as better, and all - those resolved as worse (`paired.ranking`)."""
    alike: tuple[str, ...]
    """Those that paired seeds cannot tell from this one, as `label codec`."""

    @property
    def name(self) -> str:
        """Variant and codec."""
        return f"{self.label} {self.codec}"


def choose(rows: Sequence[Mapping[str, Any]], bytes_per_token_budget: float) -> list[Candidate]:
    """Every variant under every codec that fits the budget, by mean bits per byte.

    The order alone says little: `ranks` are what paired t intervals resolve, over the seeds that two candidates
    share, of which there must be two. Those whose least rank is 1 may be the best. Rows as `experiments.compress`
    writes them, with label, matching and seed. ValueError where nothing fits, and for rows of two matchings, a row
    that is there twice or without a finite loss, and a candidate that shares no seed with the first.
    """
    positive("bytes_per_token_budget", bytes_per_token_budget)
    sizes, losses = _measured(rows)
    fitting = {key: losses[key] for key, size in sizes.items() if size <= bytes_per_token_budget}
    if not fitting:
        least = min(sizes, key=sizes.__getitem__)
        raise ValueError(
            f"bytes_per_token_budget={bytes_per_token_budget:g} must be at least {sizes[least]:g}, which is "
            f"{' '.join(least)}"
        )
    means = {key: float(np.mean(list(by_seed.values()))) for key, by_seed in fitting.items()}
    first, *others = sorted(fitting, key=means.__getitem__)
    comparisons = [_difference(fitting, key, first) for key in others]
    ranked = {one.label: one for one in ranking(comparisons)} if comparisons else {}
    made = []
    for key in (first, *others):
        name, by_seed = " ".join(key), fitting[key]
        ranks, alike = (ranked[name].ranks, ranked[name].alike) if ranked else ((1, 1), ())
        interval = t_interval(list(by_seed.values()))
        made.append(Candidate(*key, sizes[key], means[key], interval, tuple(by_seed), ranks, alike))
    return made


def _measured(rows):
    """Bytes a token, and losses by seed, of every label and codec."""
    matchings = sorted({row["matching"] for row in rows})
    if len(matchings) != 1:
        raise ValueError(f"rows must be of one matching, not of {', '.join(matchings) or 'none'}")
    sizes: dict[tuple[str, str], float] = {}
    losses: dict[tuple[str, str], dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        key = row["label"], row["codec"]
        by_seed = losses.setdefault(key, {})
        if row["seed"] in by_seed or row[LOSS] is None:
            what = "has no finite loss" if row[LOSS] is None else "is there twice"
            raise ValueError(f"{row['label']} {row['codec']}, seed={row['seed']} {what}")
        by_seed[row["seed"]] = row[LOSS]
        sizes[key] = row["cache_bytes"]["per_token"]
    return sizes, losses


def _difference(losses, key, reference):
    ours, theirs = losses[key], losses[reference]
    seeds = tuple(seed for seed in ours if seed in theirs)
    if not seeds:
        raise ValueError(f"{' '.join(key)} must share a seed with {' '.join(reference)}")
    return Paired(" ".join(key), " ".join(reference), LOSS, seeds, tuple(ours[s] - theirs[s] for s in seeds))
