"""Text to token ids and back: bytes, or byte-level pair encoding trained on the train split."""

import abc
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvjax.data.config import DataConfig
from kvjax.data.store import digest, file_name, locked
from kvjax.data.text import documents
from kvjax.files import atomic_file

END_OF_TEXT = b"<|endoftext|>"
"""How the end-of-text token reads when decoded; text that holds these characters never becomes the token."""

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the space or mark before it
    r"| ?\p{N}+"  # a number
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # white space
)
"""Chunks that merges stay within: GPT-4's pattern, but numbers whole. On sotu at 4,096 ids it gives 4.33
bytes a token (validation 4.26), GPT-4's own 4.32 (4.24), GPT-2's 4.26 (4.19)."""


class Tokenizer(abc.ABC):
    """Text to ids without loss: `pieces[i]` are the bytes that id i stands for, end of text the last."""

    def __init__(self, pieces: Sequence[bytes]):
        self.pieces = (*pieces, END_OF_TEXT)

    @property
    def vocab_size(self) -> int:
        """Number of ids, end of text included."""
        return len(self.pieces)

    @property
    def end_id(self) -> int:
        """The end-of-text token."""
        return len(self.pieces) - 1

    @property
    def begin_id(self) -> int:
        """The token before the first one of every document: end of text, where a model knows no other."""
        return self.end_id

    def encode(self, text: str | bytes) -> np.ndarray:
        """int32 ids of a text, without end of text; ValueError where it is not valid Unicode."""
        return np.asarray(self._encode(_valid(text)), dtype=np.int32)

    def decode(self, ids: Any) -> str:
        """Text of a vector of integers: incomplete UTF-8 reads as U+FFFD, unknown ids are ValueErrors."""
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(f"ids must be a vector of integers, not {array.dtype} of shape {array.shape}")
        for bad in array[(array < 0) | (array >= self.vocab_size)][:1]:
            raise ValueError(f"id {bad} is outside the vocabulary of {self.vocab_size} ids")
        return self._decode(array.tolist())

    def _decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")

    @property
    def digest(self) -> str:
        """SHA-256 hex of `to_json()`: equal where two tokenizers are the same."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @abc.abstractmethod
    def _encode(self, text: str) -> Any: ...

    @abc.abstractmethod
    def to_json(self) -> str:
        """Everything that `from_json` needs to build this tokenizer again."""

    @abc.abstractmethod
    def to_hugging_face(self) -> str:
        """A `tokenizer.json` that gives the same ids, and puts `begin_id` before a text."""


class ByteTokenizer(Tokenizer):
    """One id a UTF-8 byte, and 256 for end of text."""

    def __init__(self):
        super().__init__([bytes([b]) for b in range(256)])

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def to_json(self) -> str:
        """Only its kind: it has no parameters."""
        return json.dumps({"kind": "bytes"})

    def to_hugging_face(self) -> str:
        """Byte-level pair encoding without merges."""
        from tokenizers import models

        return _with_end_of_text(_hugging_face(models.BPE(vocab=_byte_alphabet(), merges=[]), PATTERN))


class BPETokenizer(Tokenizer):
    """Byte-level pair encoding: 256 bytes, one id for each distinct merge, and end of text.

    `merges` are pairs of strings in GPT-2's byte alphabet, the earliest learned first; `pattern` cuts the
    text into the chunks that merges stay within.
    """

    def __init__(self, merges: Sequence[tuple[str, str]], pattern: str = PATTERN):
        from tokenizers import models

        self.merges, self.pattern = tuple(merges), pattern
        alphabet = _byte_alphabet()
        words = list(dict.fromkeys([*sorted(alphabet), *(left + right for left, right in merges)]))
        super().__init__([bytes(alphabet[c] for c in word) for word in words])
        vocab = {word: i for i, word in enumerate(words)}
        self._model = _hugging_face(models.BPE(vocab=vocab, merges=list(self.merges)), pattern)

    @classmethod
    def train(cls, texts: Sequence[bytes], vocab_size: int) -> "BPETokenizer":
        """Learn the merges that leave `vocab_size` ids; the same texts give the same tokenizer.

        Raises ValueError where the texts have too few distinct pairs for so many ids.
        """
        from tokenizers import models, trainers

        model = _hugging_face(models.BPE(), PATTERN)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=sorted(_byte_alphabet()),
            show_progress=False,
        )
        model.train_from_iterator(map(_valid, texts), trainer)
        tokenizer = cls([tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]])
        if tokenizer.vocab_size != vocab_size:
            most = tokenizer.vocab_size
            raise ValueError(f"data.vocab_size={vocab_size} must be at most {most}: the text has no more pairs")
        return tokenizer

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def to_json(self) -> str:
        """The pattern and the merges, from which the ids follow."""
        merges = [" ".join(pair) for pair in self.merges]
        return json.dumps({"kind": "bpe", "pattern": self.pattern, "merges": merges})

    def to_hugging_face(self) -> str:
        """The model that encodes, with end of text as a special token."""
        from tokenizers import Tokenizer

        return _with_end_of_text(Tokenizer.from_str(self._model.to_str()))


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of Hugging Face; special tokens are ids that no text encodes to.

    `vocab_size` is the model's, whose last ids may be padding, which decodes to nothing. ValueError where
    the text is no tokenizer, or an id is outside of the vocabulary.
    """

    def __init__(self, text: str, begin_id: int | None, end_id: int, vocab_size: int):
        from tokenizers import Tokenizer

        try:
            self._model = Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises no narrower class.
            raise ValueError(f"not a tokenizer.json: {error}") from error
        self._model.encode_special_tokens = True  # text that looks like one stays text
        self._model.no_truncation()
        self._model.no_padding()
        highest = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1)
        if highest >= vocab_size:
            raise ValueError(f"a tokenizer with the id {highest} needs a vocab_size above {vocab_size}")
        self._size = vocab_size
        self._begin_id, self._end_id = end_id if begin_id is None else begin_id, end_id
        special = {i for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        for name, token in (("begin_id", self._begin_id), ("end_id", end_id)):
            if token not in special:
                raise ValueError(f"{name}={token} must be a special token: {sorted(special)[:8]} are")

    @property
    def vocab_size(self) -> int:
        """Number of the model's ids."""
        return self._size

    @property
    def end_id(self) -> int:
        """The end-of-text token."""
        return self._end_id

    @property
    def begin_id(self) -> int:
        """The token before the first one of every document."""
        return self._begin_id

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text, special ones too."""
        return self._model.token_to_id(token)

    def _encode(self, text: str) -> list[int]:
        try:
            return self._model.encode(text, add_special_tokens=False).ids
        except Exception as error:  # tokenizers raises no narrower class.
            raise ValueError(f"the tokenizer cannot encode this text: {error}") from error

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)

    def to_json(self) -> str:
        """The `tokenizer.json`, and what it does not name."""
        ids = {"begin_id": self._begin_id, "end_id": self._end_id, "vocab_size": self._size}
        return json.dumps({"kind": "hugging_face", **ids, "tokenizer": json.loads(self.to_hugging_face())})

    def to_hugging_face(self) -> str:
        """As it was given, but for spaces."""
        return self._model.to_str()


def from_json(text: str) -> Tokenizer:
    """The tokenizer whose `to_json` this is; ValueError where it is none."""
    try:
        fields = json.loads(text)
        if fields == {"kind": "bytes"}:
            return ByteTokenizer()
        if fields["kind"] == "bpe" and len(fields) == 3:
            pairs = [merge.split(" ") for merge in fields["merges"]]
            return BPETokenizer([(left, right) for left, right in pairs], fields["pattern"])
        if fields["kind"] == "hugging_face" and len(fields) == 5:
            ids = (fields[name] for name in ("begin_id", "end_id", "vocab_size"))
            return HuggingFaceTokenizer(json.dumps(fields["tokenizer"]), *ids)
    except Exception as error:  # tokenizers raises no narrower class.
        raise ValueError(f"not the JSON of a tokenizer: {error}") from error
    raise ValueError("not the JSON of a tokenizer: its kind must be 'bpe', 'bytes' or 'hugging_face'")


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer of a configuration: trained once on the train split, in seconds, and kept on disk."""
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    texts = documents(config, "train")
    key = digest([PATTERN.encode(), *texts])[:16]
    path = config.folder() / "tokenizers" / f"{file_name(config.name)}-bpe{config.vocab_size}-{key}.json"
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            with atomic_file(path) as file:
                file.write(BPETokenizer.train(texts, config.vocab_size).to_json().encode())
    try:
        return from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, delete it: {error}") from error


def _valid(text: str | bytes) -> str:
    """The text as str, or ValueError with the place of what is not Unicode."""
    try:
        if isinstance(text, bytes):
            return text.decode("utf-8")
        text.encode("utf-8")
        return text
    except UnicodeDecodeError as error:
        raise ValueError(f"text is not UTF-8 at byte {error.start}: {error.reason}") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"text has a lone surrogate at character {error.start}") from None


def _hugging_face(model: Any, pattern: str) -> Any:
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _with_end_of_text(tokenizer: Any) -> str:
    """As JSON, end of text the last id, a special token, and before every text."""
    from tokenizers import AddedToken, decoders, processors

    name = END_OF_TEXT.decode()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A $B", special_tokens=[(name, tokenizer.token_to_id(name))]
    )
    return tokenizer.to_str()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next letter from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}
