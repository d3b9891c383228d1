"""The cache: what tokens left behind, encoded, in slots that carry positions.

B batch, T tokens written, S slots. A codec sees [B, ..., S, features]: time before the last axis, the
layout that decodes without transposing or copying. Stored arrays lack leading axes of size 1, which
make XLA:CPU copy what a loop carries.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from kvjax.codecs.base import Codec, Entry


def nbytes(tree: Any) -> int:
    """Bytes of a pytree's arrays (or shapes): the only definition of a cache's size."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Ring:
    """Slots by position: the first `num_sinks` positions keep theirs, later ones share `window` in turn."""

    window: int
    num_sinks: int

    @property
    def num_slots(self) -> int:
        """Slots that are ever used."""
        return self.window + self.num_sinks

    def slots(self, positions_BT: jax.Array) -> jax.Array:
        """Slots `BT` of these positions; out of range (nothing is written) for empty and overtaken ones."""
        turn_BT = self.num_sinks + (positions_BT - self.num_sinks) % self.window
        slots_BT = jnp.where(positions_BT < self.num_sinks, positions_BT, turn_BT)
        last_B1 = positions_BT.max(-1, keepdims=True)
        overtaken_BT = (positions_BT >= self.num_sinks) & (positions_BT + self.window <= last_B1)
        return jnp.where((positions_BT < 0) | overtaken_BT, self.num_slots, slots_BT)


@dataclass(frozen=True)
class LayerCache:
    """One layer's view while a forward pass writes and reads it."""

    memory: Entry
    codec: Codec
    positions_BS: jax.Array
    """Position of the token in each slot that `read` gives."""
    leads: tuple[tuple[int, ...], ...]
    """Axes before time of every array that `codec` sees; `memory` has them as one, or none."""
    place: jax.Array
    """First slot to write, or every token's slot in a ring `BT`."""
    length: jax.Array
    """Slots in use, from the first, of those that `read` gives."""
    view: Entry | None = None
    """What `read` gives, if that is not what is stored."""

    @property
    def chunk(self) -> int | None:
        """Slots that are decoded at a time, None for all of them."""
        return self.codec.chunk

    def write(self, entry: Entry) -> Self:
        """Encode an entry and store it."""
        new = self.codec.encode(entry)
        if self.place.ndim == 0:
            put = lambda slots, new: lax.dynamic_update_slice_in_dim(slots, new, self.place, slots.ndim - 2)
            return dataclasses.replace(self, memory=jax.tree.map(put, self.memory, fold(new)))
        put = jax.vmap(lambda slots, new, place_T: slots.at[..., place_T, :].set(new, mode="drop"))
        old = unfold(self.memory, self.leads)
        memory = fold(jax.tree.map(lambda slots, new: put(slots, new, self.place), old, new))
        view = None
        if self.place.shape[1] > 1:
            # Several tokens overtake slots that the first of them still see: read what was, and the new.
            join = lambda old, new: jnp.concatenate([old, new], axis=-2)
            view = jax.tree.map(join, self.codec.decode(old), self.codec.decode(new))
        return dataclasses.replace(self, memory=memory, view=view)

    def read(self, start: jax.Array | int = 0, size: int | None = None) -> Entry:
        """Decode `size` slots from `start`, or all of them."""
        if size is None:
            return self.codec.decode(unfold(self.memory, self.leads)) if self.view is None else self.view
        take = lambda slots: lax.dynamic_slice_in_dim(slots, start, size, slots.ndim - 2)
        if self.view is not None:
            return jax.tree.map(take, self.view)
        return self.codec.decode(unfold(jax.tree.map(take, self.memory), self.leads))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """A model's cache, a pytree to be donated: one stored entry a layer, and whose slots they are.

    Slots carry positions (-1: empty). Rows fill the same slots, one after the other, so that ragged
    prompts are left-padded with position -1 and every write is one slice; in a ring a slot goes by
    its row's position.
    """

    memory: tuple[Entry, ...]
    positions_BS: jax.Array
    length: jax.Array
    """Tokens written, padding among them; slots in use, from the first, if there is no ring."""
    codec: Codec
    leads: tuple[tuple[tuple[int, ...], ...], ...] = field(metadata={"static": True})
    """Of every layer's arrays, the axes before time that `codec` sees."""
    ring: Ring | None = field(default=None, metadata={"static": True})

    @property
    def max_len(self) -> int:
        """Slots."""
        return self.positions_BS.shape[1]

    def room_for(self, num_tokens: int) -> None:
        """ValueError if `num_tokens` more do not fit; JAX would clamp the write silently. A ring never fills.

        The length is known only outside of `jit`: callers check before they call a jitted function.
        """
        used = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
        if self.ring is None and used + num_tokens > self.max_len:
            raise ValueError(
                f"num_tokens={num_tokens} do not fit a cache of max_len={self.max_len} slots with {used} in use; "
                f"at most {self.max_len - used} fit"
            )

    def claim(self, positions_BT: jax.Array) -> "Claim":
        """Slots for tokens at these positions."""
        self.room_for(positions_BT.shape[1])
        after = self.length + positions_BT.shape[1]
        if self.ring is None:
            positions_BS = lax.dynamic_update_slice_in_dim(self.positions_BS, positions_BT, self.length, 1)
            cache = dataclasses.replace(self, positions_BS=positions_BS, length=after)
            return Claim(cache, self.length, positions_BS, after)
        slots_BT = self.ring.slots(positions_BT)
        put = jax.vmap(lambda slots_S, new_T, place_T: slots_S.at[place_T].set(new_T, mode="drop"))
        positions_BS = put(self.positions_BS, positions_BT, slots_BT)
        cache = dataclasses.replace(self, positions_BS=positions_BS, length=after)
        seen_BS = positions_BS
        if positions_BT.shape[1] > 1:
            seen_BS = jnp.concatenate([self.positions_BS, positions_BT], axis=1)
        return Claim(cache, slots_BT, seen_BS, jnp.int32(seen_BS.shape[1]))

    def bytes_per_token(self) -> float:
        """Measured bytes of a slot, all layers: arrays of the cache over batch x slots, positions apart."""
        return nbytes(self.memory) / self.positions_BS.size


