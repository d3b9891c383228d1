"""Low-rank keys and values: errors against singular values in float64 NumPy, and whole models.

D width, K kv heads, H head dim, F features, R rank.
"""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from kvjax.attention.low_rank import LowRank
from kvjax.convert import input_moments, target, to_low_rank
from kvjax.convert.low_rank import factor, factor_pair, root_of
from kvjax.data import Corpus

RNG = np.random.default_rng(2)
W_DF = RNG.standard_normal((11, 17)) @ np.diag(np.geomspace(9.0, 0.1, 17))
X_TD = RNG.standard_normal((101, 11)) @ RNG.standard_normal((11, 11)) * np.geomspace(5.0, 0.2, 11)


def squared(a):
    return float(np.square(a).sum())


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_plain_error_is_the_tail_of_singular_values(rank):
    down, up, _ = factor(W_DF, rank)
    tail = squared(np.linalg.svd(W_DF, compute_uv=False)[rank:])
    assert abs(squared(W_DF - down @ up) - tail) < 1e-10 * squared(W_DF)
    np.testing.assert_allclose(np.linalg.norm(down, axis=0), np.linalg.norm(up, axis=1))


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_whitened_error_of_data_is_the_tail_of_the_results(rank):
    """Of X W itself, and less than that of plain SVD, which is the better one for W."""
    down, up, _ = factor(W_DF, rank, np.linalg.cholesky(X_TD.T @ X_TD))
    tail = squared(np.linalg.svd(X_TD @ W_DF, compute_uv=False)[rank:])
    error = squared(X_TD @ (W_DF - down @ up))
    assert abs(error - tail) < 1e-9 * squared(X_TD @ W_DF)
    plain_down, plain_up, _ = factor(W_DF, rank)
    assert error < 0.9 * squared(X_TD @ (W_DF - plain_down @ plain_up))
    assert squared(W_DF - down @ up) > 1.01 * squared(W_DF - plain_down @ plain_up)


def test_of_a_text_in_few_directions_the_rest_is_by_weight():
    """3 of 11 directions: their results are exact from rank 3 on, and all of W from its rank on."""
    x_TD = X_TD.copy()
    x_TD[:, 3:] = 0.0
    root = root_of(x_TD.T @ x_TD / len(x_TD))
    down, up, _ = factor(W_DF, 3, root)
    assert squared(x_TD @ (W_DF - down @ up)) < 1e-4 * squared(x_TD @ W_DF)
    down, up, _ = factor(W_DF, 11, root)
    np.testing.assert_allclose(down @ up, W_DF, atol=1e-10)


def test_balanced_keys_do_not_take_the_latent():
    """Keys ten times as large: in balance, the latent is that of equally large ones."""
    k_DF, v_DF = (RNG.standard_normal((11, 6)) for _ in "kv")
    k_DF *= np.linalg.norm(v_DF) / np.linalg.norm(k_DF)
    want = factor_pair(k_DF, v_DF, 5, None, False)
    down, up_k, up_v = factor_pair(10 * k_DF, v_DF, 5, None, True)
    np.testing.assert_allclose(down @ up_v, want[0] @ want[2], atol=1e-12)
    np.testing.assert_allclose(down @ up_k, 10 * want[0] @ want[1], atol=1e-11)
    down, _, up_v = factor_pair(10 * k_DF, v_DF, 5, None, False)
    assert squared(v_DF - down @ up_v) > 1.5 * squared(v_DF - want[0] @ want[2])


@pytest.fixture(scope="module")
def text():
    """Thirteen windows of ten predicted tokens."""
    ids = RNG.integers(29, size=132).astype(np.int32)
    return Corpus(ids, np.array([0, 61, 132], np.int64), np.array([60, 70], np.int64))


@pytest.fixture(scope="module")
def moments(model_of, text):
    """Of the inputs of gqa3."""
    return input_moments(model_of("gqa3").graphdef, model_of("gqa3").params, text, 10, 130, 4)


def low_rank(config, **fields):
    return dataclasses.replace(target(config, LowRank(6)), **fields)


