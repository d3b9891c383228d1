"""B batch, T tokens, V vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax import generate as module
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.codecs import Exact, Storage
from kvjax.codecs.chain import chain
from kvjax.codecs.floats import Fp8
from kvjax.codecs.rotations import haar
from kvjax.decoder import Decoder, DecoderConfig, decodable
from kvjax.generate import Session, generate, padded, pieces, without_cache
from kvjax.sampling import Sampling
from kvjax.slots import nbytes

VOCAB = 29
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, VOCAB, n).astype(np.int32) for n in (5, 1, 19)]
VARIANTS = {
    "grouped": Grouped(6, 2, head_dim=10),
    "windowed": Grouped(6, 2, head_dim=10, window=7, num_sinks=3),
    "windowed_mla": Latent(6, rank=13, rope_dim=4, nope_dim=3, value_dim=5, window=5, num_sinks=1),
    "windowed_low_rank": LowRank(6, head_dim=4, rank=11, window=4),
    "low_rank": LowRank(6, head_dim=4, rank=11),
    "no_position": LowRank(6, head_dim=4, rank=None, rank_k=7, rank_v=11, position="none"),
    "mla": Latent(6, rank=13, rope_dim=4, nope_dim=3, value_dim=5),
}


def model_of(attention, **fields):
    config = DecoderConfig(width=23, depth=2, mlp_width=31, output_scale=1.0, **fields)
    graphdef, params = nnx.split(Decoder(config, attention, VOCAB, jax.random.key(2)))
    # Large, so that the tokens generated are not all the same.
    return graphdef, jax.tree.map(lambda a: 3 * a, params)


@pytest.fixture(scope="module")
def gqa():
    return model_of(VARIANTS["grouped"])


def forward_of(graphdef, params):
    """float64 logits `TV` of one sequence without a cache, padded to one length: what follows does not reach back."""
    run = jax.jit(lambda params, tokens_BT: nnx.merge(graphdef, params)(tokens_BT)[0])

    def logits(tokens):
        padded_BT = np.zeros((1, 40), np.int32)
        padded_BT[0, : len(tokens)] = tokens
        return np.asarray(run(params, padded_BT), np.float64)[0, : len(tokens)]

    return logits


@pytest.mark.parametrize("name", VARIANTS)
def test_ragged_rows_are_the_argmax_of_forward_passes_without_a_cache(name):
    graphdef, params = model_of(VARIANTS[name])
    logits, made = forward_of(graphdef, params), generate(graphdef, params, PROMPTS, 9, logprobs=True)
    seen = set()
    for prompt, row, logprobs in zip(PROMPTS, made.tokens, made.logprobs):
        tokens = list(prompt)
        for token, logprob in zip(row, logprobs):
            logits_V = logits(tokens)[-1]
            assert token == logits_V.argmax()
            assert logprob == pytest.approx(logits_V.max() - np.log(np.exp(logits_V).sum()), abs=2e-4)
            tokens.append(token)
        seen |= set(row.tolist())
    assert [row.dtype for row in made.tokens] == [np.int32] * 3 and len(seen) > 3


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.7), Sampling(1.3, top_k=11, top_p=0.9, min_p=0.02)])
def test_every_row_is_the_same_prompt_alone(gqa, sampling):
    together = generate(*gqa, PROMPTS, 12, sampling, seeds=[5, 9, 2])
    for prompt, seed, row in zip(PROMPTS, [5, 9, 2], together.tokens):
        np.testing.assert_array_equal(generate(*gqa, [prompt], 12, sampling, seeds=[seed]).tokens[0], row)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.7, top_p=0.9)])
def test_without_a_cache_the_same_tokens(gqa, sampling):
    made = generate(*gqa, [PROMPTS[2]], 12, sampling, seeds=4).tokens[0]
    assert list(without_cache(*gqa, PROMPTS[2], 12, sampling, seed=4)) == made.tolist()
    stop = int(made[5])
    ended = list(without_cache(*gqa, PROMPTS[2], 12, sampling, seed=4, stop=[stop]))
    assert ended == made[: made.tolist().index(stop) + 1].tolist()


def test_turns_and_parts_are_one_sequence(gqa):
    """Fed in two turns and made in parts of 4, as fed at once and made at once."""
    at_once = generate(*gqa, [PROMPTS[2]], 11, Sampling(1.5), seeds=3).tokens[0]
    session = Session(*gqa, batch=1, max_len=64)
    session.feed([PROMPTS[2][:3]])
    session.feed([PROMPTS[2][3:]])
    parts = [part.tokens[0] for part in session.stream(11, Sampling(1.5), seeds=3, every=4)]
    assert [len(part) for part in parts] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(parts), at_once)


def test_a_stop_token_ends_its_row_alone(gqa):
    free = generate(*gqa, PROMPTS, 12, Sampling(2.0)).tokens
    stop = int(free[0][4])
    ends = [int(np.append(np.flatnonzero(row == stop), 11)[0]) + 1 for row in free]
    assert len(set(ends)) > 1
    made = generate(*gqa, PROMPTS, 12, Sampling(2.0), stop=[stop, VOCAB - 1 if stop != VOCAB - 1 else 0])
    other = VOCAB - 1 if stop != VOCAB - 1 else 0
    for row, whole in zip(made.tokens, free):
        hits = np.flatnonzero((whole == stop) | (whole == other))
        np.testing.assert_array_equal(row, whole[: hits[0] + 1] if len(hits) else whole)


def test_the_loop_ends_when_every_row_has(gqa):
    free = generate(*gqa, PROMPTS, 12).tokens
    session = Session(*gqa, batch=3, max_len=64)
    session.feed(PROMPTS)
    length = int(session.cache.length)
    made = session.generate(12, stop=[int(row[2]) for row in free])
    most = max(len(row) for row in made.tokens)
    assert most < 12 and int(session.cache.length) == length + most


def test_a_row_that_ended_is_padding(gqa):
    """Its positions stand still, and a later turn goes on as if it had never waited."""
    free = generate(*gqa, PROMPTS[:2], 8).tokens
    stop = next(int(token) for token in free[0] if token not in free[1])
    session = Session(*gqa, batch=2, max_len=96)
    session.feed(PROMPTS[:2])
    made = session.generate(8, stop=[stop])
    assert len(made.tokens[0]) < 8 == len(made.tokens[1])
    session.feed([PROMPTS[2], PROMPTS[2]])
    after = session.generate(6)
    for prompt, row, rest in zip(PROMPTS, made.tokens, after.tokens):
        alone = generate(*gqa, [np.concatenate([prompt, row, PROMPTS[2]])], 6).tokens[0]
        np.testing.assert_array_equal(rest, alone)


def test_a_scanned_model_generates_once_unrolled(gqa):
    graphdef, params = model_of(VARIANTS["grouped"], scan=True)
    with pytest.raises(ValueError, match=r"decoder\.scan=True cannot decode"):
        generate(graphdef, params, PROMPTS, 3)
    for a, b in zip(generate(*decodable(graphdef, params), PROMPTS, 3).tokens, generate(*gqa, PROMPTS, 3).tokens):
        np.testing.assert_array_equal(a, b)


def test_sampling_is_a_function_of_the_seed(gqa):
    first, again, other = (np.stack(generate(*gqa, PROMPTS, 11, Sampling(1.5), s).tokens) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first.min() >= 0 and first.max() < VOCAB


def test_every_token_is_drawn_anew(gqa):
    """At this temperature all tokens are alike: one draw for all would repeat a single one."""
    made = generate(*gqa, PROMPTS, 20, Sampling(1e6)).tokens
    assert all(len(set(row.tolist())) > 8 for row in made)
    assert len({tuple(row) for row in made}) == len(made)


@pytest.mark.parametrize("name", ["grouped", "windowed"])
def test_generation_reads_the_cache_through_its_codec(name, zeros):
    model = model_of(VARIANTS[name])
    made = np.stack(generate(*model, PROMPTS, 8).tokens)
    assert (np.stack(generate(*model, PROMPTS, 8, codec=zeros).tokens) != made).any()
    codec = Storage(chunk=5)  # divides the window and its sinks
    np.testing.assert_array_equal(np.stack(generate(*model, PROMPTS, 8, codec=codec).tokens), made)


# Compiled programs


def test_pieces_cover_a_prompt_in_few_lengths():
    lengths = set()
    for slots in range(16, 1600, 16):
        parts = pieces(slots)
        assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])] and parts[-1][1] == slots
        lengths |= {stop - start for start, stop in parts}
    assert lengths == {16, 32, 64, 128, 256}
    assert [padded(n) for n in (1, 16, 17)] == [16, 16, 32]


def test_many_prompts_of_many_lengths_trace_few_programs(monkeypatch):
    graphdef, params = model_of(Grouped(2, 1, head_dim=6))
    traced = []
    hidden = Decoder.hidden
    monkeypatch.setattr(
        Decoder, "hidden", lambda self, t, *rest: (traced.append(t.shape), hidden(self, t, *rest))[1]
    )
    for length in (1, 7, 16, 17, 31, 40, 63, 64, 70, 100, 127):
        for seed in (0, 1):
            prompt = np.arange(length) % VOCAB
            generate(graphdef, params, [prompt], 3 + seed, Sampling(0.5 + seed), seed, max_len=160)
    assert sorted(traced) == [(1, 1), (1, 16), (1, 32), (1, 64), (1, 128)]


def test_a_long_prompt_needs_no_square_of_temporaries():
    """2,048 tokens: scores of all against all are 32 MB a layer; pieces of 256 read 512 slots at a time."""
    graphdef, params = model_of(Grouped(2, 1, head_dim=6))
    cache = jax.eval_shape(lambda: nnx.merge(graphdef, params).init_cache(1, 2048, Exact()))
    ids = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    memory = module._prefill.lower(graphdef, params, cache, ids, ids).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 2048 * 2048 * 4 / 4
    assert memory.alias_size_in_bytes >= nbytes(cache.memory)


@pytest.mark.parametrize("length", [300, 700])
def test_a_long_prompt_in_pieces_is_the_same_prompt_at_once(length, error):
    graphdef, params = model_of(VARIANTS["grouped"])
    prompt = RNG.integers(0, VOCAB, length)
    session = Session(graphdef, params, 1, 1024)
    session.feed([prompt])
    model = nnx.merge(graphdef, params)
    right_V = jax.jit(lambda tokens_BT: model(tokens_BT)[0])(prompt[None].astype(np.int32))[0, -1]
    assert error(session._logits_BV[0], np.asarray(right_V, np.float64)) < 2e-4


# Windows


def test_a_ring_holds_its_window_and_sinks_and_no_more():
    """Against the band mask on the whole sequence: the ring is 10 slots however long the text."""
    graphdef, params = model_of(VARIANTS["windowed"])
    logits, session = forward_of(graphdef, params), Session(graphdef, params, 2, 1000)
    assert session.cache.max_len == 10
    session.feed([PROMPTS[2], PROMPTS[1]])
    size = nbytes(session.cache.memory)
    made = session.generate(17)
    for prompt, row in zip([PROMPTS[2], PROMPTS[1]], made.tokens):
        tokens = [*prompt, *row]
        np.testing.assert_array_equal(logits(tokens)[len(prompt) - 1 : -1].argmax(-1), row)
    assert nbytes(session.cache.memory) == size
    last = np.array([len(PROMPTS[2]) + 16, len(PROMPTS[1]) + 16])
    for row, t in zip(np.asarray(session.cache.positions_BS), last):
        assert sorted(row.tolist()) == [0, 1, 2, *range(t - 6, t + 1)]


def test_a_window_matters():
    """The same weights without a window make another text."""
    made = [np.stack(generate(*model_of(VARIANTS[n]), PROMPTS, 20).tokens) for n in ("windowed", "grouped")]
    assert (made[0] != made[1]).any()


@pytest.mark.parametrize("name", ["windowed", "windowed_mla", "windowed_low_rank"])
def test_a_ring_equals_the_band_for_every_split(name, error):
    """Logits at every position, in parts of 1, 3, 8 and 19 tokens, one row six tokens behind."""
    graphdef, params = model_of(VARIANTS[name])
    step = jax.jit(lambda params, ids, positions, cache: nnx.merge(graphdef, params)(ids, positions, cache))
    tokens_BT = RNG.integers(0, VOCAB, (2, 31)).astype(np.int32)
    positions_BT = np.arange(31)[None] - np.array([[0], [6]])
    positions_BT = np.where(positions_BT < 0, -1, positions_BT).astype(np.int32)
    logits = forward_of(graphdef, params)
    right = [logits(tokens_BT[0]), logits(tokens_BT[1, 6:])]
    for parts in ([1] * 31, [8, 1, 19, 3], [19, 1, 1, 1, 8, 1], [31]):
        cache, got, start = nnx.merge(graphdef, params).init_cache(2, 500, Exact()), [], 0
        for size in parts:
            now = slice(start, start + size)
            made, cache = step(params, tokens_BT[:, now], positions_BT[:, now], cache)
            got.append(np.asarray(made))
            start += size
        got = np.concatenate(got, axis=1)
        assert max(error(got[0], right[0]), error(got[1, 6:], right[1])) < 2e-5


# Refusals


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        (PROMPTS, {"num_tokens": 0}, "num_tokens=0 must be at least 1"),
        ([], {}, "prompts=0 must be at least 1"),
        ([[3], []], {}, "prompt 1 must have at least 1 token"),
        ([[1, VOCAB]], {}, "token 29 of prompt 0 must be at least 0 and below the vocabulary size 29"),
        ([[3], [1, -1]], {}, "token -1 of prompt 1 must be at least 0 and below the vocabulary size 29"),
        ([[0.5]], {}, "prompt 0 must hold integers, not float64"),
        (
            [[3] * 17],
            {"max_len": 40},
            "a prompt of 17 tokens (in 32 slots) and num_tokens=9 do not fit max_len=40",
        ),
        ([[3] * 70], {"max_len": 40}, "at most 0 tokens can follow it"),
        ([[3]], {"sampling": Sampling(1.0, top_k=30)}, "top_k=30 must be at most the vocabulary size 29"),
        ([[3]], {"seeds": [1, 2]}, "seeds=2 must be as many as the rows, 1"),
    ],
)
def test_impossible_arguments(gqa, monkeypatch, prompts, arguments, message):
    monkeypatch.setattr(module, "_decode", None)
    if "fit" not in message and "seeds" not in message:
        monkeypatch.setattr(module, "_prefill", None)
    with pytest.raises(ValueError) as error:
        generate(*gqa, prompts, **{"num_tokens": 9} | arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_cache_of_another_model_or_batch_is_refused(gqa):
    model = nnx.merge(*gqa)
    with pytest.raises(ValueError, match=r"built for another model or batch: .* is float32\[2, 2, 32, 10\], not"):
        Session(*gqa, 1, 32, cache=model.init_cache(2, 32, Exact()))
    other = nnx.merge(*model_of(VARIANTS["mla"]))
    with pytest.raises(ValueError, match="built for another model"):
        Session(*gqa, 1, 32, cache=other.init_cache(1, 32, Exact()))
    with pytest.raises(ValueError, match="prompts=2 must be as many as the rows of the cache, 1"):
        Session(*gqa, 1, 32).feed([[1], [2]])
    with pytest.raises(ValueError, match="nothing was fed"):
        Session(*gqa, 1, 32).generate(1)


def test_a_calibrated_codec_outlives_the_caches_that_it_was_given_to(gqa):
    """A cache is donated; layers share the codec's arrays, and it is used again."""
    codec = chain(haar(10, 0), Fp8.calibrated(3.0))
    made = [generate(*gqa, [[1, 2, 3]], 4, codec=codec).tokens[0].tolist() for _ in range(2)]
    assert made[0] == made[1] and len(made[0]) == 4