@dataclass(frozen=True)
class Claim:
    """A cache whose next slots are given to tokens that its layers have yet to write."""

    cache: Cache
    place: jax.Array
    positions_BS: jax.Array
    length: jax.Array

    def layer(self, index: int) -> LayerCache:
        """A layer's view."""
        cache = self.cache
        return LayerCache(
            cache.memory[index], cache.codec, self.positions_BS, cache.leads[index], self.place, self.length
        )

    def written(self, layers: Sequence[LayerCache]) -> Cache:
        """The cache that holds what the layers have written."""
        return dataclasses.replace(self.cache, memory=tuple(layer.memory for layer in layers))


def empty(entries: tuple[Entry, ...], codec: Codec, ring: Ring | None = None) -> Cache:
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
    leads = tuple(tuple(a.shape[:-2] for a in jax.tree.leaves(layer)) for layer in stored)
    return Cache(fold(_zeros(stored)), positions_BS, jnp.zeros((), jnp.int32), codec, leads, ring)


def fold(tree: Any) -> Any:
    """Arrays without the axes before time that have size 1."""
    drop = lambda a: a.reshape(*(n for n in a.shape[:-2] if n > 1), *a.shape[-2:])
    return jax.tree.map(drop, tree)


def unfold(tree: Any, leads: tuple[tuple[int, ...], ...]) -> Any:
    """Arrays as a codec sees them, from what `fold` gave."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [a.reshape(*lead, *a.shape[-2:]) for a, lead in zip(leaves, leads)])


def _zeros(tree):
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)
