"""B batch, T tokens, D width, V vocabulary, N query heads, K kv heads, H head dim, F features, J = H / 2 rotary pairs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax import primer, stress
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.codecs.statistics import ArrayStatistics, Moments, Statistics
from kvjax.decoder import Decoder, DecoderConfig, decodable
from kvjax.rope import RopeScaling, frequencies
from kvjax.stress import key_bias, outlier_channels, score_variance, sink_token

WIDTH, VOCAB, BEGIN, H, J, T = 23, 29, 28, 10, 5, 13
UNUSED = 17  # a channel of the residual stream
PLAIN = Grouped(6, 3, head_dim=H, rope_theta=1009.0)
BIASED = dataclasses.replace(PLAIN, qkv_bias=True, output_bias=True)
NORMED = dataclasses.replace(BIASED, qk_norm=True)
TOKENS_BT = np.random.default_rng(5).integers(0, BEGIN, (4, T))
TOKENS_BT[:, 0] = BEGIN


@pytest.fixture(scope="module", autouse=True)
def quick(quick_jit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stress, "_alone", quick_jit(stress._alone.__wrapped__, static_argnums=0))
        yield


@pytest.fixture(scope="module")
def model_of(draw_params):
    """Function to get a random model."""

    @functools.cache
    def model(config, **decoder):
        make = lambda: Decoder(DecoderConfig(WIDTH, 2, 31, **decoder), config, VOCAB, jax.random.key(0))
        return draw_params(make)

    return model


@pytest.fixture(scope="module")
def observed(quick_jit):
    """Function to get logits, and every layer's arrays and queries, of a model."""

    @functools.partial(quick_jit, static_argnums=0)
    def run(graphdef, params, tokens_BT):
        model = nnx.merge(graphdef, params)
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], tokens_BT.shape)
        x_BTD, layers = model.embedding_VD[...][tokens_BT], []
        for block in model.layers:
            layers.append(block.attention.observe(block.attention_norm(x_BTD), positions_BT))
            x_BTD, _ = block(x_BTD, positions_BT)
        return model.logits(model.norm(x_BTD)), layers

    def to_float64(model, tokens_BT=TOKENS_BT):
        found = run(*model, jnp.asarray(tokens_BT, jnp.int32))
        return jax.tree.map(lambda a: np.asarray(a, np.float64), found)

    return to_float64


def statistics_of(layers) -> Statistics:
    """Of unrotated keys, at positions from 1."""

    def layer(arrays, queries):
        k_MKF = np.moveaxis(arrays["k_before_rope"][:, :, 1:], 1, 2).reshape(-1, *arrays["v"].shape[1::2])
        outer = np.einsum("MKF,MKE->KFE", k_MKF, k_MKF)
        rest = Moments(len(k_MKF), k_MKF.sum(0), outer, None, np.abs(k_MKF).max())
        q_BKGTF = queries["k_before_rope"].reshape(4, k_MKF.shape[1], -1, T, k_MKF.shape[2])
        second_q = np.einsum("BKGTF,BKGTE->KFE", q_BKGTF, q_BKGTF) / TOKENS_BT.size
        return {"k_before_rope": ArrayStatistics(rest, rest, second_q, None)}

    return Statistics(tuple(layer(*found) for found in layers), TOKENS_BT.size, T, "small", "random")


@pytest.mark.parametrize("config", [PLAIN, BIASED, NORMED], ids=["plain", "biased", "normed"])
def test_outlier_channels_leave_the_function(config, model_of, observed, error):
    """Logits to rounding, also for a factor that is no power of two; and parameters that others hold."""
    before = jax.tree.map(np.array, model_of(config)[1])
    logits, layers = observed(model_of(config))
    stressed_logits, stressed = observed(outlier_channels(*model_of(config), 30.0, pair=1, channel=3))
    assert error(stressed_logits, logits) < 1e-5
    for (arrays, _), (stressed_arrays, _) in zip(layers, stressed, strict=True):
        factors_F = np.ones((2, H))
        factors_F[0, [1, 1 + J]] = factors_F[1, 3] = 30.0
        for name, factor_F in zip("kv", factors_F):
            assert error(stressed_arrays[name] / factor_F, arrays[name]) < 1e-5
            grown_F = np.abs(stressed_arrays[name]).max((0, 1, 2)) / np.abs(arrays[name]).max((0, 1, 2))
            np.testing.assert_allclose(grown_F, factor_F, rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, model_of(config)[1], before)


