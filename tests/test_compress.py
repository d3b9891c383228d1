"""Scores through compressed caches: against decoding token by token, a plain loop in float64, and hand-solved cases.

B batch, T tokens, V vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax import sharding
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.codecs import Exact, Storage
from kvjax.codecs.chain import chain
from kvjax.codecs.integers import Int, IntPerChannel
from kvjax.codecs.rotations import haar
from kvjax.compress import Comparer, Comparison, bytes_of, on_front
from kvjax.data import Corpus
from kvjax.decoder import Decoder, DecoderConfig, rope_on_read
from kvjax.evaluate import Score, evaluate, make_scorer

VOCAB, END, CONTEXT, BATCH = 29, 28, 16, 4
VARIANTS = {
    "gqa": Grouped(6, 3, head_dim=10),
    "low_rank": LowRank(6, head_dim=4, rank=11),
    "mla": Latent(6, rank=13, rope_dim=4, nope_dim=3, value_dim=5),
}
TRUNCATED = {
    name: dataclasses.replace(haar(n, 0), down=haar(n, 0).down[:, : n - 2], up=haar(n, 0).up[: n - 2])
    for name, n in {"k": 10, "v": 10, "latent": 11}.items()
}
CODECS = {
    "exact": ("gqa", Storage(chunk=8)),
    "int8": ("mla", Storage(Int(8), chunk=8)),
    "truncated": ("gqa", Storage({n: chain(TRUNCATED[n]) for n in "kv"}, chunk=8, sinks=1, recent=4)),
    "per_channel": ("gqa", Storage({"k": IntPerChannel(8, 4), "v": Int(8)}, chunk=8)),
    "latent": ("low_rank", Storage(chain(TRUNCATED["latent"]), chunk=8)),
}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rng = np.random.default_rng(3)
    lengths = [7, 1, 30, 16]
    parts = [np.append(END, rng.integers(0, END, n)) for n in lengths]
    starts = np.cumsum([0, *(len(part) for part in parts)])
    return Corpus(np.concatenate(parts).astype(np.int32), starts.astype(np.int64), np.array(lengths) * 3)


@pytest.fixture(scope="module")
def model_of(draw_params):
    def model(name):
        make = lambda: Decoder(DecoderConfig(23, 2, 31), VARIANTS[name], VOCAB, jax.random.key(0))
        graphdef, params = draw_params(make)
        return graphdef, jax.tree.map(jnp.asarray, params)

    return model


@pytest.fixture(scope="module")
def comparer_of(model_of, corpus):
    made = {}
    return lambda name: made.setdefault(name, Comparer(*model_of(name), corpus, CONTEXT, BATCH))


@pytest.mark.parametrize("name", CODECS)
def test_one_pass_scores_as_decoding_token_by_token(name, comparer_of, model_of, corpus):
    variant, storage = CODECS[name]
    graphdef, params = model_of(variant)
    comparison = comparer_of(variant).compare([storage] * 2)
    mesh = sharding.make_mesh(BATCH)
    decode = make_scorer(graphdef, mesh, "decode", storage)
    slow = evaluate(decode, sharding.replicate(params, mesh), corpus, CONTEXT, BATCH, mesh)
    np.testing.assert_allclose(comparison.score.nats, slow.nats, rtol=2e-4)
    np.testing.assert_array_equal(comparison.score.tokens, slow.tokens)
    plain = evaluate(make_scorer(graphdef, mesh), sharding.replicate(params, mesh), corpus, CONTEXT, BATCH, mesh)
    np.testing.assert_allclose(comparison.exact.nats, plain.nats, rtol=2e-5)
    if name == "exact":
        assert np.abs(comparison.kl).max() < 1e-5 and (comparison.agreeing == slow.tokens).all()
    elif name == "truncated":
        assert np.abs(slow.nats - plain.nats).max() > 1e-2


def test_divergence_and_agreement_equal_a_plain_loop(comparer_of, model_of, corpus, zeros):
    """A cache that forgets: attention's result is 0, in float64 NumPy from logits of the model without attention."""
    graphdef, params = model_of("gqa")
    comparison = comparer_of("gqa").compare([Storage(zeros)] * 2)
    deaf = nnx.merge(graphdef, params)
    for block in deaf.layers:
        block.attention.o_NHD = nnx.Param(jnp.zeros_like(block.attention.o_NHD[...]))
    deaf = nnx.split(deaf)
    forward = jax.jit(lambda graph, params, tokens: nnx.merge(graph, params)(tokens)[0], static_argnums=0)
    for d, (start, stop) in enumerate(zip(corpus.starts[:-1], corpus.starts[1:])):
        kl, agreeing, nats = 0.0, 0, 0.0
        for first in range(start, stop - 1, CONTEXT):
            window = corpus.ids[first : min(first + CONTEXT + 1, stop)]
            tokens = np.zeros((1, CONTEXT), np.int32)
            tokens[0, : len(window) - 1] = window[:-1]
            logp = lambda model, tokens=tokens: _log_softmax(np.asarray(forward(*model, tokens)[0], np.float64))
            p_TV, q_TV = logp((graphdef, params)), logp(deaf)
            for t, target in enumerate(window[1:]):
                kl += (np.exp(p_TV[t]) * (p_TV[t] - q_TV[t])).sum()
                agreeing += p_TV[t].argmax() == q_TV[t].argmax()
                nats -= q_TV[t, target]
        assert comparison.kl[d] == pytest.approx(kl, rel=1e-4)
        assert comparison.agreeing[d] == agreeing
        assert comparison.score.nats[d] == pytest.approx(nats, rel=1e-5)
    assert comparison.kl.sum() / comparison.score.tokens.sum() > 0.1


