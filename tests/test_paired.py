"""Paired comparisons: against tables of Student's t, scipy's paired test, simulated power, and exact parabolas."""

import math

import numpy as np
import pytest
from scipy import stats

from kvjax.paired import (
    Paired,
    at_best_rate,
    best_rate,
    detectable,
    holm,
    paired,
    ranking,
    rate_fit,
    t_interval,
    verdict,
)

RATES = (1e-3, 2e-3, 4e-3)


def row(label="mqa", rate=1e-3, seed=0, bits=1.5, matching="params", perplexity=70.0):
    keys = {"label": label, "matching": matching, "peak_lr": rate, "seed": seed, "stage": "rates"}
    return keys | {"bits_per_byte": bits, "perplexity": perplexity}


def difference(label, *values, seeds=None, reference="mha"):
    return Paired(label, reference, "bits_per_byte", seeds or tuple(range(len(values))), values)


def test_interval_of_a_table():
    """Mean 3, s = 1, n = 4: 3 +- 3.182 / 2, with t(0.975; 3) = 3.182 of any printed table."""
    values = (3 - math.sqrt(1.5), 3.0, 3.0, 3 + math.sqrt(1.5))
    np.testing.assert_allclose(t_interval(values), (3 - 1.5912, 3 + 1.5912), atol=1e-4)
    assert t_interval([2.0]) is None and t_interval([]) is None


def test_an_exact_parabola_is_found():
    bottom, least = 2.5e-3, 1.4
    loss = lambda rate: least + 0.03 * math.log(rate / bottom) ** 2
    rows = [row(rate=rate, seed=seed, bits=loss(rate) + 0.01 * seed) for rate in RATES for seed in (0, 1)]
    fit = rate_fit(rows)
    assert fit.rates == RATES and fit.seeds == (0, 1) and fit.best == 2e-3 and not fit.at_end
    np.testing.assert_allclose((fit.optimum, fit.loss), (bottom, least + 0.005), rtol=1e-9)
    np.testing.assert_allclose(fit.losses, [loss(rate) + 0.005 for rate in RATES], rtol=1e-12)
    np.testing.assert_allclose(fit.parabola(math.log(3e-3)), loss(3e-3) + 0.005, rtol=1e-9)


@pytest.mark.parametrize(
    ("losses", "best", "optimum"),
    [
        ((1.5, 1.4, 1.38), 4e-3, 2e-3 * 2 ** (0.06 / 0.08)),  # bottom of 1.4 - 0.06 x + 0.04 x^2 within, best not
        ((1.38, 1.4, 1.5), 1e-3, 2e-3 * 2 ** (-0.06 / 0.08)),
        ((1.5, 1.4, 1.31), 4e-3, 2e-3 * 2 ** (0.095 / 0.01)),
        ((1.4, 1.5, 1.45), 1e-3, None),
        ((1.5, 1.4, 1.3), 4e-3, None),
    ],
)
def test_optima_at_an_end_are_flagged(losses, best, optimum):
    fit = rate_fit([row(rate=rate, bits=bits) for rate, bits in zip(RATES, losses)])
    assert fit.at_end and fit.best == best
    if optimum is None:
        assert fit.optimum is None and fit.loss is None
    else:
        assert fit.optimum == pytest.approx(optimum, rel=1e-6)


def test_least_squares_through_four_rates():
    """y = (1, 0, 0, 3) at x = 0 ... 3 has least squares 1.1 - 1.9 x + ... by NumPy's normal equations."""
    x, y = np.arange(4.0), np.array([1.0, 0.0, 0.0, 3.0])
    a_XC = np.stack([np.ones(4), x, x**2], axis=1)
    c = np.linalg.solve(a_XC.T @ a_XC, a_XC.T @ y)
    fit = rate_fit([row(rate=1e-3 * 2**i, bits=bits) for i, bits in zip(x, y)])
    assert fit.optimum == pytest.approx(1e-3 * 2 ** (-c[1] / (2 * c[2])))
    assert fit.loss == pytest.approx(c[0] - c[1] ** 2 / (4 * c[2])) and not fit.at_end


def test_rates_are_compared_on_the_seeds_that_all_have():
    """More seeds at the best rate, all unlucky: it stays the best one."""
    rows = [row(rate=rate, bits=bits) for rate, bits in zip(RATES, (1.42, 1.40, 1.41))]
    rows += [row(rate=2e-3, seed=seed, bits=1.6) for seed in (1, 2)]
    fit = rate_fit(rows)
    assert fit.best == best_rate(rows) == 2e-3 and fit.seeds == (0,) and fit.losses == (1.42, 1.40, 1.41)
    assert list(at_best_rate(rows)) == [0, 1, 2]
    assert [one["bits_per_byte"] for one in at_best_rate(rows, 4e-3).values()] == [1.41]


