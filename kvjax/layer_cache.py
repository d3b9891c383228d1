"""One layer's view of the cache while a forward pass writes and reads it.

B batch, T tokens written, S slots, C slots of a part. What is read comes from up to three
sources: the encoded slots, and the tokens that are kept exact, the first ones and the newest ones.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from kvjax.attention.reading import Part, Source
from kvjax.codecs.base import Entry, Storage
from kvjax.slots import NOWHERE, Field

RECENT, SINKS = "recent", "sinks"
"""Where a layer's memory has its exact tokens, beside its arrays by name."""


@dataclass(frozen=True)
class LayerCache:
    """A layer's memory and how it is stored."""

    memory: dict[str, Any]
    storage: Storage
    fields: Mapping[str, Any]
    """The `Field` of every stored array."""
    dtypes: Mapping[str, Any]
    """Of the entry's arrays."""
    positions_BS: jax.Array
    """Position of the token in each slot, those to be written among them."""
    place: jax.Array
    """First slot to write, or every token's slot in a ring `BT`."""
    length: jax.Array
    """Slots in use after the write."""
    positions_BT: jax.Array
    """Of the tokens to be written."""
    turned: Mapping[str, Any] | None = None
    """Stored arrays to read instead of the memory, in which a ring's slots have been overtaken."""
    kept: tuple[Part, ...] = ()
    """Exact tokens to read: sinks, and the newest."""

    @property
    def chunk(self) -> int | None:
        """Slots that are decoded at a time, None for all of them."""
        return self.storage.step

    def write(self, entry: Entry) -> Self:
        """Encode an entry and store it."""
        memory = dict(self.memory)
        if SINKS in memory:
            at_BT = jnp.where(self.positions_BT < 0, NOWHERE, self.positions_BT)
            memory[SINKS] = {n: Field(x.shape[:-2]).scatter(memory[SINKS][n], x, at_BT) for n, x in entry.items()}
        if RECENT in memory:
            memory[RECENT] = {name: self._newest(name, x) for name, x in entry.items()}
        turned = {}
        for name, x in entry.items():
            codec = self.storage.named[name]
            if codec.group > 1:
                x, first = self._blocks(name, x, memory[RECENT][name])
            else:
                first = self.place
            stored = codec.encode(x)
            put = functools.partial(self._put, first=first, num_tokens=x.shape[-2])
            memory[name] = jax.tree.map(put, self.fields[name], self.memory[name], stored)
            if self.place.ndim and x.shape[-2] > 1:
                # Several tokens overtake slots that the first of them still see: read what was, and the new.
                join = lambda field, old, new: jnp.concatenate([field.all(old), new], axis=-2)
                turned[name] = jax.tree.map(join, self.fields[name], self.memory[name], stored)
        layer = dataclasses.replace(self, memory=memory, turned=turned or None)
        return dataclasses.replace(layer, kept=self._kept(entry, memory))

    def _put(self, field, old, new, first, num_tokens):
        exact_fit = field.codes == 1 and num_tokens == self.positions_BT.shape[1]  # whole groups may pass the end
        if first.ndim == 0 and (self._one or exact_fit):
            return field.put(old, new, first)
        return field.scatter(old, new, first if first.ndim else first + jnp.arange(num_tokens))

    @property
    def _one(self):
        return self.positions_BT.shape[1] == 1

    def _newest(self, name, x):
        """The ring of newest tokens with these among them."""
        field, ring = Field(x.shape[:-2]), self.memory[RECENT][name]
        num_slots, T = ring.shape[-2], x.shape[-2]
        if T == 1:
            return field.put(ring, x, self.place % num_slots)
        last = min(T, num_slots)
        return field.scatter(ring, x[..., T - last :, :], (self.place + jnp.arange(T - last, T)) % num_slots)

    def _blocks(self, name, x, ring):
        """Whole groups that these tokens lie in, the tokens before them from the ring; and their first slot."""
        field, group, T = Field(x.shape[:-2]), self.storage.named[name].group, x.shape[-2]
        first = self.place // group * group
        before = ring if T == 1 else self.memory[RECENT][name]
        take = lambda a: lax.dynamic_slice_in_dim(a, first % a.shape[-2], group, a.ndim - 2)
        blocks = field.unfold(take(before))
        if T > 1:
            room = (-(-(T - 1) // group) + 1) * group
            blocks = jnp.concatenate([blocks, jnp.zeros((*x.shape[:-2], room - group, x.shape[-1]), x.dtype)], -2)
            blocks = lax.dynamic_update_slice_in_dim(blocks, x, self.place - first, x.ndim - 2)
        slots = first + jnp.arange(blocks.shape[-2])
        used_BT = jnp.take(self.positions_BS, slots, axis=1, mode="fill", fill_value=-1) >= 0
        tokens = max(f.tokens for f in jax.tree.leaves(self.fields[name], is_leaf=lambda f: isinstance(f, Field)))
        return _padding_filled(blocks, used_BT, tokens), first

    # Reading

    def sources(self, inside: frozenset[str] = frozenset()) -> list[Source]:
        """What the queries of the tokens just written read; arrays in `inside` as their linear map left them."""
        codecs = self.storage.named
        maps = {name: linear for name in inside if (linear := codecs[name].linear) is not None}
        inner = {name: codec.inner if name in maps else codec for name, codec in codecs.items()}
        stored, fields = {name: self.memory[name] for name in codecs}, self.fields
        if self.turned is not None:
            stored, fields = self.turned, jax.tree.map(lambda field: Field(field.lead), self.fields)
        num_parts = 1 if self.turned is not None else self.storage.parts

        def read(start, size):
            part = lambda p: {name: decode(name, start, size, p) for name in stored}
            now = size // num_parts
            return [self._part(part(p), start + p * now, now) for p in range(num_parts)]

        def decode(name, start, size, p):
            take = lambda field, a: field.take(a, start, size, p, num_parts)
            return inner[name].decode(jax.tree.map(take, fields[name], stored[name]), self.dtypes[name])

        sources = [Source(self.positions_BS.shape[1], self.length, read, num_parts, maps)]
        for kept in self.kept:
            n = kept.positions_BS.shape[1]
            sources.append(Source(n, n, lambda start, size, kept=kept: [_stretch(kept, start, size)]))
        return sources

    def _part(self, memory, start, size):
        positions_BS = lax.dynamic_slice_in_dim(self.positions_BS, start, size, axis=1)
        hidden_BTS = None
        if RECENT in self.memory:
            slots_S = start + jnp.arange(size)
            hidden_BTS = (slots_S[None] >= self._boundary()[:, None])[None]
        if SINKS in self.memory:
            sink_B1S = (positions_BS < self.storage.sinks)[:, None]
            hidden_BTS = sink_B1S if hidden_BTS is None else hidden_BTS | sink_B1S
        return Part(memory, positions_BS, hidden_BTS)

    def _boundary(self):
        """The first slot that each written token's query reads exactly."""
        after_T = self.place + 1 + jnp.arange(self.positions_BT.shape[1])
        return (after_T - self.storage.recent) // self.storage.group * self.storage.group

    def _kept(self, entry, memory):
        """Exact tokens that these tokens' queries read: sinks, the newest before them, themselves."""
        B, T = self.positions_BT.shape
        kept = []
        if SINKS in memory:
            n = self.storage.sinks
            first_1S = jnp.arange(n)[None]
            there_BS = (self.positions_BS[:, None] == first_1S[:, :, None]).any(-1)  # a text may start later
            positions_BS = jnp.where(there_BS, first_1S, -1)
            kept.append(Part(self._unfolded(entry, memory[SINKS]), positions_BS, jnp.zeros((B, T, n), bool)))
        if RECENT in memory:
            arrays = self._unfolded(entry, memory[RECENT] if self._one else self.memory[RECENT])
            num_slots = jax.tree.leaves(arrays)[0].shape[-2]
            last = self.place - (0 if self._one else 1)
            slots_S = last - (last - jnp.arange(num_slots)) % num_slots
            if not self._one:
                arrays = {name: jnp.concatenate([arrays[name], x], axis=-2) for name, x in entry.items()}
                slots_S = jnp.concatenate([slots_S, self.place + jnp.arange(T)])
            positions_BS = jnp.where((slots_S >= 0)[None], jnp.take(self.positions_BS, slots_S, axis=1), -1)
            hidden_BTS = jnp.broadcast_to((slots_S[None] < self._boundary()[:, None])[None], (B, T, len(slots_S)))
            if SINKS in memory:
                hidden_BTS |= (positions_BS < self.storage.sinks)[:, None]
            kept.append(Part(arrays, positions_BS, hidden_BTS))
        return tuple(kept)

    def _unfolded(self, entry, arrays):
        return {name: Field(x.shape[:-2]).unfold(arrays[name]) for name, x in entry.items()}


def _padding_filled(x, used_BT, group):
    """Tokens that are padding replaced by the largest of their group, which leaves its extremes as they are."""
    B, T = used_BT.shape
    used = used_BT.reshape(B, *(1,) * (x.ndim - 3), T // group, group, 1)
    grouped = x.reshape(*x.shape[:-2], T // group, group, x.shape[-1])
    largest = jnp.where(used, grouped, -jnp.inf).max(-2, keepdims=True)
    filled = jnp.where(used, grouped, jnp.where(jnp.isfinite(largest), largest, 0.0).astype(x.dtype))
    return filled.reshape(x.shape)


def _stretch(part, start, size):
    take = lambda a, axis: lax.dynamic_slice_in_dim(a, start, size, axis)
    memory = {name: take(a, a.ndim - 2) for name, a in part.memory.items()}
    return Part(memory, take(part.positions_BS, 1), take(part.hidden_BTS, 2))
