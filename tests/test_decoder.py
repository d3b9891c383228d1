"""The decoder: its parts put together in NumPy, causality by gradient, and the ways to run the layers.

B batch, T tokens, D width, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax import primer
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.codecs import Exact
from kvjax.decoder import Decoder, DecoderConfig, fused, unscanned

GROUPED = Grouped(6, 2, head_dim=10)
LATENT = Latent(6, rank=13, rope_dim=4, nope_dim=3, value_dim=5)
CONFIG = DecoderConfig(width=23, depth=2, mlp_width=31, tie_embeddings=False, output_scale=1.0)
TOKENS_BT = np.random.default_rng(0).integers(0, 29, (2, 11), np.int32)
POSITIONS_BT = np.tile(np.arange(11, dtype=np.int32), (2, 1))
ATTENTIONS = pytest.mark.parametrize("attention", [GROUPED, LATENT], ids=["grouped", "latent"])


@pytest.fixture(scope="module")
def split(draw_params):
    """Function to get a decoder's graph definition and parameters: the same weights for all fields."""

    @functools.cache
    def split_of(attention=GROUPED, **fields):
        weights = nnx.to_pure_dict(draw_params(lambda: Decoder(CONFIG, attention, 29, jax.random.key(0)))[1])
        config = dataclasses.replace(CONFIG, **fields)
        if config.tie_embeddings:
            del weights["unembedding_VD"]
        if config.scan:
            weights = with_stack(weights)
        graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, attention, 29, jax.random.key(0))))
        nnx.replace_by_pure_dict(params, weights)
        return graphdef, params

    return split_of


def with_stack(weights):
    """A scanned decoder's weights from an unrolled one's."""
    layers = weights.pop("layers")
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *(layers[i] for i in range(CONFIG.depth)))
    return weights | {"stack": stack}


@pytest.fixture(scope="module")
def logits_of(quick_jit):
    """Function to get a jitted `(params, key) -> logits` of a graph definition."""
    run = lambda graphdef: lambda params, key=None: nnx.merge(graphdef, params)(TOKENS_BT, key=key)[0]
    return functools.cache(lambda graphdef: quick_jit(run(graphdef)))


@pytest.fixture(scope="module")
def gradients_of(quick_jit):
    """Function to get a jitted gradient of a sum of the logits with fixed random weights."""
    weights = np.random.default_rng(1).standard_normal((*TOKENS_BT.shape, 29)).astype(np.float32)
    loss = lambda graphdef: lambda params: (nnx.merge(graphdef, params)(TOKENS_BT)[0] * weights).sum()
    return functools.cache(lambda graphdef: quick_jit(jax.grad(loss(graphdef))))


def assert_trees_close(actual, expected, error, tolerance):
    actual, expected = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (actual, expected))
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        assert error(actual[path], leaf) <= tolerance, jax.tree_util.keystr(path)


# The whole in NumPy


@ATTENTIONS
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_are_those_of_the_parts_in_float64(attention, tied, split, logits_of, oracle, error):
    graphdef, params = split(attention, tie_embeddings=tied)
    model, wide = nnx.merge(graphdef, params), lambda param: np.asarray(param[...], np.float64)
    x_BTD = wide(model.embedding_VD)[TOKENS_BT]
    for block in model.layers:
        x_BTD = x_BTD + oracle(block.attention, primer.rms_norm(x_BTD, wide(block.attention_norm.gain_H)))
        h_BTD = primer.rms_norm(x_BTD, wide(block.mlp_norm.gain_H))
        gate_BTF, up_BTF = np.split(h_BTD @ wide(block.mlp.gate_up_DE), 2, axis=-1)
        x_BTD = x_BTD + gate_BTF / (1 + np.exp(-gate_BTF)) * up_BTF @ wide(block.mlp.down_FD)
    x_BTD = primer.rms_norm(x_BTD, wide(model.norm.gain_H))
    unembedding_VD = wide(model.embedding_VD if tied else model.unembedding_VD)
    assert hasattr(model, "unembedding_VD") != tied
    logits = logits_of(graphdef)(params)
    assert logits.dtype == jnp.float32
    assert error(logits, x_BTD @ unembedding_VD.T) < 2e-5