def test_the_rate_that_a_study_chose_stays_the_best():
    """Seed 1 failed at 4e-3, which is the better rate by seed 0 alone."""
    losses = {(1e-3, 0): 1.43, (1e-3, 1): 1.43, (2e-3, 0): 1.42, (2e-3, 1): 1.42, (4e-3, 0): 1.40}
    rows = [row(rate=rate, seed=seed, bits=bits) for (rate, seed), bits in losses.items()]
    assert best_rate(rows) == 4e-3
    rows = [one | ({"best": True} if one["peak_lr"] == 2e-3 else {"best": False}) for one in rows]
    assert best_rate(rows) == rate_fit(rows).best == 2e-3 and list(at_best_rate(rows)) == [0, 1]
    with pytest.raises(
        ValueError, match=r"best of label='mqa' is true at rates 0\.001, 0\.002; it must be at one"
    ):
        best_rate([one | {"best": one["peak_lr"] < 3e-3} for one in rows])


def test_a_diverged_rate_is_never_best_and_not_fitted():
    rows = [row(rate=rate, bits=bits) for rate, bits in zip((*RATES, 8e-3), (1.42, 1.40, 1.39, None))]
    fit = rate_fit(rows)
    assert fit.losses[-1] == math.inf and fit.best == 4e-3
    assert fit.optimum == pytest.approx(2e-3 * 2 ** (0.015 / 0.01))  # within what was measured
    assert not fit.at_end
    with pytest.raises(ValueError, match="3 rates"):
        rate_fit(rows[1:])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(), row(rate=2e-3)], "label='mqa' has finite losses at 0.001, 0.002: a fit needs 3 rates"),
        ([row(), row(matching="fixed")], r"mqa \(fixed\), mqa \(params\) must be of one label and matching"),
        ([], "none must be of one label"),
        ([row(), row()], "mqa at peak_lr=0.001, seed=0 is there twice"),
        ([row(), row(rate=2e-3, seed=1)], "a seed that was run at every rate"),
    ],
)
def test_rows_that_cannot_be_fitted(rows, message):
    with pytest.raises(ValueError, match=message):
        rate_fit(rows)


def test_differences_are_taken_by_seed_as_scipy_does():
    rng = np.random.default_rng(0)
    luck = rng.normal(0, 0.05, 5)
    ours, theirs = 1.43 + luck + rng.normal(0, 0.004, 5), 1.42 + luck + rng.normal(0, 0.004, 5)
    rows = [row(seed=s, bits=b, perplexity=50 * b) for s, b in enumerate(ours)]
    rows += [row("mha", seed=s, bits=b, perplexity=50 * b) for s, b in reversed(list(enumerate(theirs)))]
    rows += [row("mha", seed=9, bits=9.0)]
    found, test = paired(rows, "mqa", "mha"), stats.ttest_rel(ours, theirs)
    assert found.seeds == (0, 1, 2, 3, 4)
    np.testing.assert_allclose(found.differences, ours - theirs)
    assert found.p_value == pytest.approx(test.pvalue)
    np.testing.assert_allclose(found.interval, test.confidence_interval(0.95))
    # Unpaired, the seeds' luck would hide it.
    assert verdict(found) == "worse" and stats.ttest_ind(ours, theirs).pvalue > 0.3
    assert paired(rows, "mqa", "mha", "perplexity").mean == pytest.approx(50 * found.mean)


def test_each_variant_at_its_own_best_rate_or_at_the_given_one():
    rows = [row(rate=rate, bits=bits) for rate, bits in zip(RATES, (1.45, 1.44, 1.43))]
    rows += [row("mha", rate=rate, bits=bits) for rate, bits in zip(RATES, (1.40, 1.41, 1.42))]
    assert paired(rows, "mqa", "mha").mean == pytest.approx(0.03)
    assert paired(rows, "mqa", "mha", rates={"mqa": 2e-3}).mean == pytest.approx(0.04)
    with pytest.raises(
        ValueError, match=r"rate=0\.003 of label='mqa' was not run; choose from 0\.001, 0\.002, 0\.004"
    ):
        paired(rows, "mqa", "mha", rates={"mqa": 3e-3})
    with pytest.raises(ValueError, match="label='mla' is unknown"):
        paired(rows, "mla", "mha")
    with pytest.raises(ValueError, match="seed in common"):
        paired([row(), row("mha", seed=1)], "mqa", "mha")
    with pytest.raises(ValueError, match="perplexity of mqa, seed=0 is null"):
        paired([row(perplexity=None), row("mha")], "mqa", "mha", "perplexity")


