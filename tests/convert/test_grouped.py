"""Fewer kv heads by pooling, more by repetition.

D width, N query heads, K kv heads, H head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.convert import to_grouped

MODELS = ("mha", "gqa_norm_bias")
KV = ("k_DKH", "v_DKH", "k_bias_KH", "v_bias_KH")


def layer(split, i=0):
    return nnx.merge(*split).layers[i].attention


def array(attention, name):
    return np.asarray(getattr(attention, name)[...], np.float64)


def to(split, num_kv_heads, method, **options):
    config = dataclasses.replace(layer(split).config, num_kv_heads=num_kv_heads)
    return to_grouped(*split, config, method, **options)


@pytest.fixture(scope="module")
def of(model_of):
    """Function to get a model's split by its name."""
    return lambda name: (model_of(name).graphdef, model_of(name).params)


def edited(split, edit):
    """The same decoder, `edit` applied to every layer's attention."""
    model = nnx.merge(*split)
    for block in model.layers:
        edit(block.attention)
    return nnx.split(model)


def with_equal_heads(split, group):
    """Every kv head of a group as its first one."""

    def edit(attention):
        for name in KV:
            if hasattr(attention, name):
                a = array(attention, name)
                a = np.repeat(a[..., ::group, :], group, axis=-2)
                setattr(attention, name, nnx.Param(jnp.asarray(a, jnp.float32)))

    return edited(split, edit)


def test_pooling_by_hand(of):
    """Two groups of three heads of 6, layer by layer, with a draw for every group."""
    split = of("mha")
    drawn = [np.random.default_rng((1, i)).integers(3, size=2) for i in (0, 1)]
    assert drawn[0].tolist() != drawn[1].tolist()
    for i in (0, 1):
        for name in ("k_DKH", "v_DKH"):
            a = array(layer(split, i), name)
            want = {
                "mean": np.stack([a[:, :3].sum(1) / 3, a[:, 3:].sum(1) / 3], axis=1),
                "first": np.stack([a[:, 0], a[:, 3]], axis=1),
                "random": np.stack([a[:, drawn[i][0]], a[:, 3 + drawn[i][1]]], axis=1),
            }
            for method, expected in want.items():
                made = layer(to(split, 2, method, seed=1), i)
                np.testing.assert_allclose(array(made, name), expected, rtol=0, atol=1e-7)
                for kept in ("q_DNH", "o_NHD"):
                    np.testing.assert_array_equal(array(made, kept), array(layer(split, i), kept))


@pytest.mark.parametrize("name", MODELS)
def test_the_mean_is_exact_only_for_equal_heads(name, of, unlike):
    """Biases and norms of queries and keys among them."""
    split = of(name)
    group = layer(split).config.num_kv_heads
    equal = with_equal_heads(split, group)
    assert unlike(to(equal, 1, "mean"), equal) < 2e-5
    assert unlike(to(split, 1, "mean"), split) > 1e-2


@pytest.mark.parametrize("name", ["gqa3", "gqa_norm_bias"])
def test_repeated_heads_change_nothing_and_pool_to_what_they_were(name, of, unlike):
    split = of(name)
    mha = to(split, 6, "repeat")
    assert layer(mha).k_DKH.shape == (23, 6, 10)
    assert unlike(mha, split) < 2e-5
    for method in ("mean", "first", "random"):
        again = to(mha, 2, method)
        jax.tree.map(np.testing.assert_array_equal, again[1], split[1])
        assert again[0] == split[0]


@pytest.mark.parametrize("name", ["mha", "gqa2"])
def test_similar_heads_are_found_and_moved_for_nothing(name, of, unlike):
    """Of heads a, b, a, b, ... (a, b, c, a, b, c for gqa2's three), the like ones are pooled: exact."""
    split = of(name)
    K = layer(split).config.num_kv_heads
    order = [0, 1, 0, 1, 0, 1] if K == 6 else [0, 1, 0]

    def interleave(attention):
        for name in ("k_DKH", "v_DKH"):
            setattr(attention, name, nnx.Param(getattr(attention, name)[...][:, np.array(order)]))

    split = edited(split, interleave)
    if K == 6:
        assert unlike(to(split, 2, "mean", similar=True), split) < 2e-5
        assert unlike(to(split, 2, "mean"), split) > 1e-2
    else:  # in groups of one: the order alone
        moved = to(split, 3, "first", similar=True)
        assert unlike(moved, split) < 2e-5
        want = array(layer(split), "q_DNH").reshape(23, 3, 2, 10)
        np.testing.assert_array_equal(array(layer(moved), "q_DNH").reshape(23, 3, 2, 10), want)


def test_groups_of_similar_heads_by_hand():
    from kvjax.convert.grouped import _by_similarity, _reordered

    e = np.eye(4)
    heads = np.stack([e[0], e[1], e[0] + 0.1 * e[2], e[1] - 0.1 * e[3]])[None]  # [D=1, K=4, H=4]
    weights = {"k_DKH": heads, "v_DKH": 5 * heads}
    assert _by_similarity(weights, 2) == [0, 2, 1, 3]
    moved = _reordered({**weights, "o_NHD": np.arange(8.0)[:, None, None]}, [0, 2, 1, 3])
    assert moved["o_NHD"].ravel().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    np.testing.assert_array_equal(moved["k_DKH"], heads[:, [0, 2, 1, 3]])


@pytest.mark.parametrize(
    ("num_kv_heads", "method", "options", "message"),
    [
        (2, "average", {}, "method='average' must be one of mean, first, random to make 2 of 3 kv heads"),
        (6, "mean", {}, "method='mean' must be one of repeat to make 6 of 3 kv heads"),
        (6, "repeat", {"similar": True}, "similar=True goes with fewer kv heads"),
        (2, "mean", {}, r"attention.num_kv_heads=2 must divide the source's 3, or be a multiple of it: 1"),
    ],
)
def test_what_cannot_be_pooled(num_kv_heads, method, options, message, of):
    if method == "average":
        num_kv_heads, message = 1, message.replace("make 2", "make 1")
    with pytest.raises(ValueError, match=message):
        to(of("gqa2"), num_kv_heads, method, **options)


def test_other_fields_stay(of):
    split = of("gqa3")
    config = dataclasses.replace(layer(split).config, num_kv_heads=1, rope_theta=7.0)
    with pytest.raises(ValueError, match=r"attention.rope_theta=7.0 must be 101.0, as in the source"):
        to_grouped(*split, config, "mean")
