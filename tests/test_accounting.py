import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from kvjax import accounting
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.codecs import Exact
from kvjax.config import Config
from kvjax.decoder import DecoderConfig
from kvjax.slots import nbytes

d, h, V = 23, 6, 37  # width, query heads, vocabulary
# Parameters, cached elements of a token, and FLOPs of a query and slot, for one layer, as papers count them.
LAYERS = {
    "mha": (Grouped(h, h, head_dim=10), 4 * d * h * 10, 2 * h * 10, 4 * h * 10),
    "gqa": (Grouped(h, 2, head_dim=10), 2 * d * 10 * (h + 2), 2 * 2 * 10, 4 * h * 10),
    "mqa": (Grouped(h, 1, head_dim=10), 2 * d * 10 * (h + 1), 2 * 10, 4 * h * 10),
    "gqa_norm_bias": (
        Grouped(h, 2, head_dim=10, qk_norm=True, qkv_bias=True),
        2 * d * 10 * (h + 2) + 10 * (h + 2 + 2) + 2 * 10,
        2 * 2 * 10,
        4 * h * 10,
    ),
    "low_rank": (LowRank(h, head_dim=4, rank=11), 2 * d * h * 4 + d * 11 + 2 * 11 * h * 4, 11, 4 * h * 4),
    "low_rank_split": (
        LowRank(h, head_dim=4, rank=None, rank_k=7, rank_v=13, position="none"),
        2 * d * h * 4 + (d + h * 4) * (7 + 13),
        7 + 13,
        4 * h * 4,
    ),
    "mla": (
        Latent(h, rank=13, rope_dim=4, nope_dim=3, value_dim=5),
        d * h * (3 + 4) + d * (13 + 4) + 13 * h * (3 + 5) + h * 5 * d + 13,
        13 + 4,
        2 * h * (3 + 4 + 5),
    ),
    "mla_query_rank": (
        Latent(h, rank=13, rope_dim=4, nope_dim=3, value_dim=5, query_rank=9),
        d * 9 + 9 * h * (3 + 4) + 9 + d * (13 + 4) + 13 * h * (3 + 5) + h * 5 * d + 13,
        13 + 4,
        2 * h * (3 + 4 + 5),
    ),
}
named = pytest.mark.parametrize("name", LAYERS)


def config_of(name: str, **decoder) -> Config:
    return Config(LAYERS[name][0], DecoderConfig(width=d, depth=3, mlp_width=31, **decoder))


@named
def test_parameters_of_a_layer(name):
    attention, parameters, _, _ = LAYERS[name]
    module = nnx.eval_shape(lambda: attention.build(d, 1.0, jax.random.key(0)))
    assert accounting.num_parameters(nnx.split(module)[1]) == parameters


@named
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scan", [True, False])
def test_parameters_of_a_model(name, tied, scan):
    config = config_of(name, tie_embeddings=tied, scan=scan)
    total = (1 if tied else 2) * V * d + 3 * (LAYERS[name][1] + 3 * d * 31 + 2 * d) + d
    assert accounting.num_parameters(accounting.abstract_params(config, V)) == total


@named
@pytest.mark.parametrize("itemsize", [2, 4])
def test_declared_bytes_are_those_of_the_arrays(name, itemsize):
    dtype = jnp.dtype({2: "bfloat16", 4: "float32"}[itemsize])
    declared = accounting.declared_bytes_per_token(config_of(name), itemsize)
    assert declared == 3 * LAYERS[name][2] * itemsize
    cache = accounting.abstract_cache(config_of(name), V, 5, 17, dtype)
    assert nbytes(cache.memory) == 5 * 17 * declared and cache.bytes_per_token() == declared
    model = config_of(name).build(V)
    graphdef, params = nnx.split(model)
    made = nnx.merge(graphdef, jax.tree.map(lambda a: a.astype(dtype), params)).init_cache(5, 17, Exact())
    assert sum(a.nbytes for a in jax.tree.leaves(made.memory)) == 5 * 17 * declared


@named
def test_flops_by_hand(name):
    """2 a weight that multiplies, embedding once, and (context + 1) / 2 slots; three times that in training."""
    attention, _, _, per_slot = LAYERS[name]
    assert attention.flops_per_slot() == per_slot
    weights = V * d + 3 * (LAYERS[name][1] + 3 * d * 31 + 2 * d) + d
    forward = 2 * weights + 3 * per_slot * 9
    for tied in (True, False):
        config = config_of(name, tie_embeddings=tied)
        assert accounting.flops_per_token(config, V, 17, training=False) == forward
        assert accounting.flops_per_token(config, V, 17, training=True) == 3 * forward


@pytest.mark.parametrize("name", ["gqa", "low_rank", "mla"])
def test_flops_are_those_that_the_compiler_counts(name):
    """Of the model's own products, one token after another: gains, norms and softmax are on top."""
    config = dataclasses.replace(
        config_of(name), decoder=DecoderConfig(width=96, depth=1, mlp_width=192), attention=LAYERS[name][0]
    )
    graphdef, params = nnx.split(config.build(257))
    tokens_BT = jnp.zeros((1, 33), jnp.int32)

    def forward(params, tokens_BT):
        model = nnx.merge(graphdef, params)
        x_BTD = model.embedding_VD[...][tokens_BT]
        positions_BT = jnp.arange(33, dtype=jnp.int32)[None]
        block = model.layers[0]
        queries, entry = block.attention.project(block.attention_norm(x_BTD), positions_BT)
        q_BKGTH, k_BKSH, v_BKSV = block.attention.expand(queries, entry, positions_BT)
        logits_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH)
        o_BKGTV = jnp.einsum("BKGTS,BKSV->BKGTV", jax.nn.softmax(logits_BKGTS), v_BKSV)
        B, K, G, T, W = o_BKGTV.shape
        x_BTD = x_BTD + block.attention.merge(o_BKGTV.reshape(B, K * G, T, W))
        return model.logits(model.norm(x_BTD + block.mlp(block.mlp_norm(x_BTD))))

    counted = jax.jit(forward).lower(params, tokens_BT).compile().cost_analysis()["flops"]
    # Unmasked: each of the 33 tokens meets 33 slots, as it would on average in a context of 65.
    predicted = 33 * accounting.flops_per_token(config, 257, 65, training=False)
    assert predicted == pytest.approx(counted, rel=0.05)


def test_peak_of_matrix_products():
    assert accounting.matmul_peak(jnp.dtype("float32"), size=64, runs=3) > 0
