import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from kvjax import accounting
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.codecs import Exact, Storage
from kvjax.codecs.integers import Int
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
    assert accounting.count_parameters(config, V) == total


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


# By hand, of one layer: FLOPs a slot, absorbed and expanded, and those of own weights that the form leaves out.
# Low rank with positions rebuilds its keys in either form, and takes values in their latent if absorbed.
DECODING = {
    "mha": ((4 * h * 10, 0), (4 * h * 10, 0)),
    "gqa": ((4 * h * 10, 0), (4 * h * 10, 0)),
    "mqa": ((4 * h * 10, 0), (4 * h * 10, 0)),
    "gqa_norm_bias": ((4 * h * 10, 0), (4 * h * 10, 0)),
    "low_rank": (
        (2 * h * 4 + 2 * h * 11 + 2 * 11 * h * 4, 2 * 11 * h * 4),
        (4 * h * 4 + 4 * 11 * h * 4, 4 * 11 * h * 4),
    ),
    "low_rank_split": ((2 * h * (7 + 13), 0), (4 * h * 4 + 2 * (7 + 13) * h * 4, 2 * (7 + 13) * h * 4)),
    "mla": ((2 * h * (2 * 13 + 4), 0), (2 * h * (3 + 4 + 5) + 2 * 13 * h * (3 + 5), 2 * 13 * h * (3 + 5))),
    "mla_query_rank": (
        (2 * h * (2 * 13 + 4), 0),
        (2 * h * (3 + 4 + 5) + 2 * 13 * h * (3 + 5), 2 * 13 * h * (3 + 5)),
    ),
}


@named
@pytest.mark.parametrize("absorbed", [True, False])
def test_decode_flops_by_hand(name, absorbed):
    per_slot, left_out = DECODING[name][not absorbed]
    weights = V * d + 3 * (LAYERS[name][1] + 3 * d * 31 + 2 * d) + d
    for length in (1, 17, 4096):
        expected = 2 * weights + 3 * (length * per_slot - left_out)
        for tied in (True, False):
            config = config_of(name, tie_embeddings=tied)
            assert accounting.decode_flops(config, V, length, absorbed) == expected
        windowed = dataclasses.replace(
            config, attention=dataclasses.replace(LAYERS[name][0], window=5, num_sinks=2)
        )
        seen = min(length, 7)
        expected = 2 * weights + 3 * (seen * per_slot - left_out)
        assert accounting.decode_flops(windowed, V, length, absorbed) == expected


def test_decode_flops_as_published():
    """DeepSeek-V3, a layer and cached token: 2h * 1088 absorbed, 3.4 times the 2h * 320 of whole heads."""
    v3 = Latent(128, rank=512, rope_dim=64, nope_dim=128, value_dim=128, query_rank=1536)
    config = Config(v3, DecoderConfig(width=7168, depth=1, mlp_width=18432))
    more = lambda absorbed: (
        accounting.decode_flops(config, V, 4097, absorbed) - accounting.decode_flops(config, V, 4096, absorbed)
    )
    assert more(True) == 2 * 128 * 1088 and more(False) == 2 * 128 * 320 + 2 * 512 * 128 * 256


# Wide heads: masks and softmax, a few FLOPs a head and slot, are little beside their products.
WIDE = {
    "gqa": Grouped(2, 1, head_dim=128),
    "low_rank": LowRank(2, head_dim=128, rank=192),
    "low_rank_none": LowRank(2, head_dim=128, rank=192, position="none"),
    "mla": Latent(2, rank=192, rope_dim=64, nope_dim=128, value_dim=128),
}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("absorbed", [True, False])
def test_decode_flops_are_those_that_the_compiler_counts(name, absorbed):
    """Of one step that reads a full cache."""
    config = Config(WIDE[name], DecoderConfig(width=64, depth=1, mlp_width=64))
    graphdef, params = nnx.split(nnx.eval_shape(lambda: config.build(257)))
    cache = accounting.abstract_cache(config, 257, 1, 401, jnp.dtype("float32"))

    def step(params, tokens_BT, positions_BT, cache):
        model = nnx.merge(graphdef, params)
        model.layers[0].attention.expand_from = 2 if absorbed else 1
        return model(tokens_BT, positions_BT, cache)[0]

    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    counted = jax.jit(step).lower(params, one, one, cache).cost_analysis()["flops"]
    assert accounting.decode_flops(config, 257, 401, absorbed) == pytest.approx(counted, rel=0.05)


