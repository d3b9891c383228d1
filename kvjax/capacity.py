"""What a memory holds beside the weights: how long a context, how large a batch, by variant and codec.

Everything is counted from shapes, of arrays as decoding would have them; none is made.
"""

import dataclasses
import functools
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax import accounting
from kvjax.attention.base import AttentionConfig
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.checks import at_least
from kvjax.codec_benchmark import largest
from kvjax.codecs.base import Storage
from kvjax.codecs.statistics import ArrayStatistics, Moments, Statistics
from kvjax.compress import key_frequencies
from kvjax.config import Config
from kvjax.decode_benchmark import slot_unit
from kvjax.decoder import Decoder, DecoderConfig
from kvjax.dry_run import vocabulary
from kvjax.recipe_build import UNROTATED, build
from kvjax.recipes import Recipe, needs_statistics
from kvjax.slots import nbytes

UNITS = {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for unit, base in (("B", 1000), ("iB", 1024))
}


def parse_bytes(option: str, text: str) -> int:
    """Of a size such as 80GiB (1024^3) or 24GB (1000^3); ValueError naming `option`."""
    match = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", text, re.ASCII)
    if match is None:
        near = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)(b?)", text, re.ASCII | re.IGNORECASE)
        number, prefix, binary, byte = near.groups() if near else ("80", "G", "i", "B")
        nearest = f"{number}{prefix.upper() or 'G'}{'i' if binary or not byte else ''}B"
        raise ValueError(f"{option}={text!r} must be a number and one of {', '.join(UNITS)}; nearest: {nearest}")
    size = int(float(match[1]) * UNITS[match[2]])
    at_least(option, size, 1)
    return size