def test_outliers_lie_in_the_slowest_pair_of_a_model_that_is_scanned(model_of, observed, error):
    scanned = model_of(PLAIN, scan=True)
    logits, layers = observed(decodable(*scanned))
    stressed_logits, stressed = observed(outlier_channels(*scanned))
    assert error(stressed_logits, logits) < 1e-6  # powers of two: exact but for the order of sums
    grown_F = np.abs(stressed[1][0]["k"]).max((0, 1, 2)) / np.abs(layers[1][0]["k"]).max((0, 1, 2))
    np.testing.assert_allclose(grown_F, [1, 1, 1, 1, 32, 1, 1, 1, 1, 32], rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "pairs"), [(PLAIN, 1), (BIASED, 1), (PLAIN, 2)], ids=["plain", "biased", "two pairs"]
)
def test_a_bias_moves_keys_by_itself_and_scores_alike(config, pairs, model_of, observed, error):
    """Of norm 64 times the root mean square, in the slowest pairs. Measured, logits move by 0.047 to 0.056 of their
    standard deviation, and 19 to 32 times as far if the bias is turned by 90 degrees."""
    decoder = nnx.merge(*model_of(config))
    for block in decoder.layers:  # queries that have a direction
        for name in ("q_DNH", "q_bias_NH")[: 1 + config.qkv_bias]:
            scales_H = np.float32(np.repeat([1.0, 0.05], J))
            setattr(block.attention, name, nnx.Param(getattr(block.attention, name)[...] * scales_H))
    model = nnx.split(decoder)
    logits, layers = observed(model)
    graphdef, params = key_bias(*model, statistics_of(layers), 64.0, pairs)
    stressed_logits, stressed = observed((graphdef, params))
    moved_BKTH = stressed[0][0]["k_before_rope"] - layers[0][0]["k_before_rope"]
    bias_KH = moved_BKTH[0, :, 0]
    assert np.abs(moved_BKTH - bias_KH[:, None]).max() < 1e-5 * np.abs(bias_KH).max()
    rms_K = np.sqrt((layers[0][0]["k_before_rope"][:, :, 1:] ** 2).mean((0, 2, 3)))
    np.testing.assert_allclose(np.linalg.norm(bias_KH, axis=-1), 64 * rms_K, rtol=1e-5)
    slow = [*range(J - pairs, J), *range(H - pairs, H)]
    assert not np.delete(bias_KH, slow, axis=1).any() and bias_KH[:, slow].all()
    assert error(stressed[0][0]["v"], layers[0][0]["v"]) < 1e-6  # no bias, or the one there was
    np.testing.assert_array_equal(stressed[0][1]["k_before_rope"], layers[0][1]["k_before_rope"])
    change = np.abs(stressed_logits - logits).max() / logits.std()
    turned = nnx.merge(graphdef, params)
    for old, block in zip(nnx.merge(*model).layers, turned.layers):
        own = np.asarray(old.attention.k_bias_KH[...]) if config.qkv_bias else 0.0
        added_KH = np.asarray(block.attention.k_bias_KH[...]) - own
        across_KH = np.concatenate([-added_KH[:, J:], added_KH[:, :J]], axis=1)
        block.attention.k_bias_KH = nnx.Param(jnp.asarray(own + across_KH, jnp.float32))
    far = np.abs(observed(nnx.split(turned))[0] - logits).max() / logits.std()
    assert change < 0.1 and far > 10 * change


def test_variance_of_scores_equals_that_of_turned_queries():
    rng = np.random.default_rng(0)
    q_MH, b_H, weights = rng.standard_normal((40, 6)), rng.standard_normal(6), rng.dirichlet(np.ones(9))
    scores_MT = np.stack([primer.rope(q_MH[:, None], np.array([d]), 11.0)[:, 0] @ b_H for d in range(9)], axis=1)
    variances_M = scores_MT**2 @ weights - (scores_MT @ weights) ** 2
    turns = frequencies(11.0, 6)
    spread_HH = score_variance(q_MH.T @ q_MH / 40, turns, weights)
    assert b_H @ spread_HH @ b_H == pytest.approx(variances_M.mean(), rel=1e-6)


def unmasked(shape, index):
    mask = np.ones(shape, np.float32)
    mask[index] = 0.0
    return mask


@pytest.fixture(scope="module")
def spare(model_of):
    """Function to get a model with an unused channel, and a pair that queries do not read."""

    def model(config):
        decoder = nnx.merge(*model_of(config))
        zeroed = lambda param, index: nnx.Param(param[...] * unmasked(param.shape, index))
        decoder.embedding_VD = zeroed(decoder.embedding_VD, np.s_[:, UNUSED])
        for block in decoder.layers:
            attention = block.attention
            attention.o_NHD = zeroed(attention.o_NHD, np.s_[..., UNUSED])
            attention.q_DNH = zeroed(attention.q_DNH, np.s_[..., [J - 1, H - 1]])
            block.mlp.down_FD = zeroed(block.mlp.down_FD, np.s_[:, UNUSED])
            if config.qkv_bias:
                attention.q_bias_NH = zeroed(attention.q_bias_NH, np.s_[:, [J - 1, H - 1]])
                attention.o_bias_D = zeroed(attention.o_bias_D, UNUSED)
        return nnx.split(decoder)

    return model


