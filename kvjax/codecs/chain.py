"""Codecs in a row: linear maps, then how their result is stored."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kvjax.codecs.base import Codec, Exact
from kvjax.codecs.linear import Linear


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Projected(Codec):
    """Stores what a linear map gives by another codec."""

    map: Linear
    codec: Codec

    @property
    def linear(self):
        """The map."""
        return self.map

    @property
    def inner(self):
        """The codec of what the map gives."""
        return self.codec

    @property
    def group(self):
        """Tokens that the codec encodes together."""
        return self.codec.group

    @property
    def code_bits(self):
        """The codec's fields of narrow codes."""
        return self.codec.code_bits

    def encode(self, x):
        """z, as the codec stores it."""
        return self.codec.encode(self.map.apply(x))

    def decode(self, stored, dtype):
        """x^ of the z that the codec gives back."""
        return self.map.undo(self.codec.decode(stored, jnp.float32)).astype(dtype)

    def bits_per_token(self, heads, features, element_bits):
        """Those of z, whose elements are float32; the map counts once a model."""
        return self.codec.bits_per_token(1 if self.map.joint else heads, self.map.down.shape[-1], 32)


def chain(*steps: Linear | Codec) -> Codec:
    """Maps one after another, as one, then a codec for what they give; without one it is stored in float32.

    ValueError if a codec is not last, or maps do not fit each other.
    """
    if not steps:
        raise ValueError("chain needs at least one step, a linear map or a codec")
    last = steps[-1]
    codec, before = (last, steps[:-1]) if isinstance(last, Codec) else (Exact(), steps)
    maps = [step for step in before if isinstance(step, Linear)]
    for number, step in enumerate(before, 1):
        if not isinstance(step, Linear):
            kind = type(step).__name__
            raise ValueError(
                f"step {number} of {len(steps)}, {kind}, must be the last: only maps have steps after"
            )
    if isinstance(codec, Projected):
        maps, codec = [*maps, codec.map], codec.codec
    return Projected(functools.reduce(Linear.then, maps), codec) if maps else codec
