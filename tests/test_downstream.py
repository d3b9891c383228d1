"""V vocabulary, D width."""

import copy
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.attention.grouped import Grouped
from kvjax.codecs import Storage
from kvjax.data.tokenizer import BPETokenizer, ByteTokenizer
from kvjax.decoder import Decoder, DecoderConfig
from kvjax.downstream import Likelihoods, LikelihoodScorer, encode, evaluate_task, grade
from kvjax.tasks import Item, Request

TOKENIZER = ByteTokenizer()
REQUESTS = [
    Request("Two men", " fight robots."),
    Request("", "Nothing stands before this."),
    Request("It ends with spaces \n ", "é and more"),
    Request("It is as long as a row of 33 tok", "."),
    Request("It is longer than 32 tokens", ", as its answer is so long."),
    Request("a", "b"),
]


@pytest.fixture(scope="module")
def drawn(draw_params):
    config, attention = DecoderConfig(width=23, depth=1, mlp_width=31), Grouped(6, 2, head_dim=10)
    graphdef, params = draw_params(lambda: Decoder(config, attention, 257, jax.random.key(0)))
    return graphdef, jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def direct(drawn, quick_jit):
    """Nats and greediness of each request, one at a time, without padding, in float64 from the logits on."""
    graphdef, params = drawn
    forward = quick_jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens)[0][0])
    results = []
    for context, continuation in REQUESTS:
        text = (context + continuation).encode()
        ids = np.array([256, *text], np.int32)
        logits = np.asarray(forward(params, ids[None, :-1]), np.float64)
        first = len(context.rstrip().encode())
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = np.arange(first, len(text))
        results.append((-logps[places, ids[1:][places]].sum(), (logits.argmax(-1) == ids[1:])[places].all()))
    return Likelihoods(*map(np.array, zip(*results)))


@pytest.mark.parametrize(
    ("through", "codec", "batch_tokens"),
    [("none", None, 2048), ("prefill", None, 64), ("decode", Storage(chunk=6), 192)],
)
def test_likelihoods_equal_a_plain_sum(drawn, direct, through, codec, batch_tokens):
    batches = []
    scorer = LikelihoodScorer(*drawn, TOKENIZER, through, codec, batch_tokens=batch_tokens)
    scored = scorer.score(REQUESTS, track=lambda items: batches.extend(items) or items)
    np.testing.assert_allclose(scored.nats, direct.nats, rtol=2e-5)
    np.testing.assert_array_equal(scored.greedy, direct.greedy)
    assert sorted(i for _, _, members in batches for i in members) == list(range(len(REQUESTS)))
    # On two devices: rows of 32 and 64 tokens.
    lengths = {2048: {(64, 32), (32, 64)}, 64: {(64, 2), (32, 2)}, 192: {(64, 2), (32, 6)}}[batch_tokens]
    assert {(length, rows) for length, rows, _ in batches} == lengths
    assert scorer._scorer._cache_size() == len(lengths)


def test_the_seam_is_cut_where_the_context_alone_would_end():
    tokenizer = BPETokenizer([("a", "b"), ("Ġ", "a")])
    a, b, space, ab, space_a, begin = *map(tokenizer.pieces.index, (b"a", b"b", b" ", b"ab", b" a")), 258
    for request, ids, first in (
        (Request("b", " a"), [begin, b, space_a], 2),
        (Request("b ", "a"), [begin, b, space_a], 2),  # the space goes to the continuation
        (Request("b  ", "a"), [begin, b, space, space_a], 2),
        (Request("ab a", "b"), [begin, ab, space, ab], 2 + 1),  # as " ab" is not " a" and "b"
        (Request("", "ab"), [begin, ab], 1),
        (Request(" ", "ab"), [begin, space, ab], 1),
    ):
        window = encode(tokenizer, request)
        assert (window.ids.tolist(), window.first) == (ids, first), request
    with pytest.raises(ValueError, match="continuation='b' has no token of its own"):
        encode(tokenizer, Request("a", "b"))
    assert a != b


CHOICES = [
    Item(3, (Request("", " abcd"), Request("", " ab"), Request("", " abcdefgh")), 0),
    Item(5, (Request("", " a"), Request("", " abcd")), 1),
    Item(6, (Request("", " ab"), Request("", " ab")), 1),
    Item(9, (Request("", " ab"), Request("", " éé")), 0),
]
NATS = np.array([8.0, 9.0, 9.0, 2.0, 6.0, 3.0, 2.0, 1.0, 1.0])


def test_accuracy_by_hand():
    """Per character: [2, 4.5, 1.125], [2, 1.5], [1.5, 1], [0.5, 0.5]; of equal ones the first counts."""
    score = grade("hellaswag", CHOICES, Likelihoods(NATS, np.zeros(9, bool)))
    assert score.correct.tolist() == [True, False, True, True] and score.doc_ids.tolist() == [3, 5, 6, 9]
    assert score.correct_norm is not None and score.correct_norm.tolist() == [False, True, True, True]
    assert score.accuracy == score.accuracy_norm == 0.75
    # Squared deviations: 3 of 1/16 and 1 of 9/16, over n - 1 = 3, over n = 4.
    assert score.accuracy_se == pytest.approx(math.sqrt(12 / 16 / 3 / 4), rel=1e-14)
    assert score.accuracy_norm_se == score.accuracy_se
    assert score.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 2 + 1 / 2) / 4, rel=1e-15)
    assert score.nats.tolist() == [8.0, 6.0, 2.0, 1.0]
    assert score.perplexity is None and score.perplexity_se is None
    row = score.row()
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert (row["items"], row["accuracy"], row["perplexity"]) == (4, 0.75, None)


