"""Log-likelihoods of continuations through a cache, and what they are worth in downstream tasks.

B batch, T tokens.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from kvjax import sharding
from kvjax.checks import at_least
from kvjax.codecs.base import Codecs
from kvjax.data import Tokenizer
from kvjax.evaluate import Through, make_scorer
from kvjax.tasks import TASKS, Item, Request

ROUND_TOKENS = 32  # rows are padded to a multiple of this many tokens, so that few programs score them all
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Window:
    """Token ids in a row, of which those from `first` on (at least 1) are predicted."""

    ids: np.ndarray
    first: int


@dataclass(frozen=True)
class Likelihoods:
    """Negative log-likelihood (nats) of every request's continuation, and whether greedy decoding makes it."""

    nats: np.ndarray
    greedy: np.ndarray


def encode(tokenizer: Tokenizer, request: Request) -> Window:
    """Ids of begin of text, context and continuation; ValueError where no id belongs to the continuation.

    As EleutherAI's harness does it: white space at the context's end goes to the continuation, both are encoded
    together and cut where the context alone would end. Unlike there, `begin_id` stands before every context, as
    it does before every document of an evaluation here; it makes an empty context possible.
    """
    context = request.context.rstrip()
    whole = tokenizer.encode(request.context + request.continuation)
    first = len(tokenizer.encode(context))
    if first >= len(whole):
        raise ValueError(f"continuation={request.continuation!r} has no token of its own")
    return Window(np.concatenate([[tokenizer.begin_id], whole]).astype(np.int32), 1 + first)


class LikelihoodScorer:
    """A model that scores requests through a cache: the ways `through` are those of `evaluate.make_scorer`.

    Rows are padded on the right, where causal attention does not see it, to `ROUND_TOKENS`; a batch of each
    length has as many rows as fit `batch_tokens`, at least one a device.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        tokenizer: Tokenizer,
        through: Through = "none",
        codec: Codecs | None = None,
        max_len: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ):
        """`max_len` is the most tokens that the model can read, if there is a limit."""
        at_least("batch_tokens", batch_tokens, 1)
        self.tokenizer, self.max_len, self._batch_tokens = tokenizer, max_len, batch_tokens
        self._round = ROUND_TOKENS
        self._mesh = sharding.make_mesh(jax.device_count())
        self._params = sharding.replicate(params, self._mesh)
        self._scorer = make_scorer(graphdef, self._mesh, through, codec)

    def score(
        self,
        requests: Sequence[Request],
        names: Sequence[str] | None = None,
        track: Callable[[list], Iterable] = iter,
    ) -> Likelihoods:
        """Likelihoods of requests; ValueError with its name for one that is too long or has nothing to predict.

        `track` may wrap the list of batches to show progress.
        """
        names = [f"request {i}" for i in range(len(requests))] if names is None else names
        windows = []
        for name, request in zip(names, requests, strict=True):
            try:
                windows.append(encode(self.tokenizer, request))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return self.score_windows(windows, names, track)

    def score_windows(
        self, windows: Sequence[Window], names: Sequence[str], track: Callable[[list], Iterable] = iter
    ) -> Likelihoods:
        """Likelihoods of what each window predicts; as `score`."""
        for name, window in zip(names, windows, strict=True):
            if self.max_len is not None and len(window.ids) - 1 > self.max_len:
                raise ValueError(
                    f"{name} has {len(window.ids) - 1} tokens to read, more than max_len={self.max_len}"
                )
        nats, greedy = np.zeros(len(windows)), np.zeros(len(windows), bool)
        for length, rows, members in track(self._batches(windows)):
            tokens_BT, targets_BT = np.zeros((2, rows, length), np.int32)
            predicted_BT = np.zeros((rows, length), bool)
            for b, member in enumerate(members):
                ids, first = windows[member].ids, windows[member].first
                tokens_BT[b, : len(ids) - 1], targets_BT[b, : len(ids) - 1] = ids[:-1], ids[1:]
                predicted_BT[b, first - 1 : len(ids) - 1] = True
            arrays = sharding.split({"tokens_BT": tokens_BT, "targets_BT": targets_BT}, self._mesh)
            nats_BT, top_BT = map(np.asarray, self._scorer(self._params, arrays))
            nats[members] = nats_BT.sum(1, np.float64, where=predicted_BT)[: len(members)]
            greedy[members] = np.logical_and.reduce(top_BT | ~predicted_BT, axis=1)[: len(members)]
        return Likelihoods(nats, greedy)

    def _batches(self, windows):
        """Padded length, rows and members of every batch, the longest first: they need the most memory."""
        length_of = lambda i: -(-(len(windows[i].ids) - 1) // self._round) * self._round
        devices, batches = self._mesh.size, []
        order = sorted(range(len(windows)), key=length_of, reverse=True)
        for length, group in itertools.groupby(order, length_of):
            rows = max(1, self._batch_tokens // length // devices) * devices
            members = list(group)
            batches += [(length, rows, members[i : i + rows]) for i in range(0, len(members), rows)]
        return batches


@dataclass(frozen=True)
class TaskScore:
    """How a task went, item by item: models that answered the same items can be compared in pairs."""

    task: str
    doc_ids: np.ndarray
    correct: np.ndarray
    """Whether the likeliest choice is the right one, or greedy decoding makes the right word."""
    correct_norm: np.ndarray | None
    """The same of the choice that is likeliest per character, where choices differ in length."""
    nats: np.ndarray
    """Negative log-likelihood of the right answer."""
    chance: float | None
    """Accuracy of guessing, where there are choices."""

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return float(self.correct.mean())

    @property
    def accuracy_se(self) -> float:
        """Its standard error; nan of one item."""
        return _share_se(self.correct)

    @property
    def accuracy_norm(self) -> float | None:
        """Share of items whose choice likeliest per character is the right one."""
        return None if self.correct_norm is None else float(self.correct_norm.mean())

    @property
    def accuracy_norm_se(self) -> float | None:
        """Its standard error; nan of one item."""
        return None if self.correct_norm is None else _share_se(self.correct_norm)

    @property
    def perplexity(self) -> float | None:
        """Of a whole right answer (not of a token), where there are no choices: exp of the mean nats."""
        with np.errstate(over="ignore"):
            return None if TASKS[self.task].judged == "choice" else float(np.exp(self.nats.mean()))

    @property
    def perplexity_se(self) -> float | None:
        """Its standard error, to first order; nan of one item."""
        if self.perplexity is None:
            return None
        n = len(self.nats)
        return self.perplexity * float(self.nats.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan

    def row(self) -> dict[str, float | int | None]:
        """The figures of a result row; one that is no number, or that the task does not have, is null."""
        names = ("accuracy", "accuracy_se", "accuracy_norm", "accuracy_norm_se", "perplexity", "perplexity_se")
        figures = {name: getattr(self, name) for name in names} | {"chance": self.chance}
        finite = lambda value: value if value is not None and math.isfinite(value) else None
        return {"items": len(self.correct), **{name: finite(value) for name, value in figures.items()}}


def _share_se(correct: np.ndarray) -> float:
    """Standard error of a share, with the sample's variance (n - 1)."""
    n, share = len(correct), float(correct.mean())
    return math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else math.nan


