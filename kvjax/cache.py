"""The cache: what tokens left behind, encoded, in slots that carry positions.

B batch, T tokens written, S slots. Stored arrays are [B, ..., S, features]: the axis before the
last is time, the layout that decodes without transposing or copying.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from kvjax.codecs.base import Codec, Entry


def nbytes(tree: Any) -> int:
    """Bytes of a pytree's arrays (or shapes): the only definition of a cache's size."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclass(frozen=True)
class LayerCache:
    """One layer's view while a forward pass writes and reads it; `start` is its next free slot."""

    memory: Entry
    codec: Codec
    positions_BS: jax.Array
    start: jax.Array
    length: jax.Array

    @property
    def chunk(self) -> int | None:
        """Slots that are decoded at a time, None for all of them."""
        return self.codec.chunk

    def write(self, entry: Entry) -> Self:
        """Encode an entry and store it from slot `start` on."""
        put = lambda slots, new: lax.dynamic_update_slice_in_dim(slots, new, self.start, slots.ndim - 2)
        return dataclasses.replace(self, memory=jax.tree.map(put, self.memory, self.codec.encode(entry)))

    def read(self, start: jax.Array | int = 0, size: int | None = None) -> Entry:
        """Decode `size` slots from `start`, or all of them."""
        if size is None:
            return self.codec.decode(self.memory)
        take = lambda slots: lax.dynamic_slice_in_dim(slots, start, size, slots.ndim - 2)
        return self.codec.decode(jax.tree.map(take, self.memory))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """A model's cache, a pytree to be donated: one stored entry a layer, and whose slots they are.

    Rows share slots and differ in positions (-1: empty), so that ragged prompts are left-padded
    with position -1 and every write is one slice.
    """

    memory: tuple[Entry, ...]
    positions_BS: jax.Array
    length: jax.Array
    """Slots in use, from the first."""
    codec: Codec

    @property
    def max_len(self) -> int:
        """Slots."""
        return self.positions_BS.shape[1]

    def room_for(self, num_tokens: int) -> None:
        """ValueError if `num_tokens` more do not fit; JAX would clamp the write silently.

        The length is known only outside of `jit`: callers check before they call a jitted function.
        """
        used = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
        if used + num_tokens > self.max_len:
            raise ValueError(
                f"num_tokens={num_tokens} do not fit a cache of max_len={self.max_len} slots with {used} in use; "
                f"at most {self.max_len - used} fit"
            )

    def claim(self, positions_BT: jax.Array) -> Self:
        """The cache with its next slots given to tokens at these positions."""
        self.room_for(positions_BT.shape[1])
        positions_BS = lax.dynamic_update_slice_in_dim(self.positions_BS, positions_BT, self.length, 1)
        return dataclasses.replace(self, positions_BS=positions_BS, length=self.length + positions_BT.shape[1])

    def layer(self, index: int, num_tokens: int) -> LayerCache:
        """A layer's view, after `claim`, that writes the last `num_tokens` claimed slots."""
        start = self.length - num_tokens
        return LayerCache(self.memory[index], self.codec, self.positions_BS, start, self.length)

    def bytes_per_token(self) -> float:
        """Measured bytes of a slot, all layers: arrays of the cache over batch x slots, positions apart."""
        return nbytes(self.memory) / self.positions_BS.size


def empty(entries: tuple[Entry, ...], codec: Codec) -> Cache:
    """An empty cache for entries of these shapes (arrays or ShapeDtypeStructs, time as long as the cache)."""
    stored = jax.eval_shape(lambda: tuple(codec.encode(e) for e in _zeros(entries)))
    first = jax.tree.leaves(entries[0])[0]
    batch, max_len = first.shape[0], first.shape[-2]
    if codec.chunk is not None and max_len % codec.chunk:
        below = max_len - max_len % codec.chunk
        raise ValueError(
            f"max_len={max_len} must be a multiple of the codec's chunk={codec.chunk}; "
            f"nearest: {below or codec.chunk} or {below + codec.chunk}"
        )
    positions_BS = jnp.full((batch, max_len), -1, jnp.int32)
    return Cache(_zeros(stored), positions_BS, jnp.zeros((), jnp.int32), codec)


def _zeros(tree):
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)
