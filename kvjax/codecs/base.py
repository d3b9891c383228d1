"""The codec protocol, and the codec that changes nothing.

A codec sees an entry: a dict of arrays [B, ..., T, features]. It knows no variant.
"""

import abc
from dataclasses import dataclass

import jax

from kvjax.checks import at_least

Entry = dict[str, jax.Array]


@dataclass(frozen=True)
class Codec(abc.ABC):
    """Stores what tokens leave behind, token by token along the axis before the last."""

    chunk: int | None = None
    """Slots decoded at a time when few queries read the cache; None reads it whole."""

    def __post_init__(self):
        if self.chunk is not None:
            at_least("chunk", self.chunk, 1)

    @abc.abstractmethod
    def encode(self, entry: Entry) -> Entry:
        """The stored form: arrays whose second to last axis is time."""

    @abc.abstractmethod
    def decode(self, stored: Entry) -> Entry:
        """The entry again, as nearly as the codec can."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class Exact(Codec):
    """Stores every element as it is."""

    def encode(self, entry: Entry) -> Entry:
        """The entry itself."""
        return entry

    def decode(self, stored: Entry) -> Entry:
        """The entry itself."""
        return stored