def test_no_token_sees_a_later_one(model, quick_jit):
    """By gradient: what position t computes depends on tokens 0 ... t, on all of them and on no others."""
    tokens_BT = np.arange(7, dtype=np.int32)[None]  # unlike each other, so that each has its own embedding

    def reach(params, directions_TD):
        _, pull = jax.vjp(lambda params: nnx.merge(model.graphdef, params).hidden(tokens_BT)[0][0], params)
        from_t = lambda direction_TD: pull(direction_TD)[0]["embedding_VD"][...]
        directions_TTD = jnp.eye(7)[:, :, None] * directions_TD[None]
        return jnp.abs(jax.vmap(from_t)(directions_TTD)).max(-1)[:, :7]

    directions_TD = np.random.default_rng(0).standard_normal((7, 23)).astype(np.float32)
    reach_TT = np.asarray(quick_jit(reach)(model.params, directions_TD))
    assert (reach_TT[np.triu_indices(7, 1)] == 0).all()
    assert (reach_TT[np.tril_indices(7)] > 1e-4 * reach_TT.max()).all()


# Weights


@pytest.fixture(scope="module")
def initial(quick_jit):
    """Function to get a new decoder's weights."""

    @functools.cache
    def initial_of(attention=GROUPED, **fields):
        config = dataclasses.replace(CONFIG, **fields)
        return quick_jit(
            lambda: nnx.to_pure_dict(nnx.split(Decoder(config, attention, 29, jax.random.key(0)))[1])
        )()

    return initial_of


