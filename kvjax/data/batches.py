"""Windows of tokens, by number: B rows of a batch, T tokens of a window.

A training batch is a function of (seed, step) and nothing else, so a resumed run needs no iterator state.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from kvjax.checks import at_least
from kvjax.data.config import DataConfig
from kvjax.data.store import digest, file_name
from kvjax.data.text import documents
from kvjax.data.tokenizer import Tokenizer
from kvjax.files import atomic_file


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens of a split: document d is `ids[starts[d]:starts[d + 1]]`, end of text first, then its text."""

    ids: np.ndarray
    """int32, all documents one after another."""

    starts: np.ndarray
    """int64 [documents + 1], offsets into `ids`, the last being its length."""

    num_bytes: np.ndarray
    """int64 [documents], UTF-8 bytes of each document's text."""

    def __post_init__(self) -> None:
        assert self.ids.dtype == np.int32 and self.starts.dtype == self.num_bytes.dtype == np.int64
        assert len(self.starts) == len(self.num_bytes) + 1
        assert self.starts[0] == 0 and self.starts[-1] == len(self.ids) and (np.diff(self.starts) >= 1).all()


def load_corpus(config: DataConfig, tokenizer: Tokenizer, split: str) -> Corpus:
    """Tokens of a split, encoded once for each tokenizer and kept in the data folder."""
    texts = documents(config, split)
    key = digest([tokenizer.digest.encode(), *texts])[:16]
    path = config.folder() / "tokens" / f"{file_name(config.name)}-{split}-{key}.npy"
    if not path.exists():
        corpus = tokenize(tokenizer, texts)
        with atomic_file(path) as file:
            np.save(file, corpus.ids, allow_pickle=False)
        return corpus
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged, delete it: {error}") from error
    # Text never encodes to the token that begins a document, so the offsets need not be stored.
    starts = np.append(np.flatnonzero(ids == tokenizer.begin_id), len(ids))
    known = len(starts) == len(texts) + 1 and ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    if not (known and _misspelled(tokenizer, ids, starts, texts) is None):
        raise ValueError(f"{path} is damaged, delete it: its tokens do not spell the text")
    return Corpus(ids, starts, _lengths(texts))


def tokenize(tokenizer: Tokenizer, texts: Sequence[bytes]) -> Corpus:
    """Tokens of texts in UTF-8; ValueError where they do not spell the text."""
    parts = [part for text in texts for part in ([tokenizer.begin_id], tokenizer.encode(text))]
    ids = np.concatenate(parts, dtype=np.int32, casting="same_kind")
    starts = np.cumsum([0, *(1 + len(part) for part in parts[1::2])], dtype=np.int64)
    wrong = _misspelled(tokenizer, ids, starts, texts)
    if wrong is not None:
        raise ValueError(f"the tokenizer loses something of document {wrong}: its tokens do not spell the text")
    return Corpus(ids, starts, _lengths(texts))


def first_tokens(corpus: Corpus, tokenizer: Tokenizer, num_tokens: int) -> Corpus:
    """The first `num_tokens` predicted tokens: whole documents, and the beginning of one; ValueError if fewer."""
    at_least("num_tokens", num_tokens, 1)
    predicted = np.diff(corpus.starts) - 1
    if num_tokens > predicted.sum():
        raise ValueError(f"num_tokens={num_tokens} must be at most {predicted.sum()}, all that the text has")
    last = int(np.searchsorted(np.cumsum(predicted), num_tokens))
    return _cut(corpus, tokenizer, np.append(predicted[:last], num_tokens - predicted[:last].sum()))


