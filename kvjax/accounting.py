"""Parameters, FLOPs and bytes: closed formulas, and what this machine and its compiler say.

B batch, T query tokens, S memory slots, D width, N query heads, V value dim.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax import sharding
from kvjax.attention.base import AttentionConfig
from kvjax.cache import Cache
from kvjax.checks import at_least
from kvjax.codecs.base import Codecs, Exact, slot_multiple
from kvjax.config import Config
from kvjax.decoder import Decoder, DecoderConfig
from kvjax.slots import nbytes


def abstract_params(config: Config, vocab_size: int) -> Any:
    """Shapes and dtypes of the parameters, without computing them."""
    return nnx.split(nnx.eval_shape(lambda: config.build(vocab_size)))[1]


def num_parameters(params: Any) -> int:
    """Elements of a pytree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def count_parameters(config: Config, vocab_size: int) -> int:
    """`num_parameters` of `abstract_params`, of which one layer is built: layers are alike."""
    layer, rest = _layer_and_rest(config.attention, replace(config.decoder, depth=1, scan=False), vocab_size)
    return config.decoder.depth * layer + rest


@functools.lru_cache(maxsize=4096)
def _layer_and_rest(attention: AttentionConfig, decoder: DecoderConfig, vocab_size: int) -> tuple[int, int]:
    params = nnx.split(nnx.eval_shape(lambda: Decoder(decoder, attention, vocab_size, jax.random.key(0))))[1]
    layer = num_parameters(params["layers"])
    return layer, num_parameters(params) - layer


def flops_per_token(config: Config, vocab_size: int, context: int, training: bool) -> float:
    """Matrix-product FLOPs of one token in a sequence of `context`: forward, or forward and backward.

    Two per multiply-add; a token attends to (context + 1) / 2 slots on average, or to those of its
    window and sinks; the embedding's look-up counts nothing, its use as the output matrix does.
    Backward is twice forward (Kaplan et al. 2020, section 2.1), recomputation is not counted.
    """
    weights = _multiplied(config, vocab_size)
    slots = sum(config.attention.band.num_seen(t) for t in range(context)) / context
    forward = 2 * weights + config.decoder.depth * config.attention.flops_per_slot() * slots
    return forward * (3 if training else 1)


def prefill_flops(config: Config, vocab_size: int, length: int) -> float:
    """FLOPs of reading a prompt of `length` into an empty cache, in expanded form; logits of its last token alone.

    Counted as in `flops_per_token`.
    """
    every_logit = 2 * vocab_size * config.decoder.width
    return length * (flops_per_token(config, vocab_size, length, training=False) - every_logit) + every_logit


def decode_flops(config: Config, vocab_size: int, length: int, absorbed: bool) -> int:
    """FLOPs of one token that is written as the cache's `length`-th, and reads it in absorbed or expanded form.

    Two per multiply-add, of every weight and every slot seen. The expanded form rebuilds the keys and values of
    all slots at every step (MLA: 2 d_c h (d_n + d_v) FLOPs a slot); the absorbed one takes queries and sums
    through those weights instead, and rebuilds only what a rotation keeps from being absorbed. Variants that
    cache keys and values as they are read have one form.
    """
    reading = _reading(config.attention, config.decoder.width)
    own, per_slot = reading.absorbed if absorbed else reading.expanded
    slots = config.attention.band.num_seen(length - 1)
    layer = own - reading.own + slots * per_slot
    return 2 * _multiplied(config, vocab_size) + config.decoder.depth * layer


def _multiplied(config, vocab_size):
    """Weights that a token is multiplied by: all, but of an untied embedding, whose rows are looked up."""
    looked_up = 0 if config.decoder.tie_embeddings else vocab_size * config.decoder.width
    return count_parameters(config, vocab_size) - looked_up


class _Reading(NamedTuple):
    """FLOPs of one layer's reading."""

    own: int
    """Of what 2 a weight counts: a token's own up-projections and the output projection."""
    absorbed: tuple[int, int]
    """A token, and a token and slot."""
    expanded: tuple[int, int]


@functools.lru_cache(maxsize=256)
def _reading(attention: AttentionConfig, width: int) -> _Reading:
    """Counted in what the variant's methods trace to, for one token and one slot: all are linear in slots."""
    module = nnx.eval_shape(lambda: attention.build(width, 1.0, jax.random.key(0)))
    graphdef, params = nnx.split(module)
    of = lambda method: lambda params, *arguments: getattr(nnx.merge(graphdef, params), method)(*arguments)
    shape = lambda method, *arguments: jax.eval_shape(of(method), params, *arguments)
    flops = lambda method, *arguments: num_flops(of(method), params, *arguments)
    x_BTD, positions_BT = jax.ShapeDtypeStruct((1, 1, width), jnp.float32), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    queries, entry = shape("project", x_BTD, positions_BT)
    heads_BKGTH, _, v_BKSV = shape("expand", queries, entry, positions_BT)
    _, K, G, _, _ = heads_BKGTH.shape
    heads_BNTV = jax.ShapeDtypeStruct((1, K * G, 1, v_BKSV.shape[-1]), jnp.float32)
    expand, merge = flops("expand", queries, entry, positions_BT), flops("merge", heads_BNTV)
    absorbed = shape("absorb", queries)
    logits_BNTS = shape("score", absorbed, entry, positions_BT)
    mixed_BNTM = shape("mix", logits_BNTS, entry)
    own = flops("absorb", queries) + flops("output", mixed_BNTM)
    per_slot = flops("score", absorbed, entry, positions_BT) + flops("mix", logits_BNTS, entry)
    return _Reading(expand + merge, (own, per_slot), (merge, expand + attention.flops_per_slot()))


