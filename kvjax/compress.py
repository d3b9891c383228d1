"""What a codec costs in quality: every document scored through a cache that stores it, against the exact model.

B batch, T tokens, D width, V vocabulary, C tokens of a chunk.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from scipy import stats

from kvjax import cache as caches
from kvjax.codecs.base import Entry, Exact, Storage, slot_multiple
from kvjax.data import Corpus, eval_batches
from kvjax.decoder import rope_on_read
from kvjax.evaluate import Score, ratio_se
from kvjax.rope import frequencies
from kvjax.slots import nbytes

CHUNK = 256  # tokens whose logits are held at a time, of two models
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """A compressed cache against the exact one, document by document."""

    score: Score
    exact: Score
    kl: np.ndarray
    """Nats, summed over a document's tokens: KL(exact || compressed) of the next token's distribution."""
    agreeing: np.ndarray
    """Tokens of a document before which both models find the same token likeliest."""

    @property
    def nats_difference(self) -> float:
        """Nats per token more than the exact cache's."""
        return self.score.nats_per_token - self.exact.nats_per_token

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence of that difference, paired: Student's t over documents; nan for one document."""
        n = len(self.score.nats)
        if n < 2:
            return math.nan, math.nan
        half = stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * ratio_se(
            self.score.nats - self.exact.nats, self.score.tokens
        )
        return self.nats_difference - float(half), self.nats_difference + float(half)

    def row(self) -> dict[str, Any]:
        """The figures of a result row; what is no number is null."""
        percent = lambda nats: 100 * math.expm1(min(nats, 100.0))
        low, high = self.interval
        tokens = int(self.score.tokens.sum())
        figures = {
            "perplexity_exact": self.exact.perplexity,
            "perplexity_percent": percent(self.nats_difference),
            "perplexity_percent_low": percent(low),
            "perplexity_percent_high": percent(high),
            "kl_nats_per_token": float(self.kl.sum() / tokens),
            "top1_agreement": float(self.agreeing.sum() / tokens),
        }
        return self.score.row() | {name: v if math.isfinite(v) else None for name, v in figures.items()}


class Comparer:
    """A model's exact predictions on a text, kept; and any codec's beside them.

    Windows are written to the cache and read back in one pass, layer by layer: layers of one structure
    share a program. What each query reads is what decoding token by token reads.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        corpus: Corpus,
        context: int,
        batch_size: int,
        track: Callable[[list], Iterable] = iter,
    ):
        """The exact model's predictions; `track` may wrap the list of batches to show progress."""
        model = nnx.merge(graphdef, params)
        self.graphdef, self.params = graphdef, params
        self._embedding_VD, self._norm = model.embedding_VD[...], nnx.split(model.norm)
        self._unembedding_VD = model.unembedding()
        self.layers = layers_of(graphdef, params)
        self._corpus, self._batches = corpus, eval_batches(corpus, context, batch_size)
        self.entries = entries(graphdef, params, batch_size, context)
        self._hidden: list[np.ndarray] = []
        self.exact = self._score(self.layers, [Storage(Exact())] * len(self.layers), track).score

    @property
    def frequencies(self) -> np.ndarray | None:
        """Rotary frequencies of keys that can be cached before the rotation; None if they cannot."""
        return key_frequencies(self.graphdef, self.params)

    def compare(
        self, storages: Sequence[Storage], keys_before_rope: bool = False, track: Callable[[list], Iterable] = iter
    ) -> Comparison:
        """Score the text through caches stored so, one `Storage` a layer.

        `keys_before_rope` stores keys unrotated and rotates them on read; ValueError if attention cannot.
        `track` may wrap the list of batches to show progress.
        """
        layers = layers_of(*rope_on_read(self.graphdef, self.params)) if keys_before_rope else self.layers
        return self._score(layers, storages, track)

    def _score(self, layers, storages, track):
        first = not self._hidden
        sums = np.zeros((3, len(self._corpus.num_bytes)))
        tokens = np.zeros(len(self._corpus.num_bytes), np.int64)
        for number, batch in enumerate(track(self._batches)):
            x_BTD = jnp.take(self._embedding_VD, batch["tokens_BT"], axis=0)
            for (graphdef, params), storage in zip(layers, storages, strict=True):
                x_BTD = through_layer(graphdef, params, storage, x_BTD)
            x_BTD = _norm(self._norm[0], self._norm[1], x_BTD)
            if first:
                self._hidden.append(np.asarray(x_BTD))
            figures = judge(self._hidden[number], x_BTD, self._unembedding_VD, batch["targets_BT"])
            weights_BT, document_B = batch["weights_BT"], batch["document_B"]
            real = document_B >= 0
            for total, figure_BT in zip(sums, figures):
                np.add.at(total, document_B[real], (np.asarray(figure_BT, np.float64) * weights_BT).sum(1)[real])
            np.add.at(tokens, document_B[real], weights_BT.sum(1)[real].astype(np.int64))
        nats, kl, agreeing = sums
        score = Score(nats, tokens, np.asarray(self._corpus.num_bytes))
        return Comparison(score, score if first else self.exact, kl, agreeing)


