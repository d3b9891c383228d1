"""lm_eval's own code paths over a small model."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies' own
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.task import ConfigurableTask

from kvjax.attention.grouped import Grouped
from kvjax.codecs import Storage
from kvjax.data.tokenizer import BPETokenizer, ByteTokenizer
from kvjax.decoder import Decoder, DecoderConfig
from kvjax.downstream import LikelihoodScorer, encode, evaluate_task
from kvjax.generate import without_cache
from kvjax.harness import KVJaxLM
from kvjax.tasks import Item, Request

TOKENIZER = ByteTokenizer()
MAX_LEN = 30


@pytest.fixture(scope="module")
def drawn(draw_params):
    config, attention = DecoderConfig(width=23, depth=1, mlp_width=31), Grouped(6, 2, head_dim=10)
    graphdef, params = draw_params(lambda: Decoder(config, attention, 257, jax.random.key(0)))
    # Large, so that what a token attends to decides its prediction.
    return graphdef, jax.tree.map(lambda a: 2 * jnp.asarray(a), params)


@pytest.fixture(scope="module")
def logps(drawn, quick_jit):
    """Function to get log-probabilities [ids - 1] of every id after the first, in float64 from the logits on."""
    graphdef, params = drawn
    forward = quick_jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens)[0][0])

    def of(ids):
        padded = np.zeros((1, MAX_LEN), np.int32)
        padded[0, : len(ids) - 1] = ids[:-1]
        logits = np.asarray(forward(params, padded), np.float64)[: len(ids) - 1]
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return logps[np.arange(len(ids) - 1), ids[1:]], logits.argmax(-1) == ids[1:]

    return of


@pytest.fixture(scope="module")
def lm(drawn):
    return KVJaxLM(*drawn, TOKENIZER, MAX_LEN, [256], "decode", Storage(chunk=8), batch_size=2)


def instances(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_loglikelihoods(lm, logps):
    pairs = [("Two men", " fight."), ("Two men ", "fight."), ("", "It is."), ("A cube", "é")]
    for (context, continuation), (logp, greedy) in zip(
        pairs, lm.loglikelihood(instances("loglikelihood", *pairs))
    ):
        first = len(context.rstrip().encode())
        each, top = logps([256, *(context + continuation).encode()])
        assert logp == pytest.approx(each[first:].sum(), rel=2e-5) and greedy == top[first:].all()


def test_a_text_longer_than_the_model_reads_is_cut_into_windows(lm, logps):
    """lm_eval's: full ones one after the other, the last one filled up with what stands before it."""
    ids = list(b"A text of seventy bytes, which are more than twice what the model reads")[:70]
    first, second = [256, *ids[:30]], ids[29:60]
    last = ids[39:]  # predicts from 60 on
    expected = logps(first)[0].sum() + logps(second)[0].sum() + logps(last)[0][-10:].sum()
    short, empty = b"A short one", b""
    texts = [(bytes(ids).decode(),), (short.decode(),), (empty.decode(),)]
    rolled = lm.loglikelihood_rolling(instances("loglikelihood_rolling", *texts))
    assert rolled == pytest.approx([expected, logps([256, *short])[0].sum(), 0.0], rel=2e-5)


@pytest.fixture(scope="module")
def greedy(drawn):
    """Function to get the bytes that a context's greedy text has, each from the whole text before it."""

    def made(context, num_tokens):
        return list(without_cache(*drawn, [256, *context.encode()], num_tokens, stop=[256]))

    return made


def test_text_is_greedy_and_ends_before_its_stop_string(lm, greedy):
    contexts = ["Two men", "A cube", "He"]
    made = [TOKENIZER.decode(ids[:-1] if ids[-1] == 256 else ids) for ids in (greedy(c, 20) for c in contexts)]
    options = {"max_gen_toks": 20, "do_sample": False, "temperature": 0.0}
    whole = lm.generate_until(instances("generate_until", *((c, options | {"until": []}) for c in contexts)))
    assert whole == made
    assert all(len(text) > 12 for text in made)
    stops = [["", "no such", text[9:12], text[3:5]] for text in made]
    cut = lm.generate_until(
        instances("generate_until", *((c, options | {"until": s}) for c, s in zip(contexts, stops)))
    )
    assert cut == [text[: min(text.index(s[2]), text.index(s[3]))] for text, s in zip(made, stops)]
    assert any(text.index(s[3]) < text.index(s[2]) for text, s in zip(made, stops))


def test_text_ends_with_its_stop_token(drawn, greedy):
    ids = greedy("Two men", 9)
    lm = KVJaxLM(*drawn, TOKENIZER, MAX_LEN, [ids[4]], batch_size=2)
    (text,) = lm.generate_until(instances("generate_until", ("Two men", {"until": "no such", "max_gen_toks": 9})))
    assert text == TOKENIZER.decode(ids[: ids.index(ids[4])])


