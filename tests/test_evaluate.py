"""B batch, T tokens, V vocabulary."""

import dataclasses
import functools
import json
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
from kvjax.codecs import Codec
from kvjax.data import Corpus
from kvjax.decoder import Decoder, DecoderConfig
from kvjax.evaluate import Score, evaluate, make_scorer
from kvjax.generate import generate
from kvjax.progress import track
from kvjax.sampling import Sampling

VOCAB, CONTEXT, BATCH = 29, 7, 4
END = VOCAB - 1
VARIANTS = {
    "mha": Grouped(6, 6, head_dim=10),
    "gqa": Grouped(6, 2, head_dim=10, qk_norm=True),
    "mqa": Grouped(6, 1, head_dim=10),
    "low_rank": LowRank(6, head_dim=4, rank=11),
    "low_rank_none": LowRank(6, head_dim=4, rank=None, rank_k=7, rank_v=13, position="none"),
    "mla": Latent(6, rank=13, rope_dim=4, nope_dim=3, value_dim=5),
}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wreck(Codec):
    """Forgets what it is given: reads zeros, or noise of a usual size."""

    noise: bool = False

    def encode(self, x):
        return x

    def decode(self, stored, dtype):
        noise = jax.random.normal(jax.random.key(5), stored.shape, dtype)
        return noise if self.noise else jnp.zeros_like(noise)

    def bits_per_token(self, heads, features, element_bits):
        return heads * features * element_bits


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Documents of 1, 7, 8 and 30 tokens after their end of text, and an empty one."""
    rng = np.random.default_rng(3)
    lengths = [7, 1, 0, 30, 8]
    parts = [np.append(END, rng.integers(0, END, n)) for n in lengths]
    starts = np.cumsum([0, *(len(part) for part in parts)])
    num_bytes = np.array([3 * n for n in lengths], np.int64)
    return Corpus(np.concatenate(parts).astype(np.int32), starts.astype(np.int64), num_bytes)


def model_of(attention):
    decoder = Decoder(
        DecoderConfig(width=23, depth=2, mlp_width=31, output_scale=1.0), attention, VOCAB, jax.random.key(1)
    )
    graphdef, params = nnx.split(decoder)
    # Large, so that what a token attends to decides its prediction.
    return graphdef, jax.tree.map(lambda a: 3 * a, params)


scorer_of = functools.cache(make_scorer)


def score(graphdef, params, corpus, through="none", codec=None, batch_size=BATCH) -> Score:
    mesh = sharding.make_mesh(batch_size)
    scorer = scorer_of(graphdef, mesh, through, codec)
    return evaluate(scorer, sharding.replicate(params, mesh), corpus, CONTEXT, batch_size, mesh)


@pytest.fixture(scope="module", params=VARIANTS)
def scored(request, corpus):
    graphdef, params = model_of(VARIANTS[request.param])
    return graphdef, params, score(graphdef, params, corpus)


def test_nats_equal_a_plain_loop(scored, corpus):
    """Window by window, without batches, padding or weights."""
    graphdef, params, result = scored
    forward = jax.jit(lambda params, tokens_BT: nnx.merge(graphdef, params)(tokens_BT)[0])
    for d, (start, stop) in enumerate(zip(corpus.starts[:-1], corpus.starts[1:])):
        ids, nats = corpus.ids[start:stop], 0.0
        for first in range(0, len(ids) - 1, CONTEXT):
            window = ids[first : first + CONTEXT + 1]
            padded = np.zeros((1, CONTEXT), np.int32)
            padded[0, : len(window) - 1] = window[:-1]
            logits = np.asarray(forward(params, padded), np.float64)[0]
            for t, target in enumerate(window[1:]):
                top = logits[t].max()
                nats += top + math.log(np.exp(logits[t] - top).sum()) - logits[t, target]
        assert result.nats[d] == pytest.approx(nats, rel=1e-5)
        assert result.tokens[d] == len(ids) - 1


@pytest.mark.parametrize("through", ["prefill", "decode"])
def test_the_exact_cache_changes_nothing(scored, corpus, through):
    graphdef, params, plain = scored
    cached = score(graphdef, params, corpus, through)
    np.testing.assert_allclose(cached.nats, plain.nats, rtol=1e-4)
    assert cached.nats_per_token == pytest.approx(plain.nats_per_token, rel=1e-4)
    np.testing.assert_array_equal(cached.tokens, plain.tokens)


@pytest.mark.parametrize("noise", [False, True], ids=["zeros", "noise"])
@pytest.mark.parametrize("through", ["prefill", "decode"])
def test_a_wrecked_cache_wrecks_the_score(scored, through, noise):
    """On text that the model wrote itself, and so predicts well."""
    graphdef, params, _ = scored
    prompt_BT = np.full((16, 1), END, np.int32)
    made = generate(graphdef, params, list(prompt_BT), CONTEXT, Sampling(0.7))
    rows = np.concatenate([prompt_BT, np.stack(made.tokens)], axis=1)
    starts = np.arange(17, dtype=np.int64) * (CONTEXT + 1)
    text = Corpus(rows.ravel(), starts, np.full(16, CONTEXT))
    plain, exact = score(graphdef, params, text), score(graphdef, params, text, through)
    wrecked = score(graphdef, params, text, through, Wreck(noise=noise))
    assert exact.nats_per_token == pytest.approx(plain.nats_per_token, rel=1e-4)
    assert wrecked.nats_per_token > plain.nats_per_token + 0.5


def test_without_a_cache_there_is_nothing_to_wreck(corpus):
    graphdef, params = model_of(VARIANTS["mqa"])
    plain, wrecked = score(graphdef, params, corpus), score(graphdef, params, corpus, "none", Wreck())
    assert wrecked.nats.tobytes() == plain.nats.tobytes()


def test_the_batch_size_does_not_matter(corpus):
    graphdef, params = model_of(VARIANTS["gqa"])
    small, large = (score(graphdef, params, corpus, batch_size=n) for n in (2, 6))
    np.testing.assert_allclose(small.nats, large.nats, rtol=1e-6)


def test_progress_sees_every_batch(corpus, capsys):
    graphdef, params = model_of(VARIANTS["mqa"])
    mesh, seen = sharding.make_mesh(BATCH), []
    scorer = make_scorer(graphdef, mesh)
    for wrap in (lambda batches: track("scoring", batches), lambda batches: seen.extend(batches) or batches):
        evaluate(scorer, sharding.replicate(params, mesh), corpus, CONTEXT, BATCH, mesh, wrap)
    assert len(seen) == math.ceil((1 + 1 + 0 + 5 + 2) / BATCH)
    assert capsys.readouterr().out.startswith("scoring 1/3")


# Two documents: 3 nats of 2 tokens and 5 bytes, 9 nats of 4 tokens and 11 bytes.
TWO = Score(np.array([3.0, 9.0]), np.array([2, 4]), np.array([5, 11]))


def test_figures_by_hand():
    """12 nats of 6 tokens and 16 bytes. Residuals: of tokens 3 - 2 x 2 and 9 - 4 x 2, of bytes 3 - 5 x 3/4 ..."""
    assert TWO.nats_per_token == 2.0
    assert TWO.perplexity == pytest.approx(math.e**2, rel=1e-15)
    assert TWO.bits_per_byte == pytest.approx(0.75 / math.log(2), rel=1e-15)
    assert TWO.perplexity_se == pytest.approx(math.e**2 * math.sqrt(2 * (1 + 1)) / 6, rel=1e-14)
    residuals = [3 - 5 * 0.75, 9 - 11 * 0.75]
    expected = math.sqrt(2 * (residuals[0] ** 2 + residuals[1] ** 2)) / 16 / math.log(2)
    assert TWO.bits_per_byte_se == pytest.approx(expected, rel=1e-14)


def test_standard_error_is_that_of_repeated_samples():
    """The spread of the ratio over many corpora of 40 documents drawn alike."""
    rng = np.random.default_rng(0)

    def draw():
        tokens = rng.integers(50, 400, 40)
        nats = tokens * rng.normal(2.0, 0.2, 40)
        return Score(nats, tokens, 4 * tokens)

    scores = [draw() for _ in range(500)]
    spread = np.std([s.bits_per_byte for s in scores])
    assert np.mean([s.bits_per_byte_se for s in scores]) == pytest.approx(spread, rel=0.1)
    assert np.mean([s.perplexity_se for s in scores]) == pytest.approx(
        np.std([s.perplexity for s in scores]), rel=0.1
    )


def test_equal_documents_have_no_error():
    assert Score(np.array([2.0, 2.0, 2.0]), np.array([3, 3, 3]), np.array([5, 5, 5])).perplexity_se == 0.0


def test_row_is_json():
    row = TWO.row()
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert (row["documents"], row["tokens"], row["bytes"]) == (2, 6, 16)
    assert row["perplexity"] == TWO.perplexity and row["bits_per_byte_se"] == TWO.bits_per_byte_se


def test_one_document_has_no_standard_error():
    one = Score(np.array([3.0]), np.array([2]), np.array([5]))
    assert math.isnan(one.perplexity_se) and math.isnan(one.bits_per_byte_se)
    assert one.row()["perplexity_se"] is None and one.row()["bits_per_byte_se"] is None
    assert one.row()["perplexity"] == pytest.approx(math.exp(1.5))


def test_a_perplexity_past_float64_is_infinite_and_null_in_a_row():
    hopeless = Score(np.array([800.0, 900.0]), np.array([1, 1]), np.array([5, 5]))
    assert hopeless.perplexity == np.inf
    row = hopeless.row()
    assert row["perplexity"] is None and row["perplexity_se"] is None
    assert row["bits_per_byte"] == pytest.approx(1700 / 10 / np.log(2))
