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
        """The end-of-text token, which also stands before the first token of every document."""
        return len(self.pieces) - 1

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
        return b"".join(self.pieces[i] for i in array.tolist()).decode("utf-8", errors="replace")

    @property
    def digest(self) -> str:
        """SHA-256 hex of `to_json()`: equal where two tokenizers are the same."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @abc.abstractmethod
    def _encode(self, text: str) -> Any: ...

    @abc.abstractmethod
    def to_json(self) -> str:
        """Everything that `from_json` needs to build this tokenizer again."""


class ByteTokenizer(Tokenizer):
    """One id a UTF-8 byte, and 256 for end of text."""

    def __init__(self):
        super().__init__([bytes([b]) for b in range(256)])

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def to_json(self) -> str:
        """Only its kind: it has no parameters."""
        return json.dumps({"kind": "bytes"})


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


def from_json(text: str) -> Tokenizer:
    """The tokenizer whose `to_json` this is; ValueError where it is none."""
    try:
        fields = json.loads(text)
        if fields == {"kind": "bytes"}:
            return ByteTokenizer()
        if fields["kind"] == "bpe" and len(fields) == 3:
            pairs = [merge.split(" ") for merge in fields["merges"]]
            return BPETokenizer([(left, right) for left, right in pairs], fields["pattern"])
    except Exception as error:  # tokenizers raises no narrower class.
        raise ValueError(f"not the JSON of a tokenizer: {error}") from error
    raise ValueError("not the JSON of a tokenizer: its kind must be 'bpe' or 'bytes'")


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


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next letter from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}
