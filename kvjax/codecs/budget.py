"""How bytes or bits are shared out: ranks by energies, one format for each array, bits by variances."""

import bisect
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from kvjax.checks import at_least, positive


def uniform_ranks(costs: Sequence[float], limits: Sequence[int], budget: float) -> list[int]:
    """Ranks that are the same part of every unit's limit, at least 1, as large as the budget allows.

    What is left goes to single dimensions, least part first: none that is left out would still fit. `costs`
    are bytes per token of one dimension, `limits` the largest ranks; ValueError if rank 1 everywhere is too much.
    """
    left = _left(costs, limits, budget)
    parts = sorted({Fraction(rank, limit) for limit in limits for rank in range(limit + 1)})
    ranks_at = lambda part: [max(1, int(part * limit)) for limit in limits]
    spent = lambda part: sum(Fraction(cost) * (rank - 1) for cost, rank in zip(costs, ranks_at(part)))
    ranks = ranks_at(parts[bisect.bisect_right(parts, left, key=spent) - 1])
    gain = lambda unit, rank: -Fraction(rank, limits[unit])
    return _fill(ranks, costs, limits, budget, gain)


def waterfill_ranks(
    energies: Sequence[np.ndarray], costs: Sequence[float], budget: float, weights: Sequence[float] | None = None
) -> list[int]:
    """Ranks, at least 1, by descending weight * energy / cost: the least energy lost, if costs are equal.

    With unequal costs it is so for budgets that the ranking meets exactly; else what is left goes to the next
    best dimensions that fit, so that none that is left out would. `energies` of every unit are those of its
    dimensions, descending; `costs` as in `uniform_ranks`; ValueError if rank 1 everywhere is too much.
    """
    weights = [1.0] * len(energies) if weights is None else weights
    if not len(weights) == len(costs) == len(energies):
        raise ValueError(
            f"weights={len(weights)} and costs={len(costs)} must be as many as the units, {len(energies)}"
        )
    for unit, (energy, weight) in enumerate(zip(energies, weights)):
        at_least(f"weights[{unit}]", weight, 0.0)
        if not (np.isfinite(energy).all() and (energy >= 0).all() and (np.diff(energy) <= 0).all()):
            raise ValueError(f"energies[{unit}] must be finite, at least 0 and descending")
    limits = [len(energy) for energy in energies]
    gain = lambda unit, rank: weights[unit] * float(energies[unit][rank]) / costs[unit]
    _left(costs, limits, budget)
    return _fill([1] * len(limits), costs, limits, budget, gain)


def choose(options: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int]:
    """The number of one option for every unit, of the least summed loss whose summed bytes are within budget.

    Options are `(bytes, loss)`. Exact: dynamic programming over bytes in excess of every unit's cheapest
    option. ValueError if even the cheapest of all do not fit.
    """
    for unit, listed in enumerate(options):
        if not listed:
            raise ValueError(f"options[{unit}] must hold at least one option")
        for number, (size, loss) in enumerate(listed):
            at_least(f"bytes of options[{unit}][{number}]", size, 0)
            if size != int(size) or not math.isfinite(loss):
                raise ValueError(f"options[{unit}][{number}]={(size, loss)} must be whole bytes and a finite loss")
    cheapest = [min(size for size, _ in listed) for listed in options]
    if budget < sum(cheapest):
        raise ValueError(f"budget={budget} must be at least {sum(cheapest)} bytes, the cheapest of all options")
    extras = [[int(size - least) for size, _ in listed] for listed, least in zip(options, cheapest)]
    unit_size = math.gcd(*(extra for listed in extras for extra in listed)) or 1
    room = min(int(budget - sum(cheapest)), sum(max(listed) for listed in extras)) // unit_size
    best, chosen = np.zeros(room + 1), []  # the least loss of the units so far within 0, 1, ... unit sizes
    for listed, listed_extras in zip(options, extras):
        losses = np.full((len(listed), room + 1), np.inf)
        for number, ((_, loss), extra) in enumerate(zip(listed, listed_extras)):
            units = extra // unit_size
            losses[number, units:] = best[: max(room + 1 - units, 0)] + loss
        chosen.append(losses.argmin(axis=0))
        best = losses.min(axis=0)
    picks = []
    for listed_extras, numbers in zip(reversed(extras), reversed(chosen)):
        picks.append(int(numbers[room]))
        room -= listed_extras[picks[-1]] // unit_size
    return picks[::-1]


def reverse_waterfill_bits(eigenvalues: np.ndarray, total_bits: float) -> np.ndarray:
    """Bits `[F]` of sum `total_bits` that code independent Gaussians at the least squared error.

    b = max(0, log2(eigenvalue / theta) / 2) leaves errors of min(theta, eigenvalue) (Cover & Thomas, 10.3.3).
    """
    at_least("total_bits", total_bits, 0.0)
    if not (np.isfinite(eigenvalues).all() and (eigenvalues >= 0).all()):
        raise ValueError("eigenvalues must be finite and at least 0")
    logs = np.sort(np.log2(eigenvalues[eigenvalues > 0].astype(np.float64)))[::-1]
    if not logs.size:
        if total_bits > 0:
            raise ValueError(f"total_bits={total_bits} must be 0 for eigenvalues that are all 0")
        return np.zeros(eigenvalues.shape)
    # With the n largest coded, log2(theta) is such that their bits sum up; n is the last for which
    # theta does not exceed them.
    counts = np.arange(1, logs.size + 1)
    thetas = (np.cumsum(logs) - 2 * total_bits) / counts
    theta = thetas[np.flatnonzero(logs >= thetas)[-1]]
    with np.errstate(divide="ignore"):
        return np.maximum(0.0, (np.log2(eigenvalues) - theta) / 2)


def _left(costs: Sequence[float], limits: Sequence[int], budget: float) -> Fraction:
    """What rank 1 everywhere leaves of the budget, exactly."""
    if len(costs) != len(limits):
        raise ValueError(f"costs={len(costs)} must be as many as the units, {len(limits)}")
    for unit, (cost, limit) in enumerate(zip(costs, limits)):
        positive(f"costs[{unit}]", cost)
        at_least(f"limits[{unit}]", limit, 1)
    least = sum(Fraction(cost) for cost in costs)
    if budget < least:
        raise ValueError(f"budget={budget} must be at least {math.ceil(least)} bytes, rank 1 everywhere")
    return Fraction(budget) - least


def _fill(ranks, costs, limits, budget, gain) -> list[int]:
    """Dimensions one by one, the largest gain first, while any fits."""
    ranks, left = list(ranks), Fraction(budget) - sum(Fraction(c) * r for c, r in zip(costs, ranks))
    heap = [(-gain(unit, rank), unit) for unit, rank in enumerate(ranks) if rank < limits[unit]]
    heapq.heapify(heap)
    while heap:
        _, unit = heapq.heappop(heap)
        if costs[unit] > left:
            continue  # nor will any later dimension of this unit fit
        left -= Fraction(costs[unit])
        ranks[unit] += 1
        if ranks[unit] < limits[unit]:
            heapq.heappush(heap, (-gain(unit, ranks[unit]), unit))
    return ranks
