import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from kvjax.codecs.budget import choose, reverse_waterfill_bits, uniform_ranks, waterfill_ranks


def spent(ranks, costs):
    return sum(Fraction(cost) * rank for rank, cost in zip(ranks, costs))


def assert_exact(ranks, costs, limits, budget):
    """Within the budget, and no dimension that is left out would fit."""
    assert all(1 <= rank <= limit for rank, limit in zip(ranks, limits))
    left = budget - spent(ranks, costs)
    assert left >= 0
    assert not [cost for rank, cost, limit in zip(ranks, costs, limits) if rank < limit and cost <= left]


def lost(ranks, energies, weights):
    return sum(weight * energy[rank:].sum() for weight, energy, rank in zip(weights, energies, ranks))


def every_ranks(limits):
    return itertools.product(*(range(1, limit + 1) for limit in limits))


def units(rng):
    n = int(rng.integers(1, 5))
    costs = rng.choice([0.5625, 1, 2, 4.5, 6], n).tolist()
    limits = rng.integers(1, 7, n).tolist()
    least, most = math.ceil(sum(costs)), math.ceil(spent(limits, costs))
    return costs, limits, int(rng.integers(least, most + 3))


def test_uniform_ranks_by_hand():
    # Three quarters of 8, 16 and 4 dimensions at 4, 2 and 1 bytes take 24 + 24 + 3 = 51, 13/16 only 2 more, 14/16
    # 28 + 28 + 3 = 59. Of 64, the 5 left then go to the last of the third, and two of the second.
    assert uniform_ranks([4, 2, 1], [8, 16, 4], 51) == [6, 12, 3]
    assert uniform_ranks([4, 2, 1], [8, 16, 4], 53) == [6, 13, 3]
    assert uniform_ranks([4, 2, 1], [8, 16, 4], 64) == [7, 16, 4]
    assert uniform_ranks([4, 2, 1], [8, 16, 4], 7) == [1, 1, 1]
    assert uniform_ranks([4, 2, 1], [8, 16, 4], 10**6) == [8, 16, 4]


def test_uniform_ranks_spend_the_budget_evenly():
    rng = np.random.default_rng(0)
    for _ in range(200):
        costs, limits, budget = units(rng)
        ranks = uniform_ranks(costs, limits, budget)
        assert_exact(ranks, costs, limits, budget)
        # No part of every limit that fits is larger than what all units got.
        for part in {Fraction(r, limit) for limit in limits for r in range(1, limit + 1)}:
            alike = [max(1, math.floor(part * limit)) for limit in limits]
            if spent(alike, costs) <= budget:
                assert all(rank >= even for rank, even in zip(ranks, alike))


def test_waterfilling_loses_least_where_costs_are_equal():
    rng = np.random.default_rng(1)
    for _ in range(100):
        _, limits, _ = units(rng)
        energies = [np.sort(rng.random(limit) ** 4)[::-1] for limit in limits]
        weights, budget = rng.random(len(limits)).tolist(), int(rng.integers(len(limits), sum(limits) + 2))
        ranks = waterfill_ranks(energies, [1.0] * len(limits), budget, weights)
        assert_exact(ranks, [1.0] * len(limits), limits, budget)
        least = min(lost(r, energies, weights) for r in every_ranks(limits) if sum(r) <= budget)
        assert lost(ranks, energies, weights) == pytest.approx(least, abs=1e-12)


def test_waterfilling_at_unequal_costs_goes_by_energy_per_byte():
    """A budget that ends between two dimensions of that order is spent exactly, and nothing else loses less."""
    rng = np.random.default_rng(2)
    for _ in range(100):
        costs, limits, budget = units(rng)
        energies = [np.sort(rng.random(limit))[::-1] for limit in limits]
        assert_exact(waterfill_ranks(energies, costs, budget), costs, limits, budget)
        rest = [(e / cost, unit) for unit, cost in enumerate(costs) for e in energies[unit][1:]]
        kept = [unit for _, unit in sorted(rest, reverse=True)[: rng.integers(len(rest) + 1)]]
        expected = [1 + kept.count(unit) for unit in range(len(costs))]
        assert waterfill_ranks(energies, costs, spent(expected, costs)) == expected
        ones = [1.0] * len(limits)
        affordable = (r for r in every_ranks(limits) if spent(r, costs) <= spent(expected, costs))
        least = min(lost(r, energies, ones) for r in affordable)
        assert lost(expected, energies, ones) == pytest.approx(least, abs=1e-12)