def num_flops(f: Callable, *arguments: Any) -> int:
    """Two per multiply-add of every `dot_general` for arguments of these shapes; ValueError where a loop has some.

    Of branches the largest counts.
    """
    return _flops(jax.make_jaxpr(f)(*arguments).jaxpr)


def _flops(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        inner = [_flops(body) for body in _bodies(equation)]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lengths = (equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * math.prod(lengths) * equation.outvars[0].aval.size
        elif equation.primitive.name == "cond":
            total += max(inner)
        elif equation.primitive.name in ("while", "scan") and any(inner):
            raise ValueError(f"products in a {equation.primitive.name} loop are not counted")
        else:
            total += sum(inner)
    return total


def _bodies(equation) -> Iterator[Any]:
    """The jaxprs that an equation calls."""
    for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
        if hasattr(value, "jaxpr"):
            yield value.jaxpr
        elif hasattr(value, "eqns"):
            yield value


@functools.lru_cache(maxsize=4096)
def entry(attention: AttentionConfig, width: int, dtype: jnp.dtype) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shapes of what one token leaves in one layer, as the variant's `project` gives it."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: attention.build(width, 1.0, jax.random.key(0))))
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), params)
    x_BTD, positions_BT = jax.ShapeDtypeStruct((1, 1, width), dtype), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    project = lambda params, x, positions: nnx.merge(graphdef, params).project(x, positions)[1]
    return jax.eval_shape(project, params, x_BTD, positions_BT)


def declared_bytes_per_token(config: Config, itemsize: int) -> int:
    """Bytes that one token leaves in an exact cache, all layers, in closed form."""
    return config.decoder.depth * config.attention.elements_per_token() * itemsize


def abstract_cache(
    config: Config, vocab_size: int, batch: int, max_len: int, dtype: jnp.dtype, codec: Codecs | None = None
) -> Cache:
    """The cache that decoding would use, as shapes; `nbytes` of it is its size."""
    # A scanned model is unrolled before it decodes.
    config = replace(config, decoder=replace(config.decoder, scan=False))
    graphdef, params = nnx.split(nnx.eval_shape(lambda: config.build(vocab_size)))
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), params)
    make = lambda params: nnx.merge(graphdef, params).init_cache(batch, max_len, codec or Exact())
    return jax.eval_shape(make, params)


class Read(NamedTuple):
    """Bytes that one decoding step reads, each once."""

    weights: int
    """Once a step, however many rows: parameters and a codec's calibrated arrays."""
    cache: int
    """Of every row, the slots that its query sees."""


def bytes_read(
    config: Config, vocab_size: int, batch: int, length: int, dtype: jnp.dtype, codec: Codecs | None = None
) -> Read:
    """What a step must read whose token is the `length`-th of each row: min(length, window + sinks) slots of each.

    Slots count as they are stored, exact tokens besides them in full. Of an untied embedding a step reads
    rows, which are left out. What a program reads more than once, or beyond the slots in use, is not here.
    Parts of bytes are rounded up.
    """
    at_least("batch", batch, 1)
    at_least("length", length, 1)
    step = slot_multiple(codec)
    cache = abstract_cache(config, vocab_size, 1, length + -length % step, dtype, codec)
    names = [dict(layer) for layer in cache.dtypes]
    encoded = nbytes([[memory[name] for name in of] for memory, of in zip(cache.memory, names)])
    exact = nbytes(cache.memory) - encoded
    seen = config.attention.band.num_seen(length - 1)
    weights = _multiplied(config, vocab_size) * dtype.itemsize + nbytes(cache.storages)
    return Read(weights, batch * (-(-encoded * seen // cache.max_len) + exact))


def matmul_peak(dtype: jnp.dtype, size: int = 1024, runs: int = 7) -> float:
    """FLOP/s of a square matrix product on all devices at once, the median of several runs."""
    devices = jax.device_count()
    mesh = sharding.make_mesh(devices)
    product = jax.jit(sharding.over_rows(lambda w, x: jnp.einsum("bij,jk->bik", x, w), mesh, sums=False))
    w = sharding.replicate(jnp.ones((size, size), dtype), mesh)
    x = sharding.replicate(jnp.ones((devices, size, size), dtype), mesh)
    return devices * 2 * size**3 / median_seconds(lambda: product(w, x), runs)


def median_seconds(call: Callable[[], jax.Array], runs: int) -> float:
    """Time of a call until its result is there, the median of several runs after a first one that may compile."""
    call().block_until_ready()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        call().block_until_ready()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
