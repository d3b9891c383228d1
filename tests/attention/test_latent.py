"""Multi-head latent attention: scale, layouts, absorption, and DeepSeek's published cache sizes.

B batch, T tokens, S slots.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.attention.latent import Latent
from kvjax.codecs import Exact
from kvjax.decoder import Decoder, DecoderConfig

SMALL = {"num_heads": 6, "rank": 13, "rope_dim": 4, "nope_dim": 3, "value_dim": 5}


def run(module, quick_jit):
    x_BTD = np.random.default_rng(0).standard_normal((2, 11, 23)).astype(np.float32)
    forward = quick_jit(lambda *inputs: module(*inputs)[0])  # a new function: `module` may have changed
    return x_BTD, forward(x_BTD, np.tile(np.arange(11, dtype=np.int32), (2, 1)))


def copied(module):
    return nnx.merge(*nnx.split(module))


def test_the_scale_is_that_of_expanded_heads(build, oracle, error, quick_jit):
    """(nope + rope)^-0.5. The width that absorbed queries have, rank + rope, is wrong; position 0 hides it."""
    module = copied(build(Latent(**SMALL)))
    x_BTD, y_BTD = run(module, quick_jit)
    expected = oracle(module, x_BTD)
    assert error(y_BTD, expected) < 5e-6
    module.scale = (13 + 4) ** -0.5
    wrong_BTD = run(module, quick_jit)[1]
    assert error(wrong_BTD[:, :1], expected[:, :1]) < 5e-6
    assert error(wrong_BTD[:, 1:], expected[:, 1:]) > 0.1


def test_layouts_are_equal_up_to_a_permutation_of_the_rotary_columns(build, error, quick_jit):
    interleaved, half = build(Latent(**SMALL, rope_interleaved=True)), copied(build(Latent(**SMALL)))
    order = np.array([0, 2, 1, 3])
    q_DNE, kv_DC = np.array(interleaved.q_DNE[...]), np.array(interleaved.kv_down_DC[...])
    _, expected = run(interleaved, quick_jit)
    q_DNE[..., 3:] = q_DNE[..., 3:][..., order]
    half.q_DNE[...] = jnp.asarray(q_DNE)
    assert error(run(half, quick_jit)[1], expected) > 0.05  # queries alone
    kv_DC[:, 13:] = kv_DC[:, 13:][:, order]
    half.kv_down_DC[...] = jnp.asarray(kv_DC)
    assert error(run(half, quick_jit)[1], expected) < 5e-6


@pytest.mark.parametrize("name", ["mla", "mla_query_rank"])
def test_a_step_rebuilds_no_head(name, model_of, largest_array):
    """256 slots: latents of 13 are larger than anything else; keys of 6 heads would be 18 a slot."""
    model = model_of(name)
    tokens, positions = np.zeros((2, 3, 1), np.int32)
    assert largest_array(model.step, model.params, tokens, positions, model.empty(3, 256, None)) == 3 * 256 * 13


def test_expanded_reading_starts_where_it_takes_fewer_operations(build, quick_jit):
    """By XLA's own count, over enough slots that the queries' part does not matter."""
    module, slots, shape = build(Latent(**SMALL)), 1024, jax.ShapeDtypeStruct
    memory = {"latent": shape((1, slots, 13), jnp.float32), "k_rope": shape((1, slots, 4), jnp.float32)}

    def operations(read, num_tokens):
        arrays = shape((1, num_tokens, 23), jnp.float32), shape((1, num_tokens), jnp.int32), memory
        return quick_jit(read).lower(*arrays).cost_analysis()["flops"]

    def expanded(x, positions, memory):
        q, k, v = module.expand(module.project(x, positions)[0], memory, positions)
        return jnp.einsum("BKGTS,BKSV->BKGTV", jnp.einsum("BKGTH,BKSH->BKGTS", q, k), v)

    def absorbed(x, positions, memory):
        return module.mix(module.score(module.absorb(module.project(x, positions)[0]), memory, positions), memory)

    saved = lambda num_tokens: operations(absorbed, num_tokens) - operations(expanded, num_tokens)
    assert saved(module.expand_from - 1) < 0 <= saved(module.expand_from)


@pytest.mark.parametrize(
    ("width", "depth", "num_heads", "query_rank", "elements"),
    [
        (2048, 27, 16, None, 15_552),  # V2-Lite: "15.6K", DeepSeek-V2 (arXiv 2405.04434), table 9
        (5120, 60, 128, 1536, 34_560),  # V2: "34.6K", the same table
        (7168, 61, 128, 1536, 35_136),  # V3
    ],
    ids=["v2-lite", "v2", "v3"],
)
def test_deepseek_caches_have_their_published_size(width, depth, num_heads, query_rank, elements):
    """From the shapes of what the full-size layers leave behind; no weight is made."""
    attention = Latent(num_heads, 512, 64, 128, 128, query_rank)
    config = DecoderConfig(width=width, depth=depth, mlp_width=1)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, attention, 1, jax.random.key(0))))
    x_BTD, positions_BT = jnp.zeros((1, 1, width)), jnp.zeros((1, 1), jnp.int32)
    project = lambda params: nnx.merge(graphdef, params).layers[-1].attention.project(x_BTD, positions_BT)
    _, entry = jax.eval_shape(project, params)
    assert {name: leaf.shape for name, leaf in entry.items()} == {"latent": (1, 1, 512), "k_rope": (1, 1, 64)}
    cache = jax.eval_shape(lambda params: nnx.merge(graphdef, params).init_cache(1, 3, Exact()), params)
    assert cache.bytes_per_token() == 4 * elements
    assert attention.elements_per_token() * depth == elements


def test_parameters_of_deepseek_v2_lite():
    """q_proj, kv_a_proj_with_mqa, kv_b_proj, o_proj and kv_a_layernorm, as published."""
    attention = Latent(16, 512, 64, 128, 128)
    params = nnx.split(nnx.eval_shape(lambda: attention.build(2048, 1.0, jax.random.key(0))))[1]
    counted = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert counted == 2048 * 3072 + 2048 * 576 + 512 * 4096 + 2048 * 2048 + 512


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"nope_dim": 0}, "nope_dim=0 must be at least 1"),
        ({"value_dim": -1}, "value_dim=-1 must be at least 1"),
        ({"rope_dim": 0}, "rope_dim=0 must be at least 2"),
        ({"rope_dim": 5}, "rope_dim=5 must be even; the nearest are 4 and 6"),
        ({"query_rank": 0}, "query_rank=0 must be at least 1"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be at least 1"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Latent(**fields)
