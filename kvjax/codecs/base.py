"""The codec protocol: how one array of an entry is stored, and how a layer's arrays are.

An array is [..., T, F]: the last axis is one token's vector, the axis before it is time. A codec
knows no variant. It is a pytree: what was calibrated for it are leaves, everything else is static.

T tokens, F features of a token.
"""

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Union

import jax

from kvjax.checks import at_least, one_of
from kvjax.codecs.linear import Linear

Entry = dict[str, jax.Array]
Stored = Any  # one array, or a dict of arrays, each [..., time, features]

CHUNK = 256  # slots that are decoded at a time: small enough for a core's cache


class Codec(abc.ABC):
    """Stores one array of an entry, token by token."""

    @property
    def group(self) -> int:
        """Tokens that are encoded together; `encode` is given multiples of it."""
        return 1

    @property
    def code_bits(self) -> Mapping[str, int]:
        """Stored fields whose uint8 elements are codes of fewer bits (4 or 2): the cache packs them."""
        return {}

    @abc.abstractmethod
    def encode(self, x: jax.Array) -> Stored:
        """The stored form of `[..., T, F]`: arrays `[..., T, f]`, or of time T over a divisor of `group`."""

    @abc.abstractmethod
    def decode(self, stored: Stored, dtype: Any) -> jax.Array:
        """The array again, `[..., T, F]` in `dtype`, as nearly as the codec can."""

    @abc.abstractmethod
    def bits_per_token(self, heads: int, features: int, element_bits: int) -> float:
        """Stored bits of a token `[heads, features]` in closed form, averaged over time.

        `element_bits` are those of an element that is stored as it is.
        """

    @property
    def linear(self) -> Linear | None:
        """The affine map that stands first, if there is one: what it gives can be read without undoing it."""
        return None

    @property
    def inner(self) -> "Codec":
        """How the result of `linear` is stored."""
        return self


class Quantizer(Codec):
    """A codec that gives each element a number of bits, whatever its dtype."""

    @abc.abstractmethod
    def bits_per_value(self, features: int) -> float:
        """Stored bits an element of a token of so many features, scales included."""

    def bits_per_token(self, heads, features, element_bits):
        """Those of every element."""
        return heads * features * self.bits_per_value(features)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Exact(Codec):
    """Stores every element as it is."""

    def encode(self, x):
        """The array itself."""
        return x

    def decode(self, stored, dtype):
        """The array itself."""
        return stored.astype(dtype)

    def bits_per_token(self, heads, features, element_bits):
        """All elements."""
        return heads * features * element_bits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Storage:
    """How one layer stores its entries: a codec for every array by name, or one for all of them.

    Arrays without a codec are stored exactly. The first `sinks` positions and the newest `recent` tokens
    are kept exact besides, and read instead of their encoded forms.
    """

    arrays: Codec | Mapping[str, Codec] = field(default_factory=Exact)
    chunk: int | None = field(default=None, metadata={"static": True})
    """Slots decoded at a time when few queries read; None: all if every array is exact, else 256 or more."""
    sinks: int = field(default=0, metadata={"static": True})
    recent: int = field(default=0, metadata={"static": True})

    def __post_init__(self):
        if self.chunk is not None:
            at_least("chunk", self.chunk, 1)
        at_least("sinks", self.sinks, 0)
        at_least("recent", self.recent, 0)

    def by_name(self, names: Sequence[str]) -> "Storage":
        """The same with a codec for each of these arrays; ValueError for other names and broken rules."""
        arrays = self.arrays
        if isinstance(arrays, Codec):
            arrays = {name: arrays for name in names}
        for name in arrays:
            one_of("codec of array", name, names)
        storage = replace(self, arrays={name: arrays[name] if name in arrays else Exact() for name in names})
        storage._check()
        return storage

    def _check(self):
        if self.chunk is not None and self.chunk % self.unit:
            below = self.chunk - self.chunk % self.unit
            raise ValueError(
                f"chunk={self.chunk} must be a multiple of {self.unit}, which these codecs pack together; "
                f"nearest: {below or self.unit} or {below + self.unit}"
            )
        if self.recent % self.group:
            raise ValueError(
                f"recent={self.recent} must be a multiple of the {self.group} tokens encoded together"
            )

    @property
    def named(self) -> Mapping[str, Codec]:
        """Codecs by name, once `by_name` has resolved them."""
        assert not isinstance(self.arrays, Codec)
        return self.arrays

    @property
    def codecs(self) -> list[Codec]:
        """Every codec."""
        return [self.arrays] if isinstance(self.arrays, Codec) else list(self.arrays.values())

    @property
    def group(self) -> int:
        """Tokens that leave the exact part together."""
        return math.lcm(*(codec.group for codec in self.codecs))

    @property
    def parts(self) -> int:
        """Steps in which a chunk is read: as many as codes share a byte."""
        return max([8 // bits for codec in self.codecs for bits in codec.code_bits.values()], default=1)

    @property
    def unit(self) -> int:
        """What `chunk` must be a multiple of."""
        return self.parts * self.group

    @property
    def step(self) -> int | None:
        """Slots decoded at a time, None for all of them."""
        if self.chunk is not None or all(isinstance(codec, Exact) for codec in self.codecs):
            return self.chunk
        return -(-CHUNK // self.unit) * self.unit


Codecs = Union[Codec, Storage, Sequence[Union[Codec, Storage]]]  # noqa: UP007
"""One for every layer alike, or one a layer."""


def per_layer(codec: Codecs, names: Sequence[Sequence[str]]) -> tuple[Storage, ...]:
    """What is stored how in every layer whose entries have these names; ValueError if the layers do not fit."""
    layers = [codec] * len(names) if isinstance(codec, Codec | Storage) else list(codec)
    if len(layers) != len(names):
        raise ValueError(f"codecs={len(layers)} must be one, or as many as the layers, {len(names)}")
    storages = [Storage(layer) if isinstance(layer, Codec) else layer for layer in layers]
    return tuple(storage.by_name(n) for storage, n in zip(storages, names))


def slot_multiple(codec: Codecs | None) -> int:
    """What the slots of a cache must be a multiple of."""
    if codec is None:
        return 1
    layers = [codec] if isinstance(codec, Codec | Storage) else codec
    storages = [Storage(layer) if isinstance(layer, Codec) else layer for layer in layers]
    return math.lcm(*(storage.step or 1 for storage in storages))