def layers_of(graphdef: nnx.GraphDef, params: Any) -> list[tuple[nnx.GraphDef, Any]]:
    """Every layer, split."""
    return [nnx.split(block) for block in nnx.merge(graphdef, params).layers]


def entries(graphdef: nnx.GraphDef, params: Any, batch: int, slots: int) -> list[Entry]:
    """Shapes of what so many tokens leave in each layer."""
    model = nnx.merge(graphdef, params)
    x_BTD = jax.ShapeDtypeStruct((batch, slots, model.config.width), model.embedding_VD[...].dtype)
    positions_BT = jax.ShapeDtypeStruct((batch, slots), jnp.int32)
    project = lambda block: jax.eval_shape(lambda x, p: block.attention.project(x, p)[1], x_BTD, positions_BT)
    return [project(block) for block in model.layers]


def key_frequencies(graphdef: nnx.GraphDef, params: Any) -> np.ndarray | None:
    """Rotary frequencies of keys that can be cached before the rotation; None if they cannot."""
    config = nnx.merge(graphdef, params).attention
    if not hasattr(config, "rope_on_read"):
        return None
    return frequencies(config.rope_theta, config.head_dim, config.rope_scaling)


def bytes_of(entries: Sequence[Entry], storages: Sequence[Storage], context: int) -> dict[str, float]:
    """Bytes a token of a cache of `context` slots (or as many as are packed together), from its arrays' shapes.

    Exact tokens count: they cost less a token the longer the context. Calibrated arrays are once a model.
    """
    slots = context + -context % slot_multiple(storages)
    shape = lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:-2], slots, a.shape[-1]), a.dtype)
    shapes = tuple(jax.tree.map(shape, entry) for entry in entries)
    cache = jax.eval_shape(lambda storages: caches.empty(shapes, storages), tuple(storages))
    encoded = [[layer[name] for name in entry] for layer, entry in zip(cache.memory, entries)]
    elements = sum(math.prod(a.shape) for a in jax.tree.leaves(shapes)) / slots
    return {
        "per_token": nbytes(cache.memory) / slots,
        "encoded_per_token": nbytes(encoded) / slots,
        "exact_tokens": nbytes(cache.memory) - nbytes(encoded),
        "slots": slots,
        "times_smaller_than_bf16": 2 * elements / (nbytes(cache.memory) / slots),
        "calibrated_per_model": nbytes(tuple(storages)),
    }


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of points (bytes, perplexity), which no other one beats in one and equals or beats in the other."""
    beaten = lambda p: any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)
    return [not beaten(p) for p in points]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def through_layer(graphdef, params, storage, x_BTD):
    """A layer's result on whole windows, read from a cache of its own."""
    block = nnx.merge(graphdef, params)
    B, T, D = x_BTD.shape
    slots = T + -T % slot_multiple(storage)
    shapes = jax.ShapeDtypeStruct((B, slots, D), x_BTD.dtype), jax.ShapeDtypeStruct((B, slots), jnp.int32)
    cache = caches.empty((jax.eval_shape(lambda x, p: block.attention.project(x, p)[1], *shapes),), storage)
    # Unknown to the compiler, which would fold whole masks into constants for seconds.
    cache = dataclasses.replace(cache, length=lax.optimization_barrier(cache.length))
    positions_BT = jnp.broadcast_to(cache.length + jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    return block(x_BTD, positions_BT, cache.claim(positions_BT).layer(0))[0]


@functools.partial(jax.jit, static_argnums=0)
def _norm(graphdef, params, x_BTD):
    return nnx.merge(graphdef, params)(x_BTD)


@jax.jit
def judge(exact_BTD, x_BTD, w_VD, targets_BT):
    """Of every target: nats, KL(exact || this), and whether both have the same likeliest token. Chunk by chunk."""
    B, T, D = x_BTD.shape
    chunk = math.gcd(B * T, CHUNK)

    def one(part):
        exact_CD, x_CD, targets_C = part
        logits = lambda x_CD: jnp.einsum("CD,VD->CV", x_CD, w_VD, preferred_element_type=jnp.float32)
        exact_CV, ours_CV = jax.nn.log_softmax(logits(exact_CD)), jax.nn.log_softmax(logits(x_CD))
        nats_C = -jnp.take_along_axis(ours_CV, targets_C[:, None], axis=-1)[:, 0]
        kl_C = (jnp.exp(exact_CV) * (exact_CV - ours_CV)).sum(-1)
        likeliest = lambda a_CV: jnp.argmax(a_CV, axis=-1)
        return nats_C, kl_C, (likeliest(exact_CV) == likeliest(ours_CV)).astype(jnp.float32)

    parts = (a.reshape(-1, chunk, *a.shape[2:]) for a in (exact_BTD, x_BTD, targets_BT))
    return tuple(a.reshape(B, T) for a in lax.map(one, tuple(parts)))
