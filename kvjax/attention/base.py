"""The attention protocol: what a variant says, and everything that it does not have to say.

A variant says what a token leaves behind (`project`) and how that is read, in one or two algebraic
forms. Softmax, masks, the walk over slots and the cache stand here, once, and know no variant;
a variant knows no cache and no codec.

B batch, T query tokens, S memory slots, C slots of a chunk, D width, N query heads, K kv heads,
G query heads a kv head, H key dim, V value dim, M any features of a reading.
An entry, and a memory, is a dict of arrays [B, ..., T or S, features].
"""

import abc
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.attention.heads import MASKED, Band, causal_attention, scores, weighted
from kvjax.attention.reading import Source, read
from kvjax.checks import at_least
from kvjax.layers import rotate
from kvjax.rope import RopeScaling

Queries = Any  # a pytree that only its variant looks into
Memory = dict[str, jax.Array]

EXPANDED_CHUNK = 512  # slots that many queries read at a time, in expanded form


class LayerCache(Protocol):
    """What a variant's base needs of one layer's cache."""

    @property
    def chunk(self) -> int | None:
        """Slots that are decoded at a time, None for all of them."""
        ...

    def write(self, entry: Memory) -> Self:
        """Store an entry in the next slots."""
        ...

    def sources(self, inside: frozenset[str]) -> Sequence[Source]:
        """What the queries of the entry just written read; arrays in `inside` need not be mapped back."""
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
    values: str
    """The array whose weighted sums a reading is."""

    @property
    @abc.abstractmethod
    def inside(self) -> frozenset[str]:
        """Arrays that the absorbed form reads by nothing but inner products and weighted sums."""

    def observe(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[Memory, dict[str, jax.Array]]:
        """What calibration gathers: arrays to be stored, and the queries `BNTM` whose inner products read them."""
        queries, entry = self.project(x_BTD, positions_BT)
        return entry, {name: q for name, q in self.absorb(queries).items() if name in self.inside}

    @abc.abstractmethod
    def value_weights(self) -> jax.Array:
        """What takes each head's weighted sum of `values` to the result: `[N, M, D]`."""

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

    @abc.abstractmethod
    def absorb(self, queries: Queries) -> dict[str, jax.Array]:
        """Queries `BNTM` of every array that `score` takes inner products with, by its name."""

    def score(self, queries: dict[str, jax.Array], memory: Memory, positions_BS: jax.Array) -> jax.Array:
        """Logits `BNTS`, before the scale: the inner products of absorbed queries and memory."""
        return functools.reduce(jnp.add, (scores(q_BNTM, memory[name]) for name, q_BNTM in queries.items()))

    def mix(self, probs_BNTS: jax.Array, memory: Memory) -> jax.Array:
        """A reading `mixed_BNTM`, linear in the probabilities: partial sums over slots add up."""
        return weighted(probs_BNTS, memory[self.values])

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
            form = functools.partial(self._expanded, queries, positions_BT)
            heads_BNTV = read(cache.sources(frozenset()), form, cache.chunk or EXPANDED_CHUNK)
            return self.merge(heads_BNTV.astype(x_BTD.dtype)), cache
        form = functools.partial(self._absorbed, self.absorb(queries), positions_BT)
        mixed_BNTM = read(cache.sources(self.inside), form, cache.chunk)
        return self.output(mixed_BNTM.astype(x_BTD.dtype)), cache

    def _expanded(self, queries, positions_BT, maps):
        """Explicit heads of a stretch of memory: few FLOPs a query, more a slot."""
        assert not maps

        def logits_and_mix(part):
            q_BKGTH, k_BKSH, v_BKSV = self.expand(queries, part.memory, part.positions_BS)
            logits_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)

            def mix(probs_BNTS):
                probs_BKGTS = probs_BNTS.reshape(logits_BKGTS.shape)
                return _in_order(jnp.einsum("BKGTS,BKSV->BKGTV", probs_BKGTS, v_BKSV))

            return self._logits(_in_order(logits_BKGTS), positions_BT, part), mix

        return logits_and_mix, lambda mixed_BNTV, total_BNT1: mixed_BNTV

    def _absorbed(self, queries, positions_BT, maps):
        """The memory as it is stored, or as a codec's linear map left it."""
        entered = {name: maps[name].enter(q) if name in maps else (q, None) for name, q in queries.items()}
        mapped = {name: q_BNTM for name, (q_BNTM, _) in entered.items()}
        offsets = [offset_BNT1 for _, offset_BNT1 in entered.values() if offset_BNT1 is not None]

        def logits_and_mix(part):
            logits_BNTS = self.score(mapped, part.memory, part.positions_BS)
            for offset_BNT1 in offsets:
                logits_BNTS = logits_BNTS.astype(jnp.float32) + offset_BNT1
            logits_BNTS = self._logits(logits_BNTS, positions_BT, part)
            return logits_BNTS, lambda probs_BNTS: self.mix(probs_BNTS, part.memory)

        values = maps.get(self.values)
        leave = lambda mixed, total_BNT1: mixed if values is None else values.leave(mixed, total_BNT1)
        return logits_and_mix, leave

    def _logits(self, logits_BNTS, positions_BT, part):
        seen_BTS = self.config.band.sees(positions_BT[:, :, None], part.positions_BS[:, None])
        if part.hidden_BTS is not None:
            seen_BTS &= ~part.hidden_BTS
        return jnp.where(seen_BTS[:, None], logits_BNTS.astype(jnp.float32) * self.scale, MASKED)


def _in_order(heads_BKGTV):
    B, K, G, *rest = heads_BKGTV.shape
    return heads_BKGTV.reshape(B, K * G, *rest)