def test_moments_of_the_inputs(model_of, text, moments, quick_jit):
    """As from what the layers' norms make of all windows at once, in float64; of either one device or two."""
    decoder = nnx.merge(model_of("gqa3").graphdef, model_of("gqa3").params)
    ids = np.stack([text.ids[start : start + 10] for start in (*range(0, 60, 10), *range(61, 131, 10))])
    positions = np.tile(np.arange(10, dtype=np.int32), (13, 1))

    @quick_jit
    def inputs(x_BTD):
        for block in decoder.layers:
            yielded.append(block.attention_norm(x_BTD))
            x_BTD, _ = block(x_BTD, positions)
        return tuple(yielded)

    yielded = []
    for got, rows in zip(moments, inputs(decoder.embedding_VD[...][ids]), strict=True):
        rows = np.asarray(rows, np.float64).reshape(130, 23)
        np.testing.assert_allclose(got, rows.T @ rows / 130, atol=2e-6 * np.abs(got).max())


def test_at_full_rank_nothing_changes(model_of, moments, unlike):
    """23 of [W_K|W_V], the width; of GQA's 20 columns each, all; with or without a text."""
    model = model_of("gqa3")
    split = model.graphdef, model.params
    joint = low_rank(model.attention, rank=23)
    apart = low_rank(model.attention, rank=None, rank_k=20, rank_v=20)
    for given in (None, moments):
        assert unlike(to_low_rank(*split, joint, given, balance=True), split) < 2e-5
        assert unlike(to_low_rank(*split, apart, given), split) < 2e-5
    smaller = low_rank(model.attention, rank=22)
    assert unlike(to_low_rank(*split, smaller), split) > 1e-3


def test_each_layer_of_a_model_is_fitted(model_of, moments):
    """Rank 9 of GQA's joint 40: [W_K|W_V] of each layer are off by the tails of its own singular values."""
    model = model_of("gqa3")
    split = model.graphdef, model.params
    for given in (None, moments):
        made = nnx.merge(*to_low_rank(*split, low_rank(model.attention, rank=9), given))
        for i, (old, new) in enumerate(zip(nnx.merge(*split).layers, made.layers)):
            w_DF = np.concatenate(
                [
                    np.asarray(old.attention.k_DKH[...], np.float64),
                    np.asarray(old.attention.v_DKH[...], np.float64),
                ],
                axis=1,
            ).reshape(23, -1)
            up_RKH = [
                np.asarray(a[...], np.float64)[:, ::3] for a in (new.attention.up_k_RNH, new.attention.up_v_RNH)
            ]
            up_RF = np.concatenate(up_RKH, axis=1).reshape(9, -1)
            root = np.eye(23) if given is None else root_of(moments[i])
            tail = squared(np.linalg.svd(root.T @ w_DF, compute_uv=False)[9:])
            error = squared(root.T @ (w_DF - np.asarray(new.attention.down_DR[...], np.float64) @ up_RF))
            assert abs(error - tail) < 1e-5 * tail


@pytest.mark.parametrize(
    ("source", "fields", "options", "message"),
    [
        (
            "gqa3",
            {"rank": 24},
            {},
            "attention.rank=24 must be at least 1 and at most 23, the rank of the projections",
        ),
        (
            "gqa3",
            {"rank": None, "rank_k": 21, "rank_v": 9},
            {},
            "attention.rank_k=21 must be at least 1 and at most 20",
        ),
        (
            "gqa3",
            {"position": "none"},
            {},
            "attention.position='none' must be 'rope': the source's keys are rotated",
        ),
        (
            "gqa3",
            {"rank": None, "rank_k": 5, "rank_v": 5},
            {"balance": True},
            "balance=True goes with a joint latent",
        ),
        ("gqa3", {"head_dim": 8}, {}, "attention.head_dim=8 must be 10, as in the source"),
        ("gqa3", {"window": 5}, {}, "attention.window=5 must be None, as in the source"),
        ("gqa_norm_bias", {}, {}, "the source's attention.qk_norm=True has no place in LowRank"),
        ("mla", {}, {}, "attention=Latent cannot be converted; only Grouped"),
    ],
)
def test_what_cannot_be_converted(source, fields, options, message, model_of):
    model = model_of(source)
    base = LowRank(6, head_dim=10, rank=9) if source == "mla" else low_rank(model.attention, rank=9)
    with pytest.raises(ValueError, match=message):
        to_low_rank(model.graphdef, model.params, dataclasses.replace(base, **fields), **options)