def assert_same(actual, expected):
    """But for the rounding that fusion may change."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), actual, expected)


def test_variants_of_one_seed_share_what_they_have_in_common(initial):
    """Embeddings, norms and MLPs are equal, whatever the attention; layers differ from each other."""
    grouped, latent = initial(GROUPED), initial(LATENT)
    for name in ("embedding_VD", "unembedding_VD", "norm"):
        assert_same(grouped[name], latent[name])
    for i in range(CONFIG.depth):
        assert_same(grouped["layers"][i]["mlp"], latent["layers"][i]["mlp"])
    first, second = (grouped["layers"][i] for i in range(CONFIG.depth))
    assert (first["mlp"]["down_FD"] != second["mlp"]["down_FD"]).mean() > 0.99
    assert (first["attention"]["q_DNH"] != second["attention"]["q_DNH"]).mean() > 0.99


def test_tied_and_scanned_decoders_of_one_seed_have_the_same_weights(initial):
    untied, tied, scanned = dict(initial()), initial(tie_embeddings=True), initial(scan=True)
    assert_same(scanned, with_stack(dict(untied)))
    del untied["unembedding_VD"]
    assert_same(tied, untied)


# Ways to run the layers


@ATTENTIONS
def test_scanned_layers_are_the_unrolled_ones(attention, split, logits_of, gradients_of, error):
    graphdef, params = split(attention)
    scanned, stacked = split(attention, scan=True)
    assert error(logits_of(scanned)(stacked), logits_of(graphdef)(params)) < 5e-6
    expected = with_stack(nnx.to_pure_dict(gradients_of(graphdef)(params)))
    assert_trees_close(nnx.to_pure_dict(gradients_of(scanned)(stacked)), expected, error, 2e-5)
    back = unscanned(nnx.merge(scanned, stacked))
    assert_trees_close(nnx.to_pure_dict(nnx.split(back)[1]), nnx.to_pure_dict(params), error, 0)
    logits, cache = back(TOKENS_BT, cache=back.init_cache(2, 11, Exact()))
    assert int(cache.length) == 11
    assert error(logits, logits_of(graphdef)(params)) < 2e-5


def test_dropout_is_the_same_in_scanned_layers(split, logits_of, error):
    unrolled, params = split(dropout=0.5)
    scanned, stacked = split(dropout=0.5, scan=True)
    key = jax.random.key(3)
    assert error(logits_of(scanned)(stacked, key), logits_of(unrolled)(params, key)) < 5e-6


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_recomputed_activations_give_the_same_gradients(scan, split, gradients_of, error):
    graphdef, params = split(scan=scan)
    remat = split(scan=scan, remat=True)[0]
    ours, theirs = gradients_of(remat), gradients_of(graphdef)
    assert_trees_close(ours(params), theirs(params), error, 2e-6)
    recomputes = lambda gradients: " remat" in str(gradients.trace(params).jaxpr)
    assert recomputes(ours)
    assert not recomputes(theirs)


def test_a_scanned_decoder_refuses_a_cache(split):
    scanned = nnx.merge(*split(scan=True))
    cache = nnx.merge(*split()).init_cache(2, 11, Exact())
    for refused in (lambda: scanned.init_cache(2, 11, Exact()), lambda: scanned(TOKENS_BT, cache=cache)):
        with pytest.raises(ValueError, match=r"decoder.scan=True cannot decode; use `unscanned`"):
            refused()


def test_dropout_needs_a_key_and_a_rate(split, logits_of):
    graphdef, params = split(dropout=0.5)
    run, run_plain = logits_of(graphdef), logits_of(split()[0])
    first, again, other = (np.asarray(run(params, jax.random.key(seed))) for seed in (1, 1, 2))
    silent = np.asarray(run(params))
    assert (first == again).all()
    assert (first != other).mean() > 0.99
    assert (first != silent).mean() > 0.99
    np.testing.assert_array_equal(silent, run_plain(params))
    np.testing.assert_array_equal(run_plain(params, jax.random.key(1)), run_plain(params))


# Cached calls


def test_positions_default_to_the_next_slots(model_of, error, quick_jit):
    model = model_of("gqa3")
    step = quick_jit(lambda params, tokens, cache: nnx.merge(model.graphdef, params)(tokens, cache=cache))
    cache = model.empty(2, 16, None)
    for now in (slice(0, 7), slice(7, 11)):
        logits, cache = step(model.params, TOKENS_BT[:, now], cache)
    assert cache.positions_BS[0].tolist() == [*range(11), -1, -1, -1, -1, -1]
    assert error(logits, model.forward(model.params, TOKENS_BT, POSITIONS_BT)[:, 7:]) < 2e-5


def test_each_layer_has_its_own_memory(model_of):
    model = model_of("gqa3")
    _, cache = model.feed(model.empty(2, 16, None), TOKENS_BT, POSITIONS_BT, (7,))
    first, second = (np.asarray(memory["k"])[:, :, :7] for memory in cache.memory)
    assert (first != second).all()


@pytest.mark.parametrize(("batch", "max_len", "message"), [(0, 7, "batch=0"), (2, 0, "max_len=0")])
def test_caches_of_no_size(batch, max_len, message, model_of):
    with pytest.raises(ValueError, match=f"{message} must be at least 1"):
        model_of("gqa3").empty(batch, max_len, None)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("width", 0, "must be at least 1"),
        ("depth", 0, "must be at least 1"),
        ("mlp_width", -3, "must be at least 1"),
        ("dropout", 1.0, "must be at least 0.0 and below 1.0"),
        ("dropout", -0.1, "must be at least 0.0 and below 1.0"),
        ("dropout", float("nan"), "must be at least 0.0 and below 1.0"),
    ],
)
def test_wrong_fields(field, value, rule):
    with pytest.raises(ValueError, match=f"{field}={value} {rule}"):
        DecoderConfig(**{field: value})


@pytest.mark.parametrize(
    "config", [Grouped(6, 2, head_dim=10, qk_norm=True, qkv_bias=True), Grouped(6, 6, head_dim=10)]
)
@pytest.mark.parametrize("turn", [False, True], ids=["as they are", "turned"])
def test_fused_weights_are_the_same_model(config, turn, error):
    """One product for query, key and value; every other weight is the same array."""
    graphdef, params = nnx.split(
        Decoder(DecoderConfig(width=23, depth=2, mlp_width=31), config, 29, jax.random.key(0))
    )
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    tokens_BT = np.random.default_rng(0).integers(0, 29, (3, 11), np.int32)
    right, _ = nnx.merge(graphdef, params)(tokens_BT)
    graphdef_fused, params_fused = fused(graphdef, params, turn)
    again, _ = nnx.merge(*fused(graphdef_fused, params_fused, turn))(tokens_BT)
    made, _ = nnx.merge(graphdef_fused, params_fused)(tokens_BT)
    assert error(made, np.asarray(right, np.float64)) < 2e-5
    np.testing.assert_array_equal(again, made)
    assert sum(a.size for a in jax.tree.leaves(params)) == sum(a.size for a in jax.tree.leaves(params_fused))
    assert len(jax.tree.leaves(params)) == len(jax.tree.leaves(params_fused)) + 2 * 2
    assert nnx.merge(graphdef, params).layers[0].attention.q_DNH.shape == (23, config.num_heads, 10)  # untouched
