"""Codecs as they run: jitted.

T tokens, F features.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="session")
def roundtrip(quick_jit) -> Any:
    """Function `(codec, x_TF) -> stored, decoded` in float32, to NumPy."""

    def encode_and_decode(codec, x):
        stored = codec.encode(x)
        # Apart, as in a cache: decoding must not see what was not stored.
        return stored, codec.decode(jax.lax.optimization_barrier(stored), jnp.float32)

    jitted = quick_jit(encode_and_decode)
    return lambda codec, x: jax.tree.map(np.asarray, jitted(codec, x))