def grade(task: str, items: Sequence[Item], likelihoods: Likelihoods) -> TaskScore:
    """How a task went, from the likelihoods of all its items' requests, one after the other.

    Per character (`acc_norm` of EleutherAI's harness) does not count the space before an answer. Of equally
    likely choices the first one is taken.
    """
    starts = np.cumsum([0, *(len(item.requests) for item in items)])
    spans = [slice(start, stop) for start, stop in itertools.pairwise(starts)]
    labels = np.array([item.label for item in items])
    doc_ids = np.array([item.doc_id for item in items])
    nats = likelihoods.nats[starts[:-1] + labels]
    if TASKS[task].judged == "greedy":
        return TaskScore(task, doc_ids, likelihoods.greedy[starts[:-1] + labels], None, nats, None)
    answers = [request.continuation.removeprefix(" ") for item in items for request in item.requests]
    chars = np.array([len(answer) for answer in answers])
    right = lambda costs: np.array([costs[span].argmin() for span in spans]) == labels
    norm = right(likelihoods.nats / chars) if TASKS[task].normalised else None
    chance = float(np.mean([1 / len(item.requests) for item in items]))
    return TaskScore(task, doc_ids, right(likelihoods.nats), norm, nats, chance)


def evaluate_task(
    scorer: LikelihoodScorer, task: str, items: Sequence[Item], track: Callable[[list], Iterable] = iter
) -> TaskScore:
    """Score every request of a task's items, and grade them; ValueError as `LikelihoodScorer.score`."""
    at_least("items", len(items), 1)
    requests = [request for item in items for request in item.requests]
    names = [f"{task} item {item.doc_id} choice {i}" for item in items for i in range(len(item.requests))]
    return grade(task, items, scorer.score(requests, names, track))
