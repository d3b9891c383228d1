"""The attention protocol: what a variant says, and everything that it does not have to say.

A variant says what a token leaves behind (`project`) and how that is read, in one or two algebraic
forms. Softmax, masks, the walk over slots and the cache stand here, once, and know no variant;
a variant knows no cache and no codec.

B batch, T query tokens, S memory slots, C slots of a chunk, D width, N query heads, K kv heads,
G query heads a kv head, H key dim, V value dim, M any features of a reading.
An entry, and a memory, is a dict of arrays [B, ..., T or S, features].
"""

import abc
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from kvjax.attention.heads import MASKED, Band, causal_attention
from kvjax.checks import at_least
from kvjax.layers import rotate
from kvjax.rope import RopeScaling

Queries = Any  # a pytree that only its variant looks into
Memory = dict[str, jax.Array]

EXPANDED_CHUNK = 512  # slots that many queries read at a time, in expanded form


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
    window: int | None = field(default=None, kw_only=True)
    """Latest positions that a query sees, its own among them; None for all."""
    num_sinks: int | None = field(default=None, kw_only=True)
    """First positions that a query sees besides its window (Xiao et al. 2024)."""
    rope_scaling: RopeScaling | None = field(default=None, kw_only=True)
    """How rotary frequencies are stretched to longer texts; None leaves them."""

    def __post_init__(self):
        at_least("num_heads", self.num_heads, 1)
        if self.window is not None:
            at_least("window", self.window, 1)
        if self.num_sinks is not None:
            at_least("num_sinks", self.num_sinks, 1)
            if self.window is None:
                raise ValueError(f"num_sinks={self.num_sinks} must go with a window; window=None sees everything")

    @property
    def band(self) -> Band:
        """What a query sees."""
        return Band(self.window, self.num_sinks or 0)

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

    config: Any
    """The variant's AttentionConfig, whose `band` its queries see."""
    scale: float
    """What the logits are multiplied by before the softmax."""
    expand_from: int = 2
    """Fewest query tokens for which reading a cache in expanded form takes fewer FLOPs."""

    def rotate(self, x: jax.Array, positions_BT: jax.Array, interleaved: bool = False) -> jax.Array:
        """Rotary positions by the config's base and scaling."""
        return rotate(x, positions_BT, self.config.rope_theta, interleaved, self.config.rope_scaling)

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

    def fuse(self, turn: bool) -> None:
        """Join weights that read the same input, as decoding wants them: fewer, larger products a token.

        `turn` may keep weights output axis first (see `MLP.turn`).
        """

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
            o_BKGTV = causal_attention(*self.expand(queries, entry, positions_BT), self.scale, self.config.band)
            return self.merge(_in_order(o_BKGTV)), None
        cache = cache.write(entry)
        if x_BTD.shape[1] >= self.expand_from:
            heads_BNTV = self._read(_expanded(self, queries), positions_BT, cache, cache.chunk or EXPANDED_CHUNK)
            return self.merge(heads_BNTV.astype(x_BTD.dtype)), cache
        mixed_BNTM = self._read(_absorbed(self, self.absorb(queries)), positions_BT, cache, cache.chunk)
        return self.output(mixed_BNTM.astype(x_BTD.dtype)), cache

    def _read(self, form, positions_BT, cache, chunk):
        def logits_of(memory, positions_BS, unread_S=None):
            logits_BNTS, mix = form(memory, positions_BS)
            seen_BTS = self.config.band.sees(positions_BT[:, :, None], positions_BS[:, None])
            if unread_S is not None:
                seen_BTS &= unread_S[None, None]
            return jnp.where(seen_BTS[:, None], logits_BNTS.astype(jnp.float32) * self.scale, MASKED), mix

        S = cache.positions_BS.shape[1]
        if chunk is None or chunk >= S:
            memory = cache.read()
            logits_BNTS, mix = logits_of(memory, cache.positions_BS)
            return mix(_cast(jax.nn.softmax(logits_BNTS, axis=-1), memory))
        return _walk(logits_of, cache, S, chunk)


def _walk(logits_of, cache, S, C):
    """Online softmax (Milakov & Gimelshein 2018) over chunks: the time follows the slots in use."""

    def read(i):
        start = jnp.minimum(i * C, S - C)  # the last chunk begins earlier where C does not divide S
        memory = cache.read(start, C)
        positions_BC = lax.dynamic_slice_in_dim(cache.positions_BS, start, C, axis=1)
        return memory, *logits_of(memory, positions_BC, start + jnp.arange(C) >= i * C)

    def step(i, carry):
        top_BNT1, total_BNT1, mixed_BNTM = carry
        memory, logits_BNTC, mix = read(i)
        new_top_BNT1 = jnp.maximum(top_BNT1, logits_BNTC.max(-1, keepdims=True))
        weights_BNTC = jnp.exp(logits_BNTC - new_top_BNT1)
        shrink_BNT1 = jnp.exp(top_BNT1 - new_top_BNT1)
        total_BNT1 = total_BNT1 * shrink_BNT1 + weights_BNTC.sum(-1, keepdims=True)
        part_BNTM = mix(_cast(weights_BNTC, memory)).astype(jnp.float32)
        return new_top_BNT1, total_BNT1, mixed_BNTM * shrink_BNT1 + part_BNTM

    def first():
        memory, logits_BNTC, mix = read(0)
        return logits_BNTC.max(-1, keepdims=True), mix(_cast(logits_BNTC, memory))

    top, mixed = jax.eval_shape(first)
    start = (jnp.full(top.shape, MASKED), jnp.zeros(top.shape), jnp.zeros(mixed.shape, jnp.float32))
    _, total_BNT1, mixed_BNTM = lax.fori_loop(0, (cache.length + C - 1) // C, step, start)
    return mixed_BNTM / total_BNT1


def _expanded(attention, queries):
    """Explicit heads of a stretch of memory: few FLOPs a query, more a slot."""

    def form(memory, positions_BS):
        q_BKGTH, k_BKSH, v_BKSV = attention.expand(queries, memory, positions_BS)
        logits_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)

        def mix(probs_BNTS):
            probs_BKGTS = probs_BNTS.reshape(logits_BKGTS.shape)
            return _in_order(jnp.einsum("BKGTS,BKSV->BKGTV", probs_BKGTS, v_BKSV))

        return _in_order(logits_BKGTS), mix

    return form


def _absorbed(attention, queries):
    """The memory as it is stored."""

    def form(memory, positions_BS):
        return attention.score(queries, memory, positions_BS), lambda probs: attention.mix(probs, memory)

    return form


def _in_order(heads_BKGTV):
    B, K, G, *rest = heads_BKGTV.shape
    return heads_BKGTV.reshape(B, K * G, *rest)


def _cast(probs, memory):
    return probs.astype(jax.tree.leaves(memory)[0].dtype)
