"""The cache: what tokens left behind, encoded, in slots that carry positions.

B batch, T tokens written, S slots.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kvjax.codecs.base import Codecs, Entry, Storage, per_layer
from kvjax.layer_cache import RECENT, SINKS, LayerCache
from kvjax.slots import Field, Ring, layout, nbytes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """A model's cache, a pytree to be donated: one stored entry a layer, and whose slots they are.

    Slots carry positions (-1: empty). Rows fill the same slots, one after the other, so that ragged
    prompts are left-padded with position -1 and every write is one slice; in a ring a slot goes by
    its row's position.
    """

    memory: tuple[dict[str, Any], ...]
    """Of every layer, stored arrays by name; exact tokens in `recent` and `sinks`."""
    positions_BS: jax.Array
    length: jax.Array
    """Tokens written, padding among them; slots in use, from the first, if there is no ring."""
    storages: tuple[Storage, ...]
    """How every layer is stored. Calibrated arrays are here: they count once a model, not a token."""
    layouts: tuple[tuple[Field, ...], ...] = field(metadata={"static": True})
    """Of every layer, the fields of its stored arrays."""
    dtypes: tuple[tuple[tuple[str, Any], ...], ...] = field(metadata={"static": True})
    """Of every layer, names and dtypes of what `read` gives."""
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
            return Claim(cache, self.length, positions_BS, after, positions_BT)
        slots_BT = self.ring.slots(positions_BT)
        put = jax.vmap(lambda slots_S, new_T, place_T: slots_S.at[place_T].set(new_T, mode="drop"))
        positions_BS = put(self.positions_BS, positions_BT, slots_BT)
        cache = dataclasses.replace(self, positions_BS=positions_BS, length=after)
        seen_BS = positions_BS
        if positions_BT.shape[1] > 1:
            seen_BS = jnp.concatenate([self.positions_BS, positions_BT], axis=1)
        return Claim(cache, slots_BT, seen_BS, jnp.int32(seen_BS.shape[1]), positions_BT)

    def bytes_per_token(self) -> float:
        """Measured bytes of a slot, all layers: arrays of the cache over batch x slots, positions apart.

        Exact tokens are in it: they cost less a slot the longer the cache.
        """
        return nbytes(self.memory) / self.positions_BS.size


@dataclass(frozen=True)
class Claim:
    """A cache whose next slots are given to tokens that its layers have yet to write."""

    cache: Cache
    place: jax.Array
    positions_BS: jax.Array
    length: jax.Array
    positions_BT: jax.Array

    def layer(self, index: int) -> LayerCache:
        """A layer's view."""
        memory, storage = self.cache.memory[index], self.cache.storages[index]
        stored = {name: memory[name] for name in storage.named}
        fields = jax.tree.unflatten(jax.tree.structure(stored), self.cache.layouts[index])
        dtypes = dict(self.cache.dtypes[index])
        about = self.positions_BS, self.place, self.length, self.positions_BT
        return LayerCache(memory, storage, fields, dtypes, *about)

    def written(self, layers: Sequence[LayerCache]) -> Cache:
        """The cache that holds what the layers have written."""
        return dataclasses.replace(self.cache, memory=tuple(layer.memory for layer in layers))


def empty(entries: tuple[Entry, ...], codec: Codecs, ring: Ring | None = None) -> Cache:
    """An empty cache for entries of these shapes (arrays or ShapeDtypeStructs, time as long as the cache)."""
    # Copies: a cache is donated, with all that is in it, and layers may share a codec.
    storages = jax.tree.map(jnp.array, per_layer(codec, [sorted(entry) for entry in entries]))
    first = jax.tree.leaves(entries[0])[0]
    batch, max_len = first.shape[0], first.shape[-2]
    for storage in storages:
        _check(storage, max_len, ring)
    memory, layouts = zip(*map(_layer, entries, storages))
    dtypes = tuple(tuple((name, a.dtype) for name, a in sorted(entry.items())) for entry in entries)
    positions_BS = jnp.full((batch, max_len), -1, jnp.int32)
    return Cache(memory, positions_BS, jnp.zeros((), jnp.int32), storages, layouts, dtypes, ring)


def _check(storage, max_len, ring):
    step = storage.step or storage.group
    if max_len % step:
        below = max_len - max_len % step
        raise ValueError(
            f"max_len={max_len} must be a multiple of the codec's chunk={step}; "
            f"nearest: {below or step} or {below + step}"
        )
    if ring is not None and (storage.recent or storage.group > 1):
        raise ValueError(
            f"recent={storage.recent} and codecs of {storage.group} tokens together do not go with windowed "
            "attention, whose slots are overwritten; use codecs that store each token, and recent=0"
        )


def _layer(entry, storage):
    """Zeros for all that a layer stores, and the fields of its encoded arrays."""
    shape = lambda a, time: jax.ShapeDtypeStruct((*a.shape[:-2], time, a.shape[-1]), a.dtype)
    slots, memory, fields = jax.tree.leaves(entry)[0].shape[-2], {}, {}
    for name, codec in storage.named.items():
        stored = jax.eval_shape(codec.encode, shape(entry[name], slots))
        fields[name] = layout(codec, stored, slots, storage.step)
        memory[name] = jax.tree.map(lambda field, a: field.empty(a), fields[name], stored)
    recent = storage.recent + (storage.group if storage.group > 1 else 0)
    for kind, time in ((RECENT, recent), (SINKS, storage.sinks)):
        if time:
            memory[kind] = {n: Field(a.shape[:-2]).empty(shape(a, time)) for n, a in entry.items()}
    return memory, tuple(jax.tree.leaves(fields, is_leaf=lambda f: isinstance(f, Field)))
