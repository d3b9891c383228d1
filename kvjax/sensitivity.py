"""What a loss of energy costs each array of each layer, measured: the weights by which a budget is shared out.

F features of an array, those of all heads if they are projected jointly; R rank.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from kvjax.checks import one_of, positive
from kvjax.codecs.base import Exact, Storage
from kvjax.codecs.chain import chain
from kvjax.codecs.fit import KINDS, causal_distances, eigenvalues, fit, rope_averaged
from kvjax.codecs.linear import Linear
from kvjax.codecs.statistics import ArrayStatistics, Statistics
from kvjax.compress import Comparer
from kvjax.data import Corpus
from kvjax.decoder import Decoder

LEAST = 1e-6
"""A part of the energy below which what its loss costs is lost itself in float32's rounding."""


def sensitivities(
    graphdef: nnx.GraphDef[Decoder],
    params: Any,
    corpus: Corpus,
    statistics: Statistics,
    kinds: Mapping[str, str],
    context: int,
    batch_size: int,
    share: float = 0.1,
    keys_before_rope: bool = False,
    track: Callable[[list], Iterable] = iter,
    *,
    sinks: int = 0,
    mean: bool = True,
    joint: bool = False,
) -> dict[tuple[int, str], float]:
    """KL(exact || projected), in nats per token, over the part of its energy dropped, by layer and array.

    Each array of `kinds` is projected alone, in one layer at a time, to the rank that drops the part of its
    energy (`fit.eigenvalues`, summed over heads) next to `share`; 0 where rounding leaves a KL below 0.
    `corpus` must be calibration's text. `track` may wrap the list of (layer, array) to show progress. `sinks`
    first positions are kept exact, and left out of the fit if there are any; `mean`, `joint` as in `fit`.
    ValueError for what model or statistics lack, and for energy that is all in one dimension.
    """
    positive("share", share)
    if share >= 1:
        raise ValueError(f"share={share} must be below 1")
    options = {"mean": mean, "sinks": sinks == 0, "joint": joint}
    comparer = Comparer(graphdef, params, corpus, context, batch_size)
    num_layers = len(comparer.entries)
    if len(statistics.layers) != num_layers:
        raise ValueError(f"statistics of {len(statistics.layers)} layers must be of this model's {num_layers}")
    for name, kind in kinds.items():
        one_of("array", name, comparer.entries[0])
        one_of(f"kind of {name}", kind, set(KINDS) - {"random"})
    frequencies = comparer.frequencies if keys_before_rope else None
    weights = {}
    for layer, name in track([(layer, name) for layer in range(num_layers) for name in kinds]):
        known = statistics.layers[layer]
        stored = "k_before_rope" if name == "k" and frequencies is not None else name
        one_of(f"array of the statistics' layer {layer}", stored, known)
        stats = known[stored]
        if stored != name:
            stats = averaged(stats, frequencies, context)
        dropped_R = dropped_parts(eigenvalues(stats, kinds[name], **options))
        rank = rank_at(dropped_R, share)
        whole = fit(kinds[name], stats, len(dropped_R) - 1, **options)
        storages = [Storage()] * num_layers
        storages[layer] = Storage({name: chain(truncated(whole, rank), Exact())}, sinks=sinks)
        comparison = comparer.compare(storages, keys_before_rope)
        kl = float(comparison.kl.sum() / comparison.score.tokens.sum())
        weights[layer, name] = max(kl, 0.0) / float(dropped_R[rank])
    return weights


def averaged(keys: ArrayStatistics, frequencies: np.ndarray | None, context: int) -> ArrayStatistics:
    """Those of unrotated keys with queries as they meet them: turned by causal distances, all pairs alike."""
    assert keys.queries is not None and frequencies is not None
    queries = rope_averaged(keys.queries, frequencies, causal_distances(context))
    return dataclasses.replace(keys, queries=queries)


def dropped_parts(energies: np.ndarray) -> np.ndarray:
    """`[F + 1]`: the part of all heads' energy `[..., F]` that is lost at ranks 0, 1, ..., F."""
    energy_F = energies.reshape(-1, energies.shape[-1]).sum(0)
    left_R = np.append(energy_F[::-1].cumsum()[::-1], 0.0)
    return left_R / (left_R[0] or 1.0)


def rank_at(dropped_R: np.ndarray, share: float) -> int:
    """The rank, from 1, that loses the part next to `share`; ValueError if all lose next to nothing."""
    ranks = np.flatnonzero(dropped_R > LEAST)
    ranks = ranks[ranks >= 1]
    if not ranks.size:
        raise ValueError(f"share={share} cannot be dropped: the energy is in one dimension, or there is none")
    return int(ranks[np.abs(dropped_R[ranks] - share).argmin()])


def truncated(map: Linear, rank: int) -> Linear:
    """The map to its first `rank` dimensions, the others being 0: all ranks have equal shapes, and one program."""
    return dataclasses.replace(map, down=map.down.at[..., rank:].set(0.0))
