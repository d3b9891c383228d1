"""Tokenizers in Hugging Face's form, and texts cut to a number of tokens."""

import json

import numpy as np
import pytest

from kvjax.data.batches import Corpus, first_of_each, first_tokens, tokenize
from kvjax.data.tokenizer import BPETokenizer, ByteTokenizer, HuggingFaceTokenizer, from_json

TEXTS = [b"heads that share their keys, heads that share their values " * 9]


@pytest.fixture(scope="module")
def ours():
    return BPETokenizer.train(TEXTS, 280)


@pytest.fixture(scope="module")
def theirs(ours):
    return HuggingFaceTokenizer(ours.to_hugging_face(), None, 279, 300)


@pytest.mark.parametrize("text", ["", "heads that share", "naïve ½\n\n  \t7", "<|endoftext|> is text"])
def test_the_same_ids_as_ours(ours, theirs, text):
    np.testing.assert_array_equal(theirs.encode(text), ours.encode(text))
    assert theirs.decode(theirs.encode(text)) == text


def test_special_tokens_are_ids_that_text_never_becomes(ours, theirs):
    assert theirs.token_id("<|endoftext|>") == theirs.end_id == theirs.begin_id == ours.end_id == 279
    assert 279 not in theirs.encode("<|endoftext|>")
    assert theirs.decode([279]) == "<|endoftext|>"


def test_a_foreign_reader_puts_the_beginning_before_a_text(ours):
    from tokenizers import Tokenizer

    for tokenizer in (ours, ByteTokenizer()):
        read = Tokenizer.from_str(tokenizer.to_hugging_face())
        assert read.encode("heads").ids == [tokenizer.begin_id, *tokenizer.encode("heads")]
        assert read.decode(tokenizer.encode("héads")) == "héads"


def test_ids_of_padding_decode_to_nothing(theirs):
    assert theirs.vocab_size == 300 and theirs.decode([299, *theirs.encode("keys")]) == "keys"
    with pytest.raises(ValueError, match=r"^id 300 is outside the vocabulary of 300 ids$"):
        theirs.decode([300])


def test_json_round_trip(theirs):
    again = from_json(theirs.to_json())
    assert again.digest == theirs.digest and again.vocab_size == 300
    np.testing.assert_array_equal(again.encode("share their"), theirs.encode("share their"))


def test_what_is_no_tokenizer_is_refused(ours):
    good = ours.to_hugging_face()
    for text, begin, end, size, message in [
        ("{}", 1, 1, 300, "not a tokenizer.json"),
        (good, None, 300, 300, r"begin_id=300 must be a special token: \[279\] are"),
        (good, 1, 279, 300, r"begin_id=1 must be a special token: \[279\] are"),
        (good, 1, 1, 279, "a tokenizer with the id 279 needs a vocab_size above 279"),
    ]:
        with pytest.raises(ValueError, match=message):
            HuggingFaceTokenizer(text, begin, end, size)


def test_a_tokenizer_that_loses_text_is_refused(ours):
    lossy = json.loads(ours.to_hugging_face())
    lossy["normalizer"] = {"type": "Lowercase"}
    tokenizer = HuggingFaceTokenizer(json.dumps(lossy), None, 279, 280)
    assert tokenize(tokenizer, [b"small"]).num_bytes.tolist() == [5]
    with pytest.raises(ValueError, match="loses something of document 1: its tokens do not spell the text"):
        tokenize(tokenizer, [b"small", b"Large"])


def test_a_text_in_tokens():
    corpus = tokenize(ByteTokenizer(), [b"ab", b"", b"\xc3\xa9c"])
    assert corpus.ids.tolist() == [256, 97, 98, 256, 256, 0xC3, 0xA9, 99]
    assert corpus.starts.tolist() == [0, 3, 4, 8] and corpus.num_bytes.tolist() == [2, 0, 3]


@pytest.mark.parametrize(
    ("tokens", "starts", "num_bytes"),
    [
        (1, [0, 2], [1]),
        (2, [0, 3], [2]),
        (3, [0, 3, 4, 6], [2, 0, 0]),  # half of é
        (4, [0, 3, 4, 7], [2, 0, 2]),
        (5, [0, 3, 4, 8], [2, 0, 3]),
    ],
)
def test_the_first_tokens(tokens, starts, num_bytes):
    corpus = tokenize(ByteTokenizer(), [b"ab", b"", b"\xc3\xa9c"])
    cut = first_tokens(corpus, ByteTokenizer(), tokens)
    assert isinstance(cut, Corpus) and cut.starts.tolist() == starts and cut.num_bytes.tolist() == num_bytes
    assert cut.ids.tolist() == corpus.ids[: starts[-1]].tolist()


@pytest.mark.parametrize(
    ("tokens", "counts", "num_bytes"),
    [(3, [1, 0, 2], [1, 0, 2]), (4, [2, 0, 2], [2, 0, 2]), (5, [2, 0, 3], [2, 0, 3])],
)
def test_the_first_tokens_of_each_document(tokens, counts, num_bytes):
    """As evenly as documents of 2, 0 and 3 tokens go; what one lacks the longer ones give."""
    corpus = tokenize(ByteTokenizer(), [b"ab", b"", b"\xc3\xa9c"])
    cut = first_of_each(corpus, ByteTokenizer(), tokens)
    assert (np.diff(cut.starts) - 1).tolist() == counts and cut.num_bytes.tolist() == num_bytes
    heads = [corpus.ids[start : start + 1 + n] for start, n in zip(corpus.starts, counts)]
    assert cut.ids.tolist() == np.concatenate(heads).tolist()


@pytest.mark.parametrize("tokens", [2, 6])
def test_every_document_has_a_token_to_give(tokens):
    with pytest.raises(ValueError, match=f"num_tokens={tokens} must be at least 3, one a document, and at most 5"):
        first_of_each(tokenize(ByteTokenizer(), [b"ab", b"", b"\xc3\xa9c"]), ByteTokenizer(), tokens)


def test_no_more_tokens_than_there_are():
    corpus = tokenize(ByteTokenizer(), [b"ab"])
    for tokens, message in ((0, "num_tokens=0 must be at least 1"), (3, "num_tokens=3 must be at most 2")):
        with pytest.raises(ValueError, match=message):
            first_tokens(corpus, ByteTokenizer(), tokens)