YARN = RopeScaling("yarn", 4.0, 8, beta_fast=2.0, beta_slow=0.5, magnitude=1.3)


@pytest.mark.parametrize(
    "config", [PLAIN, BIASED, dataclasses.replace(PLAIN, rope_scaling=YARN)], ids=["plain", "biased", "yarn"]
)
def test_a_sink_is_an_outlier_that_nothing_reads(config, spare, observed):
    """50 times the others' norm. Only what was unused is used: measured, other keys and logits move by 3e-4 of
    their standard deviation, as norms of the token's features see its mark, of a hundredth of their norm."""
    logits, layers = observed(spare(config))
    statistics = statistics_of(layers)
    stressed_logits, stressed = observed(sink_token(*spare(config), statistics, BEGIN, 50.0))
    assert np.abs(stressed_logits - logits).max() < 1e-3 * logits.std()
    for (arrays, _), (stressed_arrays, _) in zip(layers, stressed, strict=True):
        norms_BKT = np.linalg.norm(stressed_arrays["k"], axis=-1)
        rms_K = np.sqrt((norms_BKT[..., 1:] ** 2).mean((0, 2)))
        np.testing.assert_allclose(norms_BKT[..., 0] / rms_K, 50.0, rtol=1e-4)
        others, stressed_others = (a["k"][:, :, 1:] for a in (arrays, stressed_arrays))
        assert np.abs(stressed_others - others).max() < 1e-3 * others.std()


def test_a_sinks_size_changes_its_key_alone(model_of, observed):
    """In a model with nothing to spare, where channel and pair are given up: sizes 10 and 1000 differ in no other
    number, and in the same token elsewhere."""
    _, layers = observed(model_of(PLAIN))
    tokens_BT = TOKENS_BT.copy()
    tokens_BT[1, 7] = BEGIN
    small, large = (
        observed(sink_token(*model_of(PLAIN), statistics_of(layers), BEGIN, size), tokens_BT)
        for size in (10.0, 1000.0)
    )
    np.testing.assert_array_equal(small[0], large[0])
    sinks_BT = tokens_BT == BEGIN
    for (arrays, _), (larger, _) in zip(small[1], large[1], strict=True):
        k_BTKH, larger_BTKH = (np.moveaxis(a["k"], 1, 2) for a in (arrays, larger))
        np.testing.assert_array_equal(k_BTKH[~sinks_BT], larger_BTKH[~sinks_BT])
        norms = np.linalg.norm(larger_BTKH, axis=-1)
        assert (norms[sinks_BT] > 500 * np.median(norms[~sinks_BT], axis=0)).all()


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (outlier_channels, Latent(6, rank=13, rope_dim=4, nope_dim=3, value_dim=5), "attention=Latent must be Grouped, which caches keys and values"),
        (functools.partial(outlier_channels, factor=0.0), PLAIN, "factor=0.0 must be a finite number above 0"),
        (functools.partial(outlier_channels, pair=5), PLAIN, "pair=5 must be at least 0 and below 5"),
        (functools.partial(outlier_channels, channel=10), PLAIN, "channel=10 must be at least 0 and below 10"),
        (functools.partial(key_bias, statistics=None), NORMED, "attention.qk_norm=True must be False: it rescales keys, whatever their bias"),
        (functools.partial(key_bias, statistics=None, pairs=6), PLAIN, "pairs=6 must be at least 1 and below 6"),
        (functools.partial(sink_token, statistics=None, token=0), NORMED, "attention.qk_norm=True must be False: it gives all keys about the same norm"),
        (functools.partial(sink_token, statistics=None, token=29), PLAIN, "token=29 must be at least 0 and below 29"),
        (functools.partial(sink_token, statistics=None, token=0, size=0.5), PLAIN, "size=0.5 must be at least 1.0"),
        (functools.partial(key_bias, statistics=Statistics((), 1, 1, "", "")), PLAIN, "statistics must have keys before RoPE of 2 layers, 3 heads of 10"),
    ],
)  # fmt: skip
def test_errors(change, config, message, model_of):
    with pytest.raises(ValueError) as error:
        change(*model_of(config))
    assert str(error.value) == message


def test_a_sink_must_be_larger_than_the_key_is(model_of, observed):
    """Statistics of keys a hundredth as large, of which 1.5 times is what any key has."""
    _, layers = observed(model_of(PLAIN))
    for arrays, _ in layers:
        arrays["k_before_rope"] /= 100
    with pytest.raises(ValueError, match=r"size=1\.5 must be above \d\d[\d.]*: this token's keys are as large"):
        sink_token(*model_of(PLAIN), statistics_of(layers), BEGIN, 1.5)
