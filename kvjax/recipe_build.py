"""From a recipe to how every layer of a model is stored, and what that takes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import numpy as np

from kvjax.checks import one_of
from kvjax.codecs import fit
from kvjax.codecs.base import Storage, slot_multiple
from kvjax.codecs.budget import uniform_ranks, waterfill_ranks
from kvjax.codecs.statistics import ArrayStatistics, Statistics
from kvjax.recipe_array import EXACT, PlannedArray, token_bits
from kvjax.recipe_steps import amount
from kvjax.recipes import Chain, Recipe, needs_statistics
from kvjax.slots import nbytes

Entries = Sequence[Mapping[str, jax.Array | jax.ShapeDtypeStruct]]
"""Of every layer, the arrays that its cache holds, or their shapes, `[B, K, T, F]` or `[B, T, F]`, by name."""
Weights = Mapping[tuple[int, str], float]
"""By layer and array."""

UNROTATED = "k_before_rope"  # calibration's name of what `keys=before_rope` caches as `k`


def build(
    recipe: Recipe,
    entries: Entries,
    statistics: Statistics | None = None,
    *,
    frequencies: np.ndarray | None = None,
    context: int | None = None,
    weights: Weights | None = None,
) -> tuple[Storage, ...]:
    """How every layer is stored; ValueError for what model or statistics lack.

    `context`: tokens of the windows to be evaluated, which the statistics must cover. `frequencies`: radians a
    position of the model's rotary pairs, `[F / 2]`, for maps that weigh unrotated keys by queries, whose second
    moment is averaged over the causal distances in `context` (None: in the statistics' windows).

    A budget gives a rank to every unit, an array of a layer, such that none could be larger. Uniform: the same
    part of its features. Water: dimensions in order of energy per bit. Energies are `fit.eigenvalues`, summed
    over heads, as parts of the unit's sum, which is a choice: those of different units do not compare.
    Sensitivity: these parts times the unit's weight in `weights`, say what losing them was measured to cost.
    """
    first, last = recipe.layers or (0, len(entries) - 1)
    if last >= len(entries):
        top = len(entries) - 1
        raise ValueError(f"layers={first}-{last} must be of the model's 0-{top}; nearest: {min(first, top)}-{top}")
    if needs_statistics(recipe):
        _check_statistics(recipe, entries, statistics, context)
    arrays: list[PlannedArray] = []
    for layer, entry in enumerate(entries):
        chains = _chains(recipe, entry) if first <= layer <= last else {}
        for name, a in sorted(entry.items()):
            steps = chains.get(name, (EXACT,))
            known = None
            if statistics is not None and any(step.fitted or step.calibrated for step in steps):
                known = _statistics(recipe, statistics, layer, name, steps[0], frequencies, context)
            arrays.append(PlannedArray(layer, name, steps, a, recipe.sinks == 0, known))
    ranks = {} if recipe.budget is None else _allocate(recipe, arrays, weights)
    storages = []
    for layer, entry in enumerate(entries):
        codecs = {a.name: a.codec(ranks.get((layer, a.name))) for a in arrays if a.layer == layer}
        kept = {"sinks": recipe.sinks, "recent": recipe.recent} if first <= layer <= last else {}
        storages.append(Storage(codecs, **kept).by_name(sorted(entry)))
    return tuple(storages)


def describe(storages: Sequence[Storage], entries: Entries, slots: int) -> dict[str, float]:
    """What a sequence's cache of so many slots takes, in closed form, and the calibrated arrays of a model.

    ValueError for slots that such a cache cannot have.
    """
    step = slot_multiple(storages)
    if slots < 1 or slots % step:
        below = slots - slots % step
        raise ValueError(f"slots={slots} must be a multiple of {step}; nearest: {below or step} or {below + step}")
    encoded, exact = Fraction(0), 0
    for storage, entry in zip(storages, entries, strict=True):
        codecs: Any = storage.by_name(sorted(entry)).arrays
        kept = storage.sinks + storage.recent + (storage.group if storage.group > 1 else 0)
        for name, a in entry.items():
            heads, features, element_bits = math.prod(a.shape[1:-2]), a.shape[-1], 8 * a.dtype.itemsize
            encoded += token_bits(codecs[name], heads, features, element_bits)
            exact += kept * heads * features * element_bits
    return {
        "encoded_bytes_per_token": float(encoded / 8),
        "exact_bytes": exact / 8,
        "bytes_per_token": float((encoded * slots + exact) / 8 / slots),
        "calibrated_bytes": nbytes(tuple(storages)),
    }


def _chains(recipe: Recipe, entry: Mapping[str, Any]) -> dict[str, Chain]:
    """Steps by array, of which all must be the layer's."""
    chains = dict(recipe.arrays)
    if recipe.keys == "before_rope" and "k" not in entry:
        raise ValueError(
            f"keys=before_rope must go with a model that caches k; this caches {', '.join(sorted(entry))}"
        )
    if "" in chains:
        return dict.fromkeys(entry, chains[""])
    for name in chains:
        one_of(f"recipe {recipe.text!r}: array", name, entry)
    return chains


def _statistics_name(recipe, name):
    return UNROTATED if name == "k" and recipe.keys == "before_rope" else name


def _statistics(recipe, statistics, layer, name, first, frequencies, context) -> ArrayStatistics:
    """Of an array, with the queries as they meet what the cache holds."""
    known = _statistics_name(recipe, name)
    stats = statistics.layers[layer][known]
    if known == name or first.name not in ("query", "keyquery", "querydiag") or stats.queries is None:
        return stats
    if frequencies is None:
        raise ValueError(
            f"frequencies must be given for {first.text} with keys=before_rope: queries turn with distance"
        )
    distances = fit.causal_distances(context or statistics.context)
    return dataclasses.replace(stats, queries=fit.rope_averaged(stats.queries, frequencies, distances))


def _check_statistics(
    recipe: Recipe, entries: Entries, statistics: Statistics | None, context: int | None
) -> None:
    """Statistics must be there, of this model, and of windows as long as those of evaluation."""
    if statistics is None:
        steps = (step for _, chain in recipe.arrays for step in chain)
        step = next(step for step in steps if step.fitted or step.calibrated)
        without = {"fp8": "fp8:scale1", "nvfp4": "mxfp4"}.get(step.name, "haar")
        raise ValueError(f"{step.text} needs statistics: run experiments.calibrate; without, choose {without}")
    if len(statistics.layers) != len(entries):
        raise ValueError(
            f"statistics of {len(statistics.layers)} layers (of {statistics.model}) must be of this model's "
            f"{len(entries)}"
        )
    for number, (layer, entry) in enumerate(zip(statistics.layers, entries)):
        for name, a in entry.items():
            known, shape = _statistics_name(recipe, name), (*a.shape[1:-2], a.shape[-1])
            found = layer[known].rest.total.shape if known in layer else None
            if found != shape:
                has = "lack" if found is None else f"have {list(found)} of"
                raise ValueError(
                    f"statistics (of {statistics.model}) {has} {known} in layer {number}; "
                    f"this model's is {list(shape)}"
                )
    if context is not None and statistics.context < context:
        raise ValueError(
            f"statistics of windows of {statistics.context} tokens must cover the context={context}: "
            f"calibrate with --context {context}"
        )


def _allocate(
    recipe: Recipe, arrays: Sequence[PlannedArray], weights: Weights | None
) -> dict[tuple[int, str], int]:
    """A rank for every array without one."""
    assert recipe.budget is not None and recipe.allocate is not None
    units = [a for a in arrays if a.open]
    whole = 2 * sum(math.prod(a.shape.shape[1:-2]) * a.shape.shape[-1] for a in arrays)
    budget = 8 * amount(recipe.budget, whole)
    bits: Any = [[unit.bits(rank) for rank in range(1, unit.limit + 1)] for unit in units]
    fixed, ones = sum(a.bits() for a in arrays if not a.open), sum(of_unit[0] for of_unit in bits)
    if budget < fixed + ones:
        least = math.ceil((fixed + ones) / 8)
        raise ValueError(
            f"budget={recipe.budget}, {float(budget / 8):g} bytes per token, must be at least {least}, or "
            f"{math.ceil(Fraction(1000 * least, whole)) / 10}%: {float(fixed / 8):g} for arrays with nothing to "
            f"choose, and rank 1 for the others"
        )
    # Straight lines through rank 1 that no rank's bits exceed; what they leave of the budget comes after.
    slopes: Any = [
        max([(now - of_unit[0]) / more for more, now in enumerate(of_unit[1:], 1)], default=of_unit[0])
        for of_unit in bits
    ]
    limits = [unit.limit for unit in units]
    room = budget - fixed
    lines_room: Any = room - ones + sum(slopes)
    if recipe.allocate == "uniform":
        ranks = uniform_ranks(slopes, limits, lines_room)
        gain = lambda u: -Fraction(ranks[u], limits[u])
    else:
        energies, shares = [unit.energies() for unit in units], _shares(recipe, units, weights)
        ranks = waterfill_ranks(energies, slopes, lines_room, shares)
        gain = lambda u: shares[u] * energies[u][ranks[u]] / float(slopes[u])
    room -= sum(of_unit[rank - 1] for of_unit, rank in zip(bits, ranks))
    growing = list(range(len(units)))
    while growing := [
        u for u in growing if ranks[u] < limits[u] and bits[u][ranks[u]] - bits[u][ranks[u] - 1] <= room
    ]:
        unit = max(growing, key=gain)
        room -= bits[unit][ranks[unit]] - bits[unit][ranks[unit] - 1]
        ranks[unit] += 1
    return {(unit.layer, unit.name): rank for unit, rank in zip(units, ranks)}


def _shares(recipe: Recipe, units: Sequence[PlannedArray], weights: Weights | None) -> list[float]:
    if recipe.allocate == "water":
        return [1.0] * len(units)
    for unit in units:
        if weights is None or (unit.layer, unit.name) not in weights:
            raise ValueError(
                f"allocate=sensitivity needs a weight of layer {unit.layer}, {unit.name}; or choose water"
            )
    assert weights is not None
    return [weights[unit.layer, unit.name] for unit in units]