def first_of_each(corpus: Corpus, tokenizer: Tokenizer, num_tokens: int) -> Corpus:
    """The first tokens of every document, as evenly as they go, `num_tokens` in all; ValueError for fewer."""
    predicted = np.diff(corpus.starts) - 1
    if not len(predicted) <= num_tokens <= predicted.sum():
        raise ValueError(
            f"num_tokens={num_tokens} must be at least {len(predicted)}, one a document, and at most "
            f"{predicted.sum()}, all that the text has"
        )
    counts, left = np.zeros_like(predicted), num_tokens
    for rank, document in enumerate(np.argsort(predicted, kind="stable")):
        counts[document] = min(predicted[document], left // (len(predicted) - rank))
        left -= counts[document]
    return _cut(corpus, tokenizer, counts)


def _cut(corpus: Corpus, tokenizer: Tokenizer, counts: np.ndarray) -> Corpus:
    """The first documents, each with so many predicted tokens."""
    spans = [(start, start + 1 + count) for start, count in zip(corpus.starts.tolist(), counts.tolist())]
    starts = np.cumsum([0, *(stop - start for start, stop in spans)], dtype=np.int64)
    # Of a character that a cut parts, no byte counts.
    text = lambda start, stop: tokenizer.decode(corpus.ids[start + 1 : stop]).rstrip("\ufffd")
    whole = corpus.starts[1 : len(spans) + 1].tolist()
    num_bytes = [
        int(corpus.num_bytes[d]) if stop == whole[d] else len(text(start, stop).encode())
        for d, (start, stop) in enumerate(spans)
    ]
    ids = np.concatenate([corpus.ids[start:stop] for start, stop in spans])
    return Corpus(ids, starts, np.array(num_bytes, np.int64))


def _lengths(texts: Sequence[bytes]) -> np.ndarray:
    return np.array([len(text) for text in texts], dtype=np.int64)


def _misspelled(tokenizer: Tokenizer, ids: np.ndarray, starts: np.ndarray, texts: Sequence[bytes]) -> int | None:
    """The first document that its tokens do not spell."""
    spans = zip(starts[:-1] + 1, starts[1:])
    spelled = (tokenizer.decode(ids[i:j]).encode() == text for (i, j), text in zip(spans, texts))
    return next((d for d, right in enumerate(spelled) if not right), None)


class TrainBatches:
    """Shuffled training windows: `batches[step]` is `{tokens_BT, targets_BT}`, int32, for any step >= 0.

    The documents form a ring, so that every window is full. Each epoch cuts the ring at a different place and
    visits its `len(ids) // context` windows once, in a different order; a batch may span two epochs. Only raw
    bits of NumPy's Philox are used, which NumPy keeps the same in every version. Iteration never ends.
    """

    def __init__(self, corpus: Corpus, context: int, batch_size: int, seed: int):
        _check(context=context, batch_size=batch_size)
        if seed < 0:
            raise ValueError(f"seed={seed} must be at least 0")
        if len(corpus.ids) < context + 1:
            raise ValueError(
                f"data.context={context} must be less than the {len(corpus.ids)} tokens of the corpus"
            )
        self.corpus, self.context, self.batch_size, self.seed = corpus, context, batch_size, seed
        self.windows_per_epoch = len(corpus.ids) // context
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start..stop of the batch of a step, for a host that holds only these."""
        if step < 0 or not 0 <= start <= stop <= self.batch_size:
            raise ValueError(f"rows {start}:{stop} of step {step}: must lie in 0:{self.batch_size}, step >= 0")
        first = [self._window(step * self.batch_size + row) for row in range(start, stop)]
        columns = np.array(first, dtype=np.int64).reshape(-1, 1) + np.arange(self.context + 1)
        rows = self.corpus.ids[columns % len(self.corpus.ids)]
        return {"tokens_BT": rows[:, :-1], "targets_BT": rows[:, 1:]}

    def _window(self, index: int) -> int:
        """Where the window starts that is `index`th since the beginning of training."""
        epoch, place = divmod(index, self.windows_per_epoch)
        cut, order = self._epoch(epoch)
        return cut + int(order[place]) * self.context

    def _draw_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        bits = np.random.Philox(np.random.SeedSequence((self.seed, epoch)))
        cut = int(bits.random_raw()) % len(self.corpus.ids)
        return cut, np.argsort(bits.random_raw(self.windows_per_epoch), kind="stable")


def eval_batches(corpus: Corpus, context: int, batch_size: int) -> list[dict[str, np.ndarray]]:
    """Batches that predict every token of every document's text exactly once, and end of text never.

    Each document is cut into consecutive windows of `context` predicted tokens, the first of which starts
    from end of text. `tokens_BT`, `targets_BT`: int32; `weights_BT`: float32, 1 where the target counts and 0
    in padding; `document_B`: int32, index of the row's document, -1 in rows that only fill the last batch.
    """
    _check(context=context, batch_size=batch_size)
    windows = [
        (document, first, min(first + context, int(stop) - 1))
        for document, (start, stop) in enumerate(zip(corpus.starts[:-1], corpus.starts[1:]))
        for first in range(int(start), int(stop) - 1, context)
    ]
    batches = []
    for at in range(0, len(windows), batch_size):
        shape = (batch_size, context)
        batch = {
            "tokens_BT": np.zeros(shape, np.int32),
            "targets_BT": np.zeros(shape, np.int32),
            "weights_BT": np.zeros(shape, np.float32),
            "document_B": np.full(batch_size, -1, np.int32),
        }
        for row, (document, first, last) in enumerate(windows[at : at + batch_size]):
            length = last - first
            batch["tokens_BT"][row, :length] = corpus.ids[first:last]
            batch["targets_BT"][row, :length] = corpus.ids[first + 1 : last + 1]
            batch["weights_BT"][row, :length] = 1
            batch["document_B"][row] = document
        batches.append(batch)
    return batches


def _check(context: int, batch_size: int) -> None:
    at_least("data.context", context, 1)
    at_least("batch_size", batch_size, 1)