def test_every_kind_of_request_goes_through_the_codec(drawn, lm, zeros):
    zeroed = KVJaxLM(*drawn, TOKENIZER, MAX_LEN, codec=zeros, batch_size=2)
    options = {"until": [], "max_gen_toks": 9}
    for kind, arguments in (
        ("loglikelihood", ("Two men", " fight")),
        ("loglikelihood_rolling", ("Two men fight",)),
        ("generate_until", ("Two men", options)),
    ):
        (exact,), (wrecked,) = (getattr(m, kind)(instances(kind, arguments)) for m in (lm, zeroed))
        assert exact != wrecked and (kind == "generate_until" or np.abs(np.subtract(exact, wrecked)).max() > 0.5)


def test_what_cannot_be_done_is_refused(lm):
    for options, message in (
        ({"max_gen_toks": 23}, "request 0 has 8 tokens, which with max_gen_toks=23 are more than max_len=30"),
        ({"do_sample": True}, "request 0 asks for sampling"),
        ({"temperature": 0.5}, "request 0 asks for sampling"),
        ({"max_gen_tok": 3}, "'max_gen_tok' is unknown; did you mean 'max_gen_toks'"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.generate_until(instances("generate_until", ("Two men", options)))
    with pytest.raises(ValueError, match="request 1 has 31 tokens to read, more than max_len=30"):
        lm.loglikelihood(instances("loglikelihood", ("Two", " men"), ("x" * 30, "y")))


class Split(TemplateLM):
    """lm_eval's own way to cut a context from its continuation."""

    def __init__(self, tokenizer):
        super().__init__()
        self.text = tokenizer

    eot_token_id = 258

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return self.text.encode(string).tolist()

    def _loglikelihood_tokens(self, requests, **kwargs):
        raise NotImplementedError

    loglikelihood_rolling = generate_until = _loglikelihood_tokens


def test_the_seam_is_that_of_lm_eval():
    tokenizer = BPETokenizer([("a", "b"), ("Ġ", "a"), ("ab", "ab"), ("Ġ", "Ġ"), ("Ġa", "b")])
    theirs, rng = Split(tokenizer), np.random.default_rng(0)
    seen = 0
    for _ in range(300):
        context, continuation = ("".join(rng.choice([*"ab  \n"], n)) for n in rng.integers(1, 7, 2))
        left, right = theirs._encode_pair(context, continuation)
        if not right:
            with pytest.raises(ValueError, match="no token of its own"):
                encode(tokenizer, Request(context, continuation))
            continue
        window = encode(tokenizer, Request(context, continuation))
        assert window.ids[window.first :].tolist() == right and window.first == 1 + len(left)
        seen += 1
    assert seen > 250


ITEMS = [
    Item(i, tuple(Request(f"Q: {i}\nA:", f" {choice}") for choice in choices), i % 3)
    for i, choices in enumerate([["one", "a", "seven"], ["one", "é", "eleven"], ["two", "six", "ten"]] * 3)
]


def test_lm_eval_scores_its_own_tasks_as_we_do(lm, drawn):
    """Its evaluator over tasks of its own form: accuracies, perplexity, and standard errors over items."""
    import datasets

    rows = [
        {"question": item.doc_id, "choices": [r.continuation[1:] for r in item.requests], "gold": item.label}
        for item in ITEMS
    ]
    common = {
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "doc_to_text": "Q: {{question}}\nA:",
    }
    choice = common | {
        "task": "choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    word = common | {
        "task": "word",
        "output_type": "loglikelihood",
        "doc_to_target": " {{choices[gold]}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    }
    # Without iterations of its bootstrap it leaves out all standard errors; that of a mean is no bootstrap.
    evaluated = lambda config, iters: lm_eval.evaluate(
        lm, {config["task"]: ConfigurableTask(config=config)}, bootstrap_iters=iters
    )["results"][config["task"]]
    theirs = evaluated(choice, 1)
    scorer = LikelihoodScorer(*drawn, TOKENIZER)
    ours = evaluate_task(scorer, "piqa", ITEMS)
    assert 0 < ours.accuracy < 1 and ours.accuracy != ours.accuracy_norm
    assert theirs["acc,none"] == pytest.approx(ours.accuracy)
    assert theirs["acc_stderr,none"] == pytest.approx(ours.accuracy_se)
    assert theirs["acc_norm,none"] == pytest.approx(ours.accuracy_norm)
    assert theirs["acc_norm_stderr,none"] == pytest.approx(ours.accuracy_norm_se)
    ours = evaluate_task(scorer, "lambada", [Item(i.doc_id, (i.requests[i.label],), 0) for i in ITEMS])
    theirs = evaluated(word, 0)
    assert theirs["acc,none"] == ours.accuracy
    assert np.log(theirs["perplexity,none"]) == pytest.approx(np.log(ours.perplexity), rel=2e-5)
