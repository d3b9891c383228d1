"""Time of one decoding step through layers whose caches are stored in some way, a layer at a time.

B batch, T tokens, D width.
"""

import collections
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax import cache as caches
from kvjax.codecs.base import Entry, Storage, slot_multiple

Layers = Sequence[tuple[nnx.GraphDef, Any]]
RUNS = 7


def step_seconds(layers: Layers, entries: Sequence[Entry], storages: Sequence[Storage], slots: int) -> float:
    """Seconds of all layers for one token of every row that attends to `slots` tokens: medians, compiled before.

    Layers alike in structure are timed once. Embedding and logits are not in it: no codec touches them.
    """
    shape = lambda a, slots: jax.ShapeDtypeStruct((*a.shape[:-2], slots, a.shape[-1]), a.dtype)
    total, kinds = 0.0, collections.Counter(map(_kind, layers, storages))
    for layer, entry, storage in zip(layers, entries, storages, strict=True):
        count = kinds.pop(_kind(layer, storage), 0)
        if count:
            room = slots + -slots % slot_multiple(storage)
            first = jax.tree.leaves(entry)[0]
            cache = caches.empty((jax.tree.map(lambda a, room=room: shape(a, room), entry),), (storage,))
            positions_BS = jnp.broadcast_to(jnp.arange(room, dtype=jnp.int32)[None], cache.positions_BS.shape)
            step = _Step(layer, dataclasses.replace(cache, positions_BS=positions_BS), slots, first.shape[0])
            total += count * median_of(step)
    return total


def encode_seconds(entries: Sequence[Entry], storages: Sequence[Storage]) -> float:
    """Seconds to encode one token of every row in all layers; layers alike are timed once."""
    total, kinds = 0.0, collections.Counter(map(_form, storages))
    for entry, storage in zip(entries, storages, strict=True):
        count = kinds.pop(_form(storage), 0)
        if count:
            x = {name: jnp.ones((*a.shape[:-2], storage.group, a.shape[-1]), a.dtype) for name, a in entry.items()}
            call = functools.partial(_encode, storage.by_name(sorted(entry)), x)
            total += count * median_of(call) / storage.group
    return total


def median_of(call: Callable[[], Any], runs: int = RUNS) -> float:
    """Seconds of a call until its result is there, the median of several after one that may compile."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


class _Step:
    """A step that always writes the same slot of a full cache, in place."""

    def __init__(self, layer, cache, slots, batch):
        self._layer, self._cache, self._last = layer, cache, jnp.int32(slots - 1)
        width = nnx.merge(*layer).attention_norm.gain_H[...].shape[0]
        self._x_B1D = jnp.ones((batch, 1, width), cache.dtypes[0][0][1])

    def __call__(self):
        y_B1D, self._cache = _step(self._layer[0], self._layer[1], self._cache, self._x_B1D, self._last)
        return y_B1D


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(graphdef, params, cache, x_B1D, last):
    positions_B1 = jnp.broadcast_to(last, (x_B1D.shape[0], 1))
    claim = dataclasses.replace(cache, length=last).claim(positions_B1)
    y_B1D, layer = nnx.merge(graphdef, params)(x_B1D, positions_B1, claim.layer(0))
    return y_B1D, claim.written([layer])


@jax.jit
def _encode(storage, entry):
    return {name: storage.named[name].encode(x) for name, x in entry.items()}


def _form(storage):
    leaves, structure = jax.tree.flatten(storage)
    return structure, tuple((jnp.shape(a), jnp.result_type(a)) for a in leaves)


def _kind(layer, storage):
    return layer[0], _form(storage)