def test_winogrande_has_one_continuation():
    score = grade("winogrande", CHOICES[1:], Likelihoods(NATS[3:], np.zeros(6, bool)))
    assert score.accuracy == 2 / 3 and score.accuracy_norm is None and score.chance == 0.5


def test_last_words_by_hand():
    items = [Item(i, (Request("I", " am"),), 0) for i in range(3)]
    score = grade("lambada", items, Likelihoods(np.array([1.0, 2.0, 3.0]), np.array([True, False, True])))
    assert score.accuracy == 2 / 3 and score.accuracy_norm is None and score.chance is None
    assert score.accuracy_se == pytest.approx(math.sqrt(2 / 9 / 2), rel=1e-14)
    assert score.perplexity == pytest.approx(math.e**2, rel=1e-15)
    # The nats' standard deviation is 1, their mean's standard error 1 / sqrt(3).
    assert score.perplexity_se == pytest.approx(math.e**2 / math.sqrt(3), rel=1e-14)


def test_what_is_no_number_is_null():
    one = grade("lambada", [Item(0, (Request("I", " am"),), 0)], Likelihoods(np.array([1e3]), np.array([False])))
    assert one.perplexity == math.inf and math.isnan(one.accuracy_se)
    row = one.row()
    assert row["perplexity"] is row["perplexity_se"] is row["accuracy_se"] is row["chance"] is None
    assert row["accuracy"] == 0.0


@pytest.fixture(scope="module")
def copier():
    """One layer that adds the mean of all tokens so far: letters a to d get large logits, a dot a small one."""
    config = DecoderConfig(width=8, depth=1, mlp_width=2, tie_embeddings=False)
    decoder = lambda: Decoder(config, Grouped(1, 1, head_dim=8), 257, jax.random.key(0))
    graphdef, shapes = nnx.split(nnx.eval_shape(decoder))
    letters_VD = np.zeros((257, 8), np.float32)
    letters_VD[list(b"abcd"), range(4)] = 1.0
    others_VD = np.zeros((257, 8), np.float32)
    others_VD[np.setdiff1d(np.arange(257), list(b"abcd")), 4] = 1.0
    dot_VD = np.where(np.arange(257)[:, None] == ord("."), others_VD, 0)
    identity = np.eye(8, dtype=np.float32)
    values = {
        "embedding_VD": letters_VD + others_VD,
        "unembedding_VD": 30 * letters_VD + 0.1 * dot_VD,
        "v_DKH": identity[:, None],
        "o_NHD": identity[None],
    }

    def fill(path, leaf):
        name = path[-2].key
        value = values[name] if name in values else np.full(leaf.shape, "gain" in name, leaf.dtype)
        assert value.shape == leaf.shape
        return jnp.asarray(value)

    return graphdef, jax.tree_util.tree_map_with_path(fill, shapes)


CONTEXTS = ["{}...", "....{}.", "{}.......................", "a{0}b{0}c{0}d."]
COPY = {
    # The letter in the context, of four; a fixed choice is right once in four.
    "hellaswag": [
        Item(i, tuple(Request(context.format(letter), choice) for choice in "abcd"), label)
        for i, context in enumerate(CONTEXTS)
        for label, letter in enumerate("abcd")
    ],
    # The context that has the continuation's letter, of two.
    "winogrande": [
        Item(i, tuple(Request(CONTEXTS[i].format(letter), "b") for letter in letters), letters.index("b"))
        for i in range(4)
        for letters in ("bc", "ab")
    ],
    "lambada": [Item(i, (Request(CONTEXTS[i].format(letter), letter),), 0) for i in range(4) for letter in "abcd"],
}


@pytest.fixture(scope="module")
def copying(copier):
    """Function to get a scorer of the copying model."""
    return functools.cache(lambda through, codec=None: LikelihoodScorer(*copier, TOKENIZER, through, codec))


@pytest.mark.parametrize(("task", "chance"), [("hellaswag", 0.25), ("winogrande", 0.5), ("lambada", None)])
@pytest.mark.parametrize("through", ["prefill", "decode"])
def test_a_zeroed_cache_leaves_chance(copying, zeros, task, chance, through):
    exact = evaluate_task(copying(through), task, COPY[task])
    zeroed = evaluate_task(copying(through, zeros), task, COPY[task])
    assert exact.accuracy == 1.0 and exact.chance == chance
    assert zeroed.accuracy == (chance or 0.0)


def test_without_a_cache_there_is_nothing_to_zero(copying, zeros):
    assert evaluate_task(copying("none", zeros), "hellaswag", COPY["hellaswag"]).accuracy == 1.0


def test_an_answer_is_greedy_if_every_token_is(copying):
    """After a single b the model makes b for ever."""
    answers = ("b", "bbb", "abb", "bab", "bba", ".")
    scored = copying("prefill").score([Request("..b..", answer) for answer in answers])
    assert scored.greedy.tolist() == [True, True, False, False, False, False]


def test_requests_are_refused_by_name(copying):
    """Not truncated: what fits to the last token is scored as without a limit."""
    limited = copy.copy(copying("prefill"))
    limited.max_len = 13
    items = [Item(7, (Request("Two men", " fight"), Request("Two men", " fights")), 0)]
    with pytest.raises(ValueError, match="piqa item 7 choice 1 has 14 tokens to read, more than max_len=13"):
        evaluate_task(limited, "piqa", items)
    with pytest.raises(ValueError, match="request 1: continuation='' has no token of its own"):
        limited.score([Request("ab", "c"), Request("a", "")])
    with pytest.raises(ValueError, match="items=0 must be at least 1"):
        evaluate_task(limited, "piqa", [])
    fits = items[0].requests[:1]
    assert limited.score(fits).nats == copying("prefill").score(fits).nats
