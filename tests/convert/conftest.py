"""One way to compare decoders: whole, and token by token through the cache."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flax import nnx

from kvjax.codecs import Exact

TOKENS = np.random.default_rng(5).integers(29, size=(2, 13)).astype(np.int32)
POSITIONS = np.tile(np.arange(13, dtype=np.int32), (2, 1))


@pytest.fixture(scope="session")
def both_forms(quick_jit) -> Callable[[Any], tuple[np.ndarray, np.ndarray]]:
    """Function to compute the logits `[2, 13, V]` of a split decoder by its training form, and through its cache."""

    @functools.cache
    def programs(graphdef):
        forward = quick_jit(lambda params: nnx.merge(graphdef, params)(TOKENS, POSITIONS)[0])
        return forward, quick_jit(lambda params, t, p, cache: nnx.merge(graphdef, params)(t, p, cache))

    def compute(split: Any) -> tuple[np.ndarray, np.ndarray]:
        (graphdef, params), parts = split, []
        forward, step = programs(graphdef)
        cache = nnx.merge(graphdef, params).init_cache(2, 16, Exact())
        for t in range(13):
            now = slice(t, t + 1)
            logits, cache = step(params, TOKENS[:, now], POSITIONS[:, now], cache)
            parts.append(np.asarray(logits))
        return np.asarray(forward(params)), np.concatenate(parts, axis=1)

    return compute


@pytest.fixture(scope="session")
def unlike(both_forms) -> Callable[[Any, Any], float]:
    """Function to find the largest difference of two decoders' logits at positions from 1 on, in both forms."""

    def compare(made: Any, source: Any) -> float:
        forms = zip(both_forms(made), both_forms(source))
        return max(float(np.abs(a - b)[:, 1:].max()) for a, b in forms)

    return compare
