"""How stored arrays lie in slots: axes of size 1 left out, codes of a few bits packed along time.

B batch, T tokens, S slots. A codec sees [lead, time, features]; memory lacks leading axes of size 1, which
make XLA:CPU copy what a loop carries. Of a chunk of C slots, codes of 4 bits of slots s and s + C / 2 share
a byte (of 2 bits: s, s + C / 4, ...): a part of the chunk is decoded from whole bytes, without putting
halves together, which XLA:CPU does badly.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint


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
        return jnp.where((positions_BT < 0) | overtaken_BT, NOWHERE, slots_BT)


NOWHERE = 2**30  # a slot out of every range: scattering drops it


@dataclass(frozen=True)
class Field:
    """One stored array of a layer."""

    lead: tuple[int, ...]
    """Axes before time, as the codec has them."""
    tokens: int = 1
    """Slots that share one element along time."""
    codes: int = 1
    """Slots that share a byte."""
    chunk: int = 1
    """Slots that are packed together, where codes share bytes."""

    def empty(self, stored: jax.ShapeDtypeStruct) -> jax.Array:
        """Zeros for what a codec would store for all slots."""
        *lead, time, features = stored.shape
        return jnp.zeros((*(n for n in lead if n > 1), time // self.codes, features), stored.dtype)

    def fold(self, a: jax.Array) -> jax.Array:
        """An array without the axes before time that have size 1."""
        return a.reshape(*(n for n in self.lead if n > 1), *a.shape[-2:])

    def unfold(self, a: jax.Array) -> jax.Array:
        """An array as its codec sees it."""
        return a.reshape(*self.lead, *a.shape[-2:])

    def put(self, memory: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
        """Write what a codec gave for the slots from `slot` on; of packed codes, within one part of a chunk."""
        new = self.fold(new)
        if self.codes == 1:
            return lax.dynamic_update_slice_in_dim(memory, new, slot // self.tokens, memory.ndim - 2)
        byte, shift = self._place(slot)
        old = lax.dynamic_slice_in_dim(memory, byte, new.shape[-2], memory.ndim - 2)
        return lax.dynamic_update_slice_in_dim(memory, self._mixed(old, new, shift), byte, memory.ndim - 2)

    def scatter(self, memory: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
        """Write each element to its own slot, `[T]` or by row `[B, T]`; slots out of range are dropped."""
        memory, slots = self.unfold(memory), slots[..., :: self.tokens] // self.tokens
        if self.codes == 1:
            return self.fold(_scattered(memory, new, slots))
        byte, shift = self._place(slots)
        for part in range(self.codes):  # slots of one part have bytes of their own
            now = shift == part * self._bits
            at = jnp.where(now, byte, NOWHERE)
            old = _gathered(memory, jnp.where(now, byte, 0))
            memory = _scattered(memory, self._mixed(old, new, jnp.uint8(part * self._bits)), at)
        return self.fold(memory)

    def take(self, memory: jax.Array, start: jax.Array | int, size: int, part: int, parts: int) -> jax.Array:
        """What the codec gave for part `part` of `size` slots from `start` on."""
        now = size // parts
        offset = part * now
        take = lambda at, n: lax.dynamic_slice_in_dim(memory, at, n, memory.ndim - 2)
        if self.codes == 1:
            return self.unfold(take((start + offset) // self.tokens, now // self.tokens))
        shared = size // self.codes
        bytes = take(start // self.codes + offset % shared, now)
        bytes = lax.platform_dependent(bytes, cpu=lambda bytes: bytes, default=_in_order)
        return self.unfold((bytes >> jnp.uint8(self._bits * (offset // shared))) & jnp.uint8(self._mask))

    def all(self, memory: jax.Array) -> jax.Array:
        """What the codec gave for all slots."""
        memory = self.unfold(memory)
        if self.codes == 1:
            return memory
        *lead, time, features = memory.shape
        shared = memory.reshape(*lead, -1, 1, self.chunk // self.codes, features)
        shifts = jnp.arange(0, 8, self._bits, dtype=jnp.uint8).reshape(-1, 1, 1)
        codes = (shared >> jnp.expand_dims(shifts, range(len(lead) + 1))) & jnp.uint8(self._mask)
        return codes.reshape(*lead, time * self.codes, features)

    @property
    def _bits(self) -> int:
        return 8 // self.codes

    @property
    def _mask(self) -> int:
        return 2**self._bits - 1

    def _place(self, slot):
        """The byte along time, and the bits to shift by."""
        shared = self.chunk // self.codes
        within = slot % self.chunk
        byte = slot // self.chunk * shared + within % shared
        return byte, (within // shared * self._bits).astype(jnp.uint8)

    def _mixed(self, old, new, shift):
        return (old & ~(jnp.uint8(self._mask) << shift)) | (new << shift)


def _in_order(bytes):
    """Its layout fixed: XLA:GPU would keep codes transposed, and copy them whenever a loop is entered and left.

    On a CPU a fixed layout parts the codes from their decoding, which takes 1.7 times as long.
    """
    return with_layout_constraint(bytes, Layout(tuple(range(bytes.ndim))))


def _scattered(memory, new, slots):
    if slots.ndim == 1:
        return memory.at[..., slots, :].set(new, mode="drop")
    put = jax.vmap(lambda memory, new, slots_T: memory.at[..., slots_T, :].set(new, mode="drop"))
    return put(memory, new, slots)


def _gathered(memory, slots):
    if slots.ndim == 1:
        return jnp.take(memory, slots, axis=-2)
    return jax.vmap(lambda memory, slots_T: jnp.take(memory, slots_T, axis=-2))(memory, slots)


def layout(codec: Any, stored: Any, slots: int, chunk: int | None) -> Any:
    """The `Field` of every array that a codec would store for so many slots."""

    def field(path, a):
        bits = codec.code_bits.get(path[-1].key, 8) if path else 8
        assert math.prod(a.shape[-2:-1]) and slots % a.shape[-2] == 0
        return Field(a.shape[:-2], slots // a.shape[-2], 8 // bits, chunk or slots)

    return jax.tree_util.tree_map_with_path(field, stored)