def test_prefill_flops_by_hand():
    """Every token's products and slots, and logits of the last one alone."""
    layers, per_slot = 3 * (LAYERS["mla"][1] + 3 * d * 31 + 2 * d) + d, LAYERS["mla"][3]
    expected = 17 * 2 * layers + 3 * per_slot * 17 * 18 / 2 + 2 * V * d
    assert accounting.prefill_flops(config_of("mla"), V, 17) == expected


def test_flops_of_a_trace():
    a, b = jnp.ones((2, 3, 5)), jnp.ones((2, 5, 7))
    product = lambda a, b: jnp.einsum("Bij,Bjk->Bik", a, b)
    assert accounting.num_flops(product, a, b) == 2 * 2 * 3 * 5 * 7
    assert accounting.num_flops(lambda a, b: jax.jit(product)(a, b) + 1.0, a, b) == 420
    branches = lambda a, b: jax.lax.cond(
        a[0, 0, 0] > 0, lambda: product(a, b), lambda: a @ b[:, :, :7] + product(a, b)
    )
    assert accounting.num_flops(branches, a, b) == 840
    with pytest.raises(ValueError, match="products in a scan loop are not counted"):
        accounting.num_flops(lambda a, b: jax.lax.scan(lambda c, _: (c, product(a, b)), 0.0, None, 3)[1], a, b)


def test_bytes_read_by_hand():
    """Weights once, without an untied embedding; of each row the slots seen, in their stored form."""
    bf16, read = jnp.dtype("bfloat16"), accounting.bytes_read
    weights = V * d + 3 * (LAYERS["gqa"][1] + 3 * d * 31 + 2 * d) + d
    for tied in (True, False):
        config = config_of("gqa", tie_embeddings=tied)
        assert read(config, V, 5, 17, bf16) == (2 * weights, 5 * 17 * 3 * 2 * 2 * 10 * 2)
    # A byte an element, and a 16-bit scale for each of 2 arrays of 2 heads in 3 layers.
    assert read(config, V, 5, 17, bf16, Int(8)).cache == 5 * 17 * 3 * 2 * 2 * (10 + 2)
    kept = Storage(Int(8), sinks=4)
    assert read(config, V, 1, 100, bf16, kept).cache == 3 * 2 * 2 * (100 * (10 + 2) + 4 * 10 * 2)
    windowed = dataclasses.replace(config, attention=Grouped(h, 2, head_dim=10, window=8, num_sinks=3))
    assert [read(windowed, V, 1, n, bf16).cache for n in (8, 11, 100)] == [
        n * 3 * 2 * 2 * 10 * 2 for n in (8, 11, 11)
    ]
    assert read(windowed, V, 1, 100, bf16, Int(8)).cache == 11 * 3 * 2 * 2 * (10 + 2)
    stored = accounting.abstract_cache(windowed, V, 1, 100, bf16, Int(8))
    assert nbytes(stored.memory) == 256 * 3 * 2 * 2 * (10 + 2)  # in whole chunks: stored and read are two numbers
    assert read(config_of("mla"), V, 2, 9, bf16).cache == 2 * 9 * 3 * (13 + 4) * 2
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        read(config, V, 1, 0, bf16)


def test_peak_of_matrix_products():
    assert accounting.matmul_peak(jnp.dtype("float32"), size=64, runs=3) > 0
