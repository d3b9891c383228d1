"""The attention protocol: what a variant says, and everything that it does not have to say.

A variant says what a token leaves behind (`project`) and how that is read, in one or two algebraic
forms. Softmax, masks, the walk over slots and the cache stand here, once, and know no variant;
a variant knows no cache and no codec.

B batch, T query tokens, S memory slots, C slots of a chunk, D width, N query heads, V value dim,
M any features of a reading. An entry, and a memory, is a dict of arrays [B, ..., T or S, features].
"""

import abc
from dataclasses import dataclass
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from kvjax.attention.heads import MASKED, causal_attention, masked_attention

Queries = Any  # a pytree that only its variant looks into
Memory = dict[str, jax.Array]


class LayerCache(Protocol):
    """What a variant's base needs of one layer's cache."""

    positions_BS: jax.Array
    """Position of the token in each slot, -1 where the slot is empty."""
    length: jax.Array
    """Slots in use, from the first."""
    chunk: int | None
    """Slots that are decoded at a time, None for all of them."""

    def write(self, entry: Memory) -> Self:
        """Store an entry in the next slots."""
        ...

    def read(self, start: jax.Array | int = 0, size: int | None = None) -> Memory:
        """Decode the slots from `start`, or all of them."""
        ...


@dataclass(frozen=True)
class AttentionConfig(abc.ABC):
    """What a preset says of its attention; `build` makes the module."""

    num_heads: int = 8
    """Query heads."""

    @abc.abstractmethod
    def build(self, width: int, output_scale: float, key: jax.Array) -> "Attention":
        """The module for a decoder of this width, its output initialised at `output_scale`."""

    @abc.abstractmethod
    def elements_per_token(self) -> int:
        """Elements that one token leaves in one layer's cache, in closed form."""

    @abc.abstractmethod
    def flops_per_slot(self) -> int:
        """Multiply-adds x 2 of one query token against one slot, all heads, in expanded form."""


class Attention(nnx.Module):
    """Base of all variants: `cache=None` is training; prefill and decoding pass a cache."""

    scale: float
    """What the logits are multiplied by before the softmax."""
    expand_from: int = 2
    """Fewest query tokens for which reading a cache in expanded form takes fewer FLOPs."""

    @abc.abstractmethod
    def project(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[Queries, Memory]:
        """Queries, and the entry: all that these tokens leave behind."""

    @abc.abstractmethod
    def expand(
        self, queries: Queries, memory: Memory, positions_BS: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Explicit heads `q_BKGTH, k_BKSH, v_BKSV`, with K * G query heads in order."""

    @abc.abstractmethod
    def merge(self, heads_BNTV: jax.Array) -> jax.Array:
        """The variant's result `y_BTD` from the heads' weighted values."""

    def absorb(self, queries: Queries) -> Queries:
        """Queries in the form that `score` takes: what can be done once, before the slots are read."""
        return queries

    @abc.abstractmethod
    def score(self, queries: Queries, memory: Memory, positions_BS: jax.Array) -> jax.Array:
        """Logits `BNTS`, before the scale."""

    @abc.abstractmethod
    def mix(self, probs_BNTS: jax.Array, memory: Memory) -> jax.Array:
        """A reading `mixed_BNTM`, linear in the probabilities: partial sums over slots add up."""

    @abc.abstractmethod
    def output(self, mixed_BNTM: jax.Array) -> jax.Array:
        """The variant's result `y_BTD` from a whole reading."""

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attend: among the tokens of `x` when `cache` is None, else write them and read the cache.

        Without a cache the positions of a row must increase by one; with one they may be any, -1
        for padding, whose results mean nothing. Returns `y_BTD` and the cache that now holds `x`.
        """
        queries, entry = self.project(x_BTD, positions_BT)
        if cache is None:
            o_BKGTV = causal_attention(*self.expand(queries, entry, positions_BT), self.scale)
            return self.merge(_in_order(o_BKGTV)), None
        cache = cache.write(entry)
        if x_BTD.shape[1] >= self.expand_from:
            heads = self.expand(queries, cache.read(), cache.positions_BS)
            mask_BTS = visible(positions_BT, cache.positions_BS)
            return self.merge(_in_order(masked_attention(*heads, mask_BTS, self.scale))), cache
        read = self._read_whole if cache.chunk is None else self._read_in_chunks
        return self.output(read(self.absorb(queries), positions_BT, cache).astype(x_BTD.dtype)), cache

    def _logits(self, queries, memory, positions_BT, positions_BS):
        logits_BNTS = self.score(queries, memory, positions_BS).astype(jnp.float32) * self.scale
        return jnp.where(visible(positions_BT, positions_BS)[:, None], logits_BNTS, MASKED)

    def _read_whole(self, queries, positions_BT, cache):
        memory = cache.read()
        logits_BNTS = self._logits(queries, memory, positions_BT, cache.positions_BS)
        return self.mix(_cast(jax.nn.softmax(logits_BNTS, axis=-1), memory), memory)

    def _read_in_chunks(self, queries, positions_BT, cache):
        """Online softmax (Milakov & Gimelshein 2018): the time follows the slots in use."""
        C = cache.chunk

        def read(i):
            positions_BC = lax.dynamic_slice_in_dim(cache.positions_BS, i * C, C, axis=1)
            memory = cache.read(i * C, C)
            return memory, self._logits(queries, memory, positions_BT, positions_BC)

        def step(i, carry):
            top_BNT1, total_BNT1, mixed_BNTM = carry
            memory, logits_BNTC = read(i)
            new_top_BNT1 = jnp.maximum(top_BNT1, logits_BNTC.max(-1, keepdims=True))
            weights_BNTC = jnp.exp(logits_BNTC - new_top_BNT1)
            shrink_BNT1 = jnp.exp(top_BNT1 - new_top_BNT1)
            total_BNT1 = total_BNT1 * shrink_BNT1 + weights_BNTC.sum(-1, keepdims=True)
            part_BNTM = self.mix(_cast(weights_BNTC, memory), memory).astype(jnp.float32)
            return new_top_BNT1, total_BNT1, mixed_BNTM * shrink_BNT1 + part_BNTM

        def first():
            memory, logits_BNTC = read(0)
            return logits_BNTC.max(-1, keepdims=True), self.mix(_cast(logits_BNTC, memory), memory)

        top, mixed = jax.eval_shape(first)
        start = (jnp.full(top.shape, MASKED), jnp.zeros(top.shape), jnp.zeros(mixed.shape, jnp.float32))
        _, total_BNT1, mixed_BNTM = lax.fori_loop(0, (cache.length + C - 1) // C, step, start)
        return mixed_BNTM / total_BNT1


def visible(positions_BT: jax.Array, positions_BS: jax.Array) -> jax.Array:
    """The mask `BTS`: a filled slot whose position is not after the query's."""
    return (positions_BS >= 0)[:, None] & (positions_BS[:, None] <= positions_BT[:, :, None])


def _in_order(heads_BKGTV):
    B, K, G, *rest = heads_BKGTV.shape
    return heads_BKGTV.reshape(B, K * G, *rest)


def _cast(probs, memory):
    return probs.astype(jax.tree.leaves(memory)[0].dtype)