def test_one_pair_claims_nothing():
    one = difference("mqa", 5.0)
    assert (one.mean, one.sd, one.interval, one.p_value, one.detectable) == (5.0, None, None, None, None)
    assert verdict(one) == "not resolved"


def test_verdicts():
    assert verdict(difference("mqa", 0.011, 0.010, 0.009)) == "worse"
    assert verdict(difference("mqa", -0.011, -0.010, -0.009)) == "better"
    assert verdict(difference("mqa", -0.011, 0.010, 0.009)) == "not resolved"
    same = difference("mqa", 0.0, 0.0)
    assert verdict(same) == "not resolved" and same.p_value == 1.0
    with pytest.raises(ValueError, match="value='tokens_per_second' is unknown"):
        verdict(Paired("mqa", "mha", "tokens_per_second", (0, 1), (5.0, 5.1)))


@pytest.mark.parametrize("pairs", [2, 3, 5, 30])
def test_a_detectable_difference_is_found_four_times_in_five(pairs):
    """Power by simulation, 40,000 studies: its standard error is 0.002."""
    rng, sd = np.random.default_rng(pairs), 0.7
    draws = rng.normal(detectable(sd, pairs), sd, (40_000, pairs))
    t = draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(pairs))
    assert (np.abs(t) > stats.t.ppf(0.975, pairs - 1)).mean() == pytest.approx(0.8, abs=0.008)


def test_detectable_differences_need_spread():
    """For many pairs (1.960 + 0.842) sd / sqrt(n), the normal's."""
    assert detectable(2.0, 10_000) == pytest.approx(2.802 * 2 / 100, rel=1e-3)
    assert difference("mqa", 1.0, 2.0, 3.0).detectable == pytest.approx(detectable(1.0, 3))
    with pytest.raises(ValueError, match="pairs=1 must be at least 2"):
        detectable(1.0, 1)


def test_holm_of_the_textbook():
    """p = 0.01, 0.04, 0.03, 0.005 become 0.03, 0.06, 0.06, 0.02."""
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([None, 0.02]) == [None, 0.04] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_ranks_are_ranges_that_intervals_allow():
    """gqa4 is told from neither mha nor gqa2, though these are told apart."""
    comparisons = [
        difference("mqa", 0.081, 0.079, 0.080),
        difference("gqa4", 0.001, 0.012, -0.006),
        difference("gqa2", 0.009, 0.0101, 0.011),
    ]
    ranks = {one.label: one for one in ranking(comparisons)}
    assert list(ranks) == ["mha", "gqa4", "gqa2", "mqa"]
    assert {label: one.ranks for label, one in ranks.items()} == {
        "mha": (1, 2),
        "gqa4": (1, 3),
        "gqa2": (2, 3),
        "mqa": (4, 4),
    }
    assert ranks["gqa4"].alike == ("mha", "gqa2") and ranks["mha"].alike == ("gqa4",)
    assert (ranks["mha"].verdict, ranks["gqa4"].verdict, ranks["gqa2"].verdict) == (None, "not resolved", "worse")


def test_a_correction_for_many_comparisons_may_take_a_verdict_back():
    """Of three comparisons the smallest p must be below 0.05 / 3."""
    tight, nearly = difference("gqa4", 0.18, 0.23, 0.28), difference("gqa4", 0.155, 0.23, 0.305)
    p = lambda one: stats.ttest_1samp(one.differences, 0).pvalue
    assert p(tight) < 0.05 / 3 < p(nearly) < 0.05
    others = [difference("a", 1.0, -1.0, 0.1), difference("b", 1.0, -1.0, -0.1)]
    by = lambda one: {r.label: (r.verdict, r.verdict_holm) for r in ranking([one, *others])}["gqa4"]
    assert by(nearly) == ("worse", "not resolved") and by(tight) == ("worse", "worse")


def test_pairs_without_common_seeds_are_not_told_apart():
    far = [difference("a", 1.0, 1.01, seeds=(0, 1)), difference("b", 5.0, 5.01, seeds=(2, 3))]
    assert {one.label: one.ranks for one in ranking(far)} == {"mha": (1, 1), "a": (2, 3), "b": (2, 3)}
    with pytest.raises(ValueError, match="must differ"):
        ranking([far[0], far[0]])
    with pytest.raises(ValueError, match="one reference"):
        ranking([far[0], difference("b", 1.0, reference="mla")])