def bytes_text(size: float) -> str:
    """In the largest binary unit of which there is one, as 2.50 GiB."""
    power = max(0, min(4, int(math.log2(max(size, 1)) // 10)))
    return f"{size / 1024**power:,.2f} {' KMGT'[power]}iB" if power else f"{size:,.0f} B"


def enough(size: int) -> str:
    """The least whole number of a binary unit that is more, as `parse_bytes` reads it."""
    prefix = next((p for p in "TGM" if size >= UNITS[f"{p}iB"]), "K")
    return f"{size // UNITS[f'{prefix}iB'] + 1}{prefix}iB"


@dataclass(frozen=True)
class Shape:
    """A model, as far as sizes go."""

    attention: AttentionConfig
    """The variant."""
    decoder: DecoderConfig
    """Everything of the model but its attention."""
    vocab_size: int
    """Ids of the tokenizer."""
    context: int
    """Tokens of a sequence, where nothing else is said."""

    @classmethod
    def of(cls, config: Config) -> "Shape":
        """That of a configuration."""
        return cls(config.attention, config.decoder, vocabulary(config.data), config.data.context)


def _llama(num_heads: int, num_kv_heads: int, width: int, depth: int, mlp_width: int, context: int) -> Shape:
    decoder = DecoderConfig(width=width, depth=depth, mlp_width=mlp_width, tie_embeddings=False)
    return Shape(Grouped(num_heads, num_kv_heads, head_dim=128), decoder, 32_000, context)


SHAPES = {
    "llama-7b": _llama(32, 32, 4096, 32, 11008, 2048),
    "llama2-70b": _llama(64, 8, 8192, 80, 28672, 4096),
    "llama2-70b-mha": _llama(64, 64, 8192, 80, 28672, 4096),
}
"""Published ones (arXiv 2302.13971, 2307.09288); the last is as the 70B would be with a kv head a query head."""


def variants(attention: AttentionConfig) -> dict[str, AttentionConfig]:
    """Every variant of the same heads, by name: MHA, GQA at every divisor, MQA, low rank and MLA.

    Ranks are the configuration's where it has them. Else those of DeepSeek-V2's proportions for MLA, a latent of
    4 heads' features and a rotary key of half a head's, and for low rank half of all heads' features.
    """
    sizes: Any = attention
    N, H = attention.num_heads, sizes.value_dim if isinstance(attention, Latent) else sizes.head_dim
    seen: dict[str, Any] = {"window": attention.window, "num_sinks": attention.num_sinks}
    grouped = attention if isinstance(attention, Grouped) else Grouped(N, N, head_dim=H + H % 2, **seen)
    made: dict[str, AttentionConfig] = {}
    for K in (k for k in range(N, 0, -1) if N % k == 0):
        name = "mha" if K == N else "mqa" if K == 1 else f"gqa{K}"
        made[name] = dataclasses.replace(grouped, num_kv_heads=K)
    made["low_rank"] = LowRank(
        N, head_dim=H, rank=max(1, N * H // 2), position="none" if H % 2 else "rope", **seen
    )
    made["mla"] = Latent(N, rank=4 * H, rope_dim=max(2, H // 4 * 2), nope_dim=H, value_dim=H, **seen)
    if isinstance(attention, Grouped):
        return made
    kind = type(attention).__name__
    return made | {{"LowRank": "low_rank", "Latent": "mla"}.get(kind, kind): attention}


class Layers(NamedTuple):
    """How layers are stored, those that are stored alike as one."""

    kinds: tuple[Storage, ...]
    counts: tuple[int, ...]


class CacheBytes(NamedTuple):
    """Of a cache's arrays."""

    memory: int
    """What tokens left, all rows."""
    positions: int
    shared: int
    """What there is once, however many rows and slots: calibrated arrays of every layer, and the length."""
    slots: int
    """Of a row: the context rounded up to what is packed together, or a window's ring."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.memory + self.positions + self.shared


class Fit(NamedTuple):
    """What one codec makes of a memory."""

    bytes_per_token: float
    """Of the cache's arrays, at the context."""
    sequence_bytes: int
    """Of the whole cache of one sequence of the context."""
    longest_context: int | None
    """Slots of one sequence; None where attention is windowed and any length fits."""
    largest_batch: int
    """Sequences of the context."""


class Sizes:
    """Weights and caches of a model whose parameters and exact cache are of `dtype`."""

    def __init__(self, shape: Shape, dtype: jnp.dtype):
        self.shape, self._dtype = shape, dtype
        one = self._model(1)[1]
        depth = shape.decoder.depth
        self.weight_bytes = nbytes(one) + (depth - 1) * nbytes(one["layers"])

    @functools.cache  # noqa: B019
    def _model(self, depth: int) -> tuple[nnx.GraphDef[Decoder], Any]:
        """Structure and parameters, as shapes, of a model of so many layers: all layers are alike."""
        decoder = dataclasses.replace(self.shape.decoder, depth=depth, scan=False)
        build = lambda: Decoder(decoder, self.shape.attention, self.shape.vocab_size, jax.random.key(0))
        graphdef, params = nnx.split(nnx.eval_shape(build))
        return graphdef, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, self._dtype), params)

    def layers(self, recipe: Recipe) -> Layers:
        """How a recipe stores every layer; ValueError as `recipe_build.build`, or if ranks are to be measured."""
        if recipe.allocate not in (None, "uniform"):
            raise ValueError(
                f"allocate={recipe.allocate} takes what experiments.calibrate measures; nearest: allocate=uniform"
            )
        depth, model = self.shape.decoder.depth, self._model(1)
        entry = accounting.entry(self.shape.attention, self.shape.decoder.width, self._dtype)
        # A budget is shared by all layers, and which are compressed may differ; else one stands for all.
        whole = [entry] * (depth if recipe.budget or recipe.layers else 1)
        statistics = _unit_statistics(recipe, entry, len(whole)) if needs_statistics(recipe) else None
        storages = build(recipe, whole, statistics, frequencies=key_frequencies(*model))
        form = lambda storage: (jax.tree.structure(storage), str(jax.eval_shape(lambda: storage)))
        kinds = {form(storage): storage for storage in storages}
        counts = {key: sum(form(storage) == key for storage in storages) for key in kinds}
        return Layers(tuple(kinds.values()), tuple(n * depth // len(whole) for n in counts.values()))

    def cache_bytes(self, layers: Layers, batch: int, context: int) -> CacheBytes:
        """The cache of so many sequences of a context, in as many slots as generation takes for it."""
        graphdef, params = self._model(len(layers.kinds))
        slots = context + -context % slot_unit(layers.kinds)
        make = lambda params: nnx.merge(graphdef, params).init_cache(batch, slots, layers.kinds)
        cache = jax.eval_shape(make, params)
        of_all = lambda parts: sum(n * nbytes(part) for n, part in zip(layers.counts, parts))
        shared = of_all(cache.storages) + nbytes(cache.length)
        return CacheBytes(of_all(cache.memory), nbytes(cache.positions_BS), shared, cache.max_len)

    def fit(self, layers: Layers, memory: int, context: int) -> Fit:
        """What fits a memory beside the weights; zeros where nothing does."""
        room = memory - self.weight_bytes
        one = self.cache_bytes(layers, 1, context)
        batch = largest(lambda n: one.shared + n * (one.total - one.shared), room)
        return Fit(one.memory / one.slots, one.total, self._longest(layers, one, room), batch)

    def _longest(self, layers, one, room):
        window, num_sinks = self.shape.attention.band
        if window is not None and self.cache_bytes(layers, 1, window + num_sinks).total <= room:
            return None
        # A cache grows by as much with every unit of slots: two of its lengths say how long it can be.
        unit = slot_unit(layers.kinds)
        first = self.cache_bytes(layers, 1, unit).total
        if window is None and one.slots > unit:
            more = (one.total - first) // (one.slots // unit - 1)
        else:
            more = self.cache_bytes(layers, 1, 2 * unit).total - first
        return unit * largest(lambda n: first + (n - 1) * more, room)


def _unit_statistics(recipe: Recipe, entry: Any, depth: int) -> Statistics:
    """Those of features without correlation: sizes follow from ranks and formats, whatever was measured."""
    joint = any(step.has("joint") for _, chain in recipe.arrays for step in chain)

    def unit(a):
        *heads, features = (*a.shape[1:-2], a.shape[-1])
        eye = np.broadcast_to(np.eye(features), (*heads, features, features))
        cross = np.eye(math.prod(heads) * features) if heads and joint else None
        moments = Moments(1, np.zeros((*heads, features)), eye, cross, 1.0)
        return ArrayStatistics(moments, moments, eye, eye)

    layer = {name: unit(a) for name, a in entry.items()}
    layer |= {UNROTATED: layer["k"]} if "k" in layer else {}
    return Statistics((layer,) * depth, 1, 1, "no model", "no data")
