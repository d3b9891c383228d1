"""MHA, MQA and GQA: which head reads which, and that no head is repeated in memory.

B batch, T tokens, D width, N query heads, K kv heads, H head dim.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax import primer
from kvjax.attention.grouped import Grouped

GQA = Grouped(6, 2, head_dim=10)


def one_head_after_the_other(module, x_TD, kv_head_of) -> np.ndarray:
    """Sum over query heads in float64, each with the kv head that `kv_head_of` names."""
    weights = [np.asarray(a[...], np.float64) for a in (module.q_DNH, module.k_DKH, module.v_DKH, module.o_NHD)]
    q_DNH, k_DKH, v_DKH, o_NHD = weights
    turn = lambda heads_TH: primer.rope(heads_TH, np.arange(len(x_TD)), 10_000.0)
    y_TD = np.zeros_like(x_TD)
    for i in range(q_DNH.shape[1]):
        j = kv_head_of(i)
        logits_TT = turn(x_TD @ q_DNH[:, i]) @ turn(x_TD @ k_DKH[:, j]).T / np.sqrt(10)
        weights_TT = np.tril(np.exp(logits_TT))
        probs_TT = weights_TT / weights_TT.sum(-1, keepdims=True)
        y_TD += probs_TT @ (x_TD @ v_DKH[:, j]) @ o_NHD[i]
    return y_TD


def run(module, x_BTD, quick_jit):
    B, T, _ = x_BTD.shape
    return quick_jit(module)(x_BTD, np.tile(np.arange(T, dtype=np.int32), (B, 1)))[0]


def test_query_head_i_reads_kv_head_i_over_group_size(build, error, quick_jit):
    module, x_TD = build(GQA), np.random.default_rng(0).standard_normal((11, 23)).astype(np.float32)
    y_TD = run(module, x_TD[None], quick_jit)[0]
    expected = lambda kv_head_of: one_head_after_the_other(module, x_TD.astype(np.float64), kv_head_of)
    assert error(y_TD, expected(lambda i: i // 3)) < 5e-6
    assert error(y_TD, expected(lambda i: i % 2)) > 0.5


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3])
def test_multi_head_attention_with_repeated_heads_is_the_same(num_kv_heads, build, error, quick_jit):
    grouped = build(dataclasses.replace(GQA, num_kv_heads=num_kv_heads))
    graphdef, params = nnx.split(build(dataclasses.replace(GQA, num_kv_heads=6)))
    mha = nnx.merge(graphdef, params)
    mha.q_DNH[...], mha.o_NHD[...] = grouped.q_DNH[...], grouped.o_NHD[...]
    mha.k_DKH[...] = jnp.repeat(grouped.k_DKH[...], 6 // num_kv_heads, axis=1)
    mha.v_DKH[...] = jnp.repeat(grouped.v_DKH[...], 6 // num_kv_heads, axis=1)
    x_BTD = np.random.default_rng(0).standard_normal((2, 7, 23)).astype(np.float32)
    assert error(run(grouped, x_BTD, quick_jit), run(mha, x_BTD, quick_jit)) < 2e-6


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_keys_and_values_are_read_in_place(num_tokens, model_of, largest_array, quick_jit):
    """Of 256 slots with 2 heads of 10, no array is as large as it would be with the 6 query heads."""
    model = model_of("gqa3")
    tokens, positions = np.zeros((2, 3, num_tokens), np.int32)
    cache = model.empty(3, 256, None)
    assert largest_array(model.step, model.params, tokens, positions, cache) < 3 * 6 * 256 * 10
    repeat = quick_jit(lambda q, k: jnp.einsum("BNTH,BNSH->BNTS", q, jnp.repeat(k, 3, axis=1)))
    arrays = jnp.zeros((3, 6, num_tokens, 10)), jnp.zeros((3, 2, 256, 10))
    assert largest_array(repeat, *arrays) == 3 * 6 * 256 * 10


@pytest.mark.parametrize(
    ("config", "elements"),
    [
        (Grouped(32, 32, head_dim=128), 8192),  # Llama-2 7B
        (Grouped(32, 8, head_dim=128), 2048),  # Llama-3 8B
        (Grouped(28, 4, head_dim=128, qkv_bias=True), 1024),  # Qwen2.5 7B
        (Grouped(71, 1, head_dim=64), 128),  # Falcon 7B
    ],
)
def test_elements_of_published_shapes(config, elements):
    x_BTD, positions_BT = jnp.zeros((1, 1, 64)), jnp.zeros((1, 1), jnp.int32)
    entry = jax.eval_shape(lambda: config.build(64, 1.0, jax.random.key(0)).project(x_BTD, positions_BT)[1])
    assert config.elements_per_token() == sum(leaf.size for leaf in jax.tree.leaves(entry)) == elements


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_heads": 6, "num_kv_heads": 4},
            "num_heads=6 must be a multiple of num_kv_heads=4; nearest num_kv_heads: 3",
        ),
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"num_kv_heads": 0}, "num_kv_heads=0 must be at least 1"),
        ({"head_dim": 0}, "head_dim=0 must be at least 2"),
        ({"head_dim": 7}, "head_dim=7 must be even; the nearest are 6 and 8"),
        ({"rope_theta": 0.5}, "rope_theta=0.5 must be at least 1"),
        ({"rope_theta": float("nan")}, "rope_theta=nan must be a finite number"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Grouped(**fields)
