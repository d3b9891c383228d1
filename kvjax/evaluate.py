"""Perplexity and bits per byte over a whole split, with standard errors over documents.

B batch, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from kvjax import sharding
from kvjax.codecs.base import Codecs, Exact, slot_multiple
from kvjax.data import Corpus, eval_batches
from kvjax.losses import token_nats

Through = Literal["none", "prefill", "decode"]
Scorer = Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood (nats), predicted tokens and UTF-8 bytes of every document."""

    nats: np.ndarray
    tokens: np.ndarray
    num_bytes: np.ndarray

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood of a token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp of the nats per token (inf past float64's range); compares only models with one tokenizer."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    @property
    def perplexity_se(self) -> float:
        """Standard error of the perplexity over documents, to first order."""
        return self.perplexity * ratio_se(self.nats, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text; compares across tokenizers."""
        return float(self.nats.sum() / self.num_bytes.sum() / math.log(2))

    @property
    def bits_per_byte_se(self) -> float:
        """Standard error of the bits per byte over documents."""
        return ratio_se(self.nats, self.num_bytes) / math.log(2)

    def row(self) -> dict[str, float | int | None]:
        """The figures of a result row; one that is no number, as the standard error of one document, is null."""
        names = ("perplexity", "bits_per_byte", "perplexity_se", "bits_per_byte_se")
        figures = {name: getattr(self, name) for name in names}
        return {
            **{name: value if math.isfinite(value) else None for name, value in figures.items()},
            "documents": len(self.nats),
            "tokens": int(self.tokens.sum()),
            "bytes": int(self.num_bytes.sum()),
        }


def ratio_se(y: np.ndarray, x: np.ndarray) -> float:
    """Standard error of sum(y) / sum(x) over units drawn at random (Cochran 1977, eq. 2.46); nan for one."""
    n = len(y)
    if n < 2:
        return math.nan
    residuals = y - x * (y.sum() / x.sum())
    return math.sqrt(n / (n - 1) * float(np.square(residuals).sum())) / float(x.sum())


def make_scorer(
    graphdef: nnx.GraphDef, mesh: Mesh, through: Through = "none", codec: Codecs | None = None
) -> Scorer:
    """A jitted `(params, batch) -> nats_BT, top_BT`: nats of every target, and whether it is the likeliest token.

    "none" runs the training form; "prefill" writes each window into a cache and reads it back in
    one pass; "decode" feeds it token by token, every token attending to what the cache stores.
    """
    codec = Exact() if codec is None else codec

    def score(params, batch):
        model = nnx.merge(graphdef, params)
        tokens_BT, targets_BT = batch["tokens_BT"], batch["targets_BT"]
        B, T = tokens_BT.shape
        judge = lambda x_BTD, targets_BT: token_nats(x_BTD, model.unembedding(), targets_BT)
        if through == "none":
            return judge(model.hidden(tokens_BT)[0], targets_BT)
        cache = model.init_cache(B, T + -T % slot_multiple(codec), codec)
        if through == "prefill":
            return judge(model.hidden(tokens_BT, cache=cache)[0], targets_BT)

        def step(cache, pair):
            token_B, target_B = pair
            x_B1D, cache = model.hidden(token_B[:, None], cache=cache)
            nats_B1, top_B1 = judge(x_B1D, target_B[:, None])
            return cache, (nats_B1[:, 0], top_B1[:, 0])

        return jax.tree.map(jnp.transpose, lax.scan(step, cache, (tokens_BT.T, targets_BT.T))[1])

    return jax.jit(sharding.over_rows(score, mesh, sums=False))


def evaluate(
    scorer: Scorer,
    params: Any,
    corpus: Corpus,
    context: int,
    batch_size: int,
    mesh: Mesh,
    track: Callable[[list], Iterable] = iter,
) -> Score:
    """Score every document of a corpus, cut into windows of `context` tokens; sums are float64.

    `track` may wrap the list of batches to show progress.
    """
    nats = np.zeros(len(corpus.num_bytes))
    tokens = np.zeros(len(corpus.num_bytes), np.int64)
    for batch in track(eval_batches(corpus, context, batch_size)):
        arrays = sharding.split({name: batch[name] for name in ("tokens_BT", "targets_BT")}, mesh)
        weights_BT = batch["weights_BT"].astype(np.float64)
        real = batch["document_B"] >= 0
        nats_BT, _ = scorer(params, arrays)
        nats_B = (np.asarray(nats_BT, np.float64) * weights_BT).sum(1)
        np.add.at(nats, batch["document_B"][real], nats_B[real])
        np.add.at(tokens, batch["document_B"][real], weights_BT.sum(1)[real].astype(np.int64))
    return Score(nats, tokens, np.asarray(corpus.num_bytes))
