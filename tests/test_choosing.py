"""Choosing within a budget, on numbers whose intervals are solved by hand."""

import pytest

from kvjax.choosing import choose

SIZES = {"fp16": 100.0, "int8": 52.0}
# t(0.975; 2 degrees of freedom) / sqrt(3) = 2.4841: differences of standard deviation 0.01 need a mean above 0.0248.
LOSSES = {
    ("mha", "int8"): (1.00, 1.10, 1.20),
    ("gqa", "int8"): (1.01, 1.12, 1.23),  # 0.01, 0.02, 0.03 above mha's: mean 0.02, not resolved
    ("mqa", "int8"): (1.02, 1.13, 1.24),  # 0.02, 0.03, 0.04: mean 0.03, resolved; 0.01 above gqa's, exactly
    ("mha", "fp16"): (0.99, 1.09, 1.19),
}


def rows(**changes):
    return [
        {"label": label, "matching": "params", "seed": seed, "codec": codec, "bits_per_byte": loss}
        | {"cache_bytes": {"per_token": SIZES[codec]}}
        | changes
        for (label, codec), losses in LOSSES.items()
        for seed, loss in enumerate(losses)
    ]


def test_ranks_are_those_that_intervals_resolve():
    first, second, third = choose(rows(), 52)
    assert [c.name for c in (first, second, third)] == ["mha int8", "gqa int8", "mqa int8"]
    # gqa and mqa differ by 0.01 at every seed, so that their interval has no width.
    assert (first.ranks, second.ranks, third.ranks) == ((1, 2), (1, 2), (3, 3))
    assert (first.alike, second.alike, third.alike) == (("gqa int8",), ("mha int8",), ())
    assert first.bits_per_byte == pytest.approx(1.1, abs=1e-12)
    # Between seeds the spread is ten times that of differences.
    assert first.interval == pytest.approx((1.1 - 0.24841, 1.1 + 0.24841), abs=1e-5)
    assert (first.bytes_per_token, first.seeds) == (52.0, (0, 1, 2))


def test_more_bytes_bring_what_they_pay_for():
    assert choose(rows(), 100)[0].name == "mha fp16"
    assert "mha fp16" not in [c.name for c in choose(rows(), 99.9)]


def test_one_seed_ranks_nothing():
    single = [row for row in rows() if row["seed"] == 1]
    assert {(c.ranks, c.interval, len(c.alike)) for c in choose(single, 52)} == {((1, 3), None, 2)}
    alone = [row for row in rows() if row["label"] == "gqa"]
    assert [(c.ranks, c.alike) for c in choose(alone, 52)] == [((1, 1), ())]


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"^bytes_per_token_budget=51 must be at least 52, which is mha int8$"):
        choose(rows(), 51)
    with pytest.raises(ValueError, match=r"^bytes_per_token_budget=nan must be a finite number above 0$"):
        choose(rows(), float("nan"))
    with pytest.raises(ValueError, match=r"^rows must be of one matching, not of fixed, params$"):
        choose(rows() + rows(matching="fixed"), 52)
    with pytest.raises(ValueError, match=r"^rows must be of one matching, not of none$"):
        choose([], 52)
    with pytest.raises(ValueError, match=r"^mha int8, seed=0 is there twice$"):
        choose(rows() + rows()[:1], 52)
    with pytest.raises(ValueError, match=r"^mha int8, seed=0 has no finite loss$"):
        choose(rows(bits_per_byte=None), 52)
    other = [row | {"seed": 9} if row["label"] == "gqa" else row for row in rows() if row["seed"] == 0]
    with pytest.raises(ValueError, match=r"^gqa int8 must share a seed with mha int8$"):
        choose(other, 52)
