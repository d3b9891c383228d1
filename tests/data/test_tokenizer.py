import json

import numpy as np
import pytest

from kvjax.data import DataConfig, documents, from_json, load_tokenizer
from kvjax.data.tokenizer import PATTERN, BPETokenizer, ByteTokenizer

NASTY = [
    "",
    " ",
    "   leading, and trailing   ",
    "\x00a\x00\x00",
    "tab\t\ttab\r\n\r\nline\n \n  end",
    "we'll they'RE 'twas o''clock",
    "1234567 $1,000.00 ½ ² Ⅷ 1790-2026",
    "naïve cafe\u0301 Ångström ÅÅ",
    "👩‍👩‍👧‍👦🏳️‍🌈 🇨🇭",
    "日本語のテキスト　全角 العربية עברית",
    "\ufeff\u200b\u00a0\u2028\ufffd\U0010ffff\uffff",
    "Ġ Ċ Ā ĀĠ â€™",  # GPT-2's stand-ins for bytes, as text
    "<|endoftext|>",
    "a<|endoftext|><|endoftext|> b",
    "".join(map(chr, range(0x250))),
]


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, small_bpe):
    return ByteTokenizer() if request.param == "bytes" else small_bpe


@pytest.mark.parametrize("text", NASTY)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_id not in ids
    np.testing.assert_array_equal(tokenizer.encode(text.encode()), ids)


def test_round_trip_of_whole_documents(tokenizer, sotu):
    for document in documents(sotu, "validation")[:3]:
        assert tokenizer.decode(tokenizer.encode(document)).encode() == document


def test_bytes_are_their_own_ids():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.end_id) == (257, 256)
    assert tokenizer.encode("aé\x00").tolist() == [97, 195, 169, 0]


def test_end_of_text(tokenizer, small_bpe):
    assert tokenizer.end_id == tokenizer.vocab_size - 1
    assert small_bpe.vocab_size == 512
    assert tokenizer.decode([tokenizer.end_id]) == "<|endoftext|>"
    assert len(tokenizer.encode("<|endoftext|>")) > 1


def test_pieces_are_the_bytes_of_each_id(tokenizer):
    for i in range(256):
        assert tokenizer.pieces.count(bytes([i])) == 1
    text = "the United States, ½"
    assert b"".join(tokenizer.pieces[i] for i in tokenizer.encode(text)) == text.encode()


def test_invalid_unicode_is_refused_with_its_place(tokenizer):
    with pytest.raises(ValueError, match=r"^text is not UTF-8 at byte 3: invalid start byte$"):
        tokenizer.encode(b"abc\xff")
    with pytest.raises(ValueError, match=r"^text is not UTF-8 at byte 1: unexpected end of data$"):
        tokenizer.encode(b"a\xe2\x82")
    with pytest.raises(ValueError, match=r"^text has a lone surrogate at character 2$"):
        tokenizer.encode("é \ud800")


def test_decode_refuses_what_is_no_id(tokenizer):
    size = tokenizer.vocab_size
    for bad in (-1, size, 10**6):
        with pytest.raises(ValueError, match=f"^id {bad} is outside the vocabulary of {size} ids$"):
            tokenizer.decode([65, bad])
    with pytest.raises(ValueError, match=r"^ids must be a vector of integers, not float64 of shape \(1,\)$"):
        tokenizer.decode([1.0])
    with pytest.raises(ValueError, match=r"of shape \(1, 1\)$"):
        tokenizer.decode([[1]])
    assert tokenizer.decode([]) == ""


def test_incomplete_utf8_decodes_to_the_replacement_character():
    assert ByteTokenizer().decode([97, 0xE2, 0x82]) == "a\ufffd"
    assert ByteTokenizer().decode([0xFF, 98]) == "\ufffdb"


def test_json_round_trip(tokenizer):
    again = from_json(tokenizer.to_json())
    assert again.digest == tokenizer.digest and again.pieces == tokenizer.pieces
    for text in NASTY:
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))


def test_digests_tell_tokenizers_apart(sotu, small_bpe):
    other = BPETokenizer.train(documents(sotu, "train")[:17], 509)
    assert len({other.digest, small_bpe.digest, ByteTokenizer().digest}) == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"kind": "words"}',
        '{"kind": "bpe"}',
        '{"kind": "bpe", "pattern": ".", "merges": ["ab"]}',
        '{"kind": "bpe", "pattern": ".", "merges": ["a b", "abc d"]}',
        '{"kind": "bpe", "pattern": "(", "merges": []}',
        '{"kind": "bpe", "pattern": ".", "merges": [], "extra": 1}',
    ],
)
def test_other_json_is_refused(text):
    with pytest.raises(ValueError, match=r"^not the JSON of a tokenizer"):
        from_json(text)


def test_training_is_deterministic(sotu, small_bpe):
    assert BPETokenizer.train(documents(sotu, "train")[:17], 512).digest == small_bpe.digest


def test_first_merges_are_the_most_frequent_pairs():
    tokenizer = BPETokenizer.train([b"abab abab abab abab abab xy xy xy"], 259)
    # Pairs: (a,b) 10, (b,a) 5, (space,a) 4, (space,x) 3, (x,y) 3. After ab: (ab,ab) 5.
    assert tokenizer.merges == (("a", "b"), ("ab", "ab"))
    assert [tokenizer.pieces[i] for i in tokenizer.encode("ababab")] == [b"abab", b"ab"]


def test_ids_are_those_of_the_library_that_trained(sotu, small_bpe):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    texts = [text.decode() for text in documents(sotu, "train")[:17]]
    peer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    peer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=511, initial_alphabet=sorted(alphabet), show_progress=False)
    peer.train_from_iterator(texts, trainer)
    for text in [*NASTY, *texts[:3]]:
        assert small_bpe.encode(text).tolist() == peer.encode(text).ids


def test_text_too_small_for_the_vocabulary():
    with pytest.raises(ValueError, match=r"^data.vocab_size=300 must be at most 259: the text has no more pairs"):
        BPETokenizer.train([b"ab ab ab"], 300)


def test_default_tokenizer_of_sotu(sotu):
    tokenizer = load_tokenizer(sotu)
    assert tokenizer.vocab_size == 4096
    (path,) = (sotu.folder() / "tokenizers").glob("sotu-bpe4096-*.json")
    written = path.stat().st_mtime_ns
    assert load_tokenizer(sotu).digest == tokenizer.digest and path.stat().st_mtime_ns == written
    text = b"".join(documents(sotu, "validation"))
    assert 4.25 < len(text) / len(tokenizer.encode(text)) < 4.27

    damaged = path.read_text()[:-7]
    path.write_text(damaged)
    with pytest.raises(ValueError, match=r"is damaged, delete it"):
        load_tokenizer(sotu)
    path.unlink()
    assert load_tokenizer(sotu).digest == tokenizer.digest


def test_bytes_need_no_data(tmp_path):
    config = DataConfig(name="no_such_dataset", tokenizer="bytes", data_dir=str(tmp_path))
    assert json.loads(load_tokenizer(config).to_json()) == {"kind": "bytes"}
    assert list(tmp_path.iterdir()) == []