def test_choice_is_the_best_of_all():
    rng = np.random.default_rng(3)
    for _ in range(150):
        options = [
            [(int(8 * rng.integers(0, 9)), float(rng.standard_normal())) for _ in range(rng.integers(1, 4))]
            for _ in range(rng.integers(1, 5))
        ]
        least = sum(min(size for size, _ in listed) for listed in options)
        budget = int(least + rng.integers(0, 80))
        picks = choose(options, budget)
        picked = [listed[pick] for listed, pick in zip(options, picks)]
        size, loss = (sum(parts) for parts in zip(*picked))
        every = ([sum(parts) for parts in zip(*some)] for some in itertools.product(*options))
        assert size <= budget
        assert loss == pytest.approx(min(loss for size, loss in every if size <= budget), abs=1e-12)


def test_choice_by_hand():
    formats = [(64, 0.0), (36, 0.1), (18, 1.0)]
    assert choose([formats, formats], 10**9) == [0, 0]
    assert sorted(choose([formats, formats], 100)) == [0, 1]
    assert choose([formats, [(64, 0.0), (36, 0.2), (18, 1.0)]], 100) == [1, 0]
    assert choose([formats, formats], 36) == [2, 2]
    assert choose([], 0) == []


def test_bits_by_hand():
    # theta = 1: 16 -> 2 bits, 4 -> 1 bit, 1/4 and 0 none.
    np.testing.assert_allclose(reverse_waterfill_bits(np.array([4.0, 0.25, 16.0, 0.0]), 3.0), [1.0, 0.0, 2.0, 0.0])
    # theta = 1/16: everything is coded.
    np.testing.assert_allclose(reverse_waterfill_bits(np.array([4.0, 0.25, 16.0]), 8.0), [3.0, 1.0, 4.0])
    np.testing.assert_array_equal(reverse_waterfill_bits(np.array([4.0, 1.0]), 0.0), [0.0, 0.0])
    np.testing.assert_array_equal(reverse_waterfill_bits(np.zeros(2), 0.0), [0.0, 0.0])


def test_bits_meet_their_optimum():
    """Sum as asked; errors min(theta, eigenvalue) of one theta, which no shift of bits between two improves."""
    rng = np.random.default_rng(4)
    for _ in range(50):
        values, total = np.exp(3 * rng.standard_normal(6)), float(10 * rng.random())
        bits = reverse_waterfill_bits(values, total)
        assert bits.sum() == pytest.approx(total) and (bits >= 0).all()
        errors = values * 4.0**-bits
        theta = errors[bits > 0].max()
        np.testing.assert_allclose(errors, np.minimum(theta, values), rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform_ranks([4, 2.5], [8, 8], 6), "budget=6 must be at least 7 bytes, rank 1 everywhere"),
        (lambda: uniform_ranks([4, 0], [8, 8], 6), "costs[1]=0 must be a finite number above 0"),
        (lambda: uniform_ranks([4], [8, 8], 6), "costs=1 must be as many as the units, 2"),
        (lambda: uniform_ranks([4, 4], [8, 0], 60), "limits[1]=0 must be at least 1"),
        (lambda: waterfill_ranks([np.ones(3)], [2.0], 1), "budget=1 must be at least 2 bytes, rank 1 everywhere"),
        (
            lambda: waterfill_ranks([np.arange(3.0)], [2.0], 9),
            "energies[0] must be finite, at least 0 and descending",
        ),
        (lambda: waterfill_ranks([np.ones(3)], [2.0], 9, [1.0, 1.0]), "weights=2 and costs=1 must be as many"),
        (lambda: waterfill_ranks([np.ones(3)], [2.0], 9, [-1.0]), "weights[0]=-1.0 must be at least 0.0"),
        (
            lambda: choose([[(8, 0.0)], [(9, 0.0), (3, 1.0)]], 10),
            "budget=10 must be at least 11 bytes, the cheapest",
        ),
        (lambda: choose([[]], 10), "options[0] must hold at least one option"),
        (lambda: choose([[(8, math.nan)]], 10), "options[0][0]=(8, nan) must be whole bytes and a finite loss"),
        (lambda: choose([[(8.5, 0.0)]], 10), "options[0][0]=(8.5, 0.0) must be whole bytes and a finite loss"),
        (
            lambda: reverse_waterfill_bits(np.zeros(2), 1.0),
            "total_bits=1.0 must be 0 for eigenvalues that are all 0",
        ),
        (lambda: reverse_waterfill_bits(np.array([-1.0]), 1.0), "eigenvalues must be finite and at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(message)