def _log_softmax(a_TV):
    top = a_TV.max(-1, keepdims=True)
    return a_TV - top - np.log(np.exp(a_TV - top).sum(-1, keepdims=True))


def test_layers_of_one_structure_share_a_program(comparer_of):
    from kvjax.compress import through_layer

    comparer = comparer_of("gqa")
    before = through_layer._cache_size()
    comparer.compare([Storage(Int(4), chunk=8)] * 2)
    assert through_layer._cache_size() == before + 1
    comparer.compare([Storage(Int(4), chunk=8), Storage(Int(2), chunk=8)])
    assert through_layer._cache_size() == before + 2


def test_keys_before_the_rotation_score_alike(comparer_of):
    """Unless they are compressed, which is then another thing."""
    comparer = comparer_of("gqa")
    exact = comparer.compare([Storage(chunk=8)] * 2, keys_before_rope=True)
    np.testing.assert_allclose(exact.score.nats, comparer.exact.nats, rtol=1e-5)
    storages = [Storage({"k": chain(TRUNCATED["k"])}, chunk=8)] * 2
    before, after = (comparer.compare(storages, keys_before_rope=flag) for flag in (True, False))
    assert np.abs(before.score.nats - after.score.nats).max() > 1e-3


def test_only_grouped_attention_has_keys_before_the_rotation(model_of):
    with pytest.raises(ValueError, match="keys before the rotation need grouped attention, not Latent"):
        rope_on_read(*model_of("mla"))


def test_the_interval_of_a_hand_solved_case():
    """Differences 1, 3 and 2 nats of documents of 10 tokens: mean 0.2, standard error 0.1 / sqrt(3), t(2) = 4.303."""
    tokens = np.array([10, 10, 10])
    exact = Score(np.array([20.0, 22.0, 21.0]), tokens, tokens)
    score = Score(np.array([21.0, 25.0, 23.0]), tokens, tokens)
    comparison = Comparison(score, exact, np.array([1.0, 2.0, 3.0]), np.array([10.0, 5.0, 0.0]))
    low, high = comparison.interval
    assert comparison.nats_difference == pytest.approx(0.2)
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (low, high) == (pytest.approx(0.2 - half, rel=1e-6), pytest.approx(0.2 + half, rel=1e-6))
    row = comparison.row()
    assert row["perplexity_percent"] == pytest.approx(100 * (math.exp(0.2) - 1))
    assert row["kl_nats_per_token"] == pytest.approx(0.2) and row["top1_agreement"] == pytest.approx(0.5)


def test_one_document_has_no_interval():
    one = Score(np.array([20.0]), np.array([10]), np.array([30]))
    row = Comparison(one, one, np.zeros(1), np.full(1, 10.0)).row()
    assert row["perplexity_percent_low"] is None and row["perplexity_percent"] == 0.0


def test_bytes_of_a_context(comparer_of):
    """3 heads of 10 in 2 layers: 8 bits and a float16 scale for keys, 4 for values; 16 + 4 exact tokens of float32."""
    storage = Storage({"k": Int(8), "v": Int(4)}, chunk=32, sinks=4, recent=16)
    found = bytes_of(comparer_of("gqa").entries, [storage] * 2, 100)
    encoded = 2 * 3 * (10 + 2 + 5 + 2)
    assert found["slots"] == 128 and found["encoded_per_token"] == encoded
    assert found["exact_tokens"] == 2 * 20 * 2 * 3 * 10 * 4
    assert found["per_token"] == encoded + found["exact_tokens"] / 128
    assert found["times_smaller_than_bf16"] == pytest.approx(2 * 2 * 2 * 30 / found["per_token"])
    maps = [Storage({"k": chain(TRUNCATED["k"])}), Storage(Exact())]
    assert bytes_of(comparer_of("gqa").entries, maps, 100)["calibrated_per_model"] == 4 * (80 + 80 + 10)


def test_the_front():
    points = [(10, 5.0), (8, 5.0), (8, 6.0), (4, 7.0), (4, 7.0), (5, 8.0)]
    assert on_front(points) == [False, True, False, True, True, False]
