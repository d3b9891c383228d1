"""Parameters, FLOPs and bytes: closed formulas, and what this machine and its compiler say."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax import sharding
from kvjax.cache import Cache
from kvjax.codecs.base import Codecs, Exact
from kvjax.config import Config


def abstract_params(config: Config, vocab_size: int) -> Any:
    """Shapes and dtypes of the parameters, without computing them."""
    return nnx.split(nnx.eval_shape(lambda: config.build(vocab_size)))[1]


def num_parameters(params: Any) -> int:
    """Elements of a pytree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops_per_token(config: Config, vocab_size: int, context: int, training: bool) -> float:
    """Matrix-product FLOPs of one token in a sequence of `context`: forward, or forward and backward.

    Two per multiply-add; a token attends to (context + 1) / 2 slots on average, or to those of its
    window and sinks; the embedding's look-up counts nothing, its use as the output matrix does.
    Backward is twice forward (Kaplan et al. 2020, section 2.1), recomputation is not counted.
    """
    weights = num_parameters(abstract_params(config, vocab_size))
    if not config.decoder.tie_embeddings:
        weights -= vocab_size * config.decoder.width
    slots = sum(config.attention.band.num_seen(t) for t in range(context)) / context
    forward = 2 * weights + config.decoder.depth * config.attention.flops_per_slot() * slots
    return forward * (3 if training else 1)


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
