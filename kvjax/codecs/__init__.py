"""How a cache is stored, one file a kind, on the protocol of `base`."""

from kvjax.codecs.base import Codec, Exact, Storage

__all__ = ["Codec", "Exact", "Storage"]
