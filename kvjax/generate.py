"""Text from a model: prefill, then every token in one jitted loop that reads and writes the cache.

B batch, T prompt tokens, V vocabulary.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from kvjax.checks import at_least
from kvjax.codecs.base import Codec, Exact


def generate(
    graphdef: nnx.GraphDef,
    params: Any,
    prompt_BT: np.ndarray,
    num_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    codec: Codec | None = None,
) -> np.ndarray:
    """`num_tokens` tokens after each prompt: greedy at temperature 0, else sampled.

    ValueError for an empty prompt, a token out of the vocabulary, or a temperature that is negative
    or not finite.
    """
    vocab_size = nnx.merge(graphdef, params).vocab_size
    at_least("num_tokens", num_tokens, 1)
    at_least("prompt tokens", prompt_BT.shape[-1], 1)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature} must be finite and at least 0")
    if prompt_BT.min() < 0 or prompt_BT.max() >= vocab_size:
        bad = prompt_BT[(prompt_BT < 0) | (prompt_BT >= vocab_size)][0]
        raise ValueError(f"prompt token {bad} must be at least 0 and below the vocabulary size {vocab_size}")
    key = jax.random.key(seed)
    prompt = jnp.asarray(prompt_BT, jnp.int32)
    tokens = _generate(graphdef, params, prompt, num_tokens, temperature, key, codec or Exact())
    return np.asarray(tokens)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _generate(graphdef, params, prompt_BT, num_tokens, temperature, key, codec):
    model = nnx.merge(graphdef, params)
    B, T = prompt_BT.shape

    def pick(logits_BV, i):
        scaled_BV = logits_BV / jnp.maximum(temperature, 1e-6)
        sampled_B = jax.random.categorical(jax.random.fold_in(key, i), scaled_BV)
        return jnp.where(temperature > 0, sampled_B, logits_BV.argmax(-1)).astype(jnp.int32)

    logits_BTV, cache = model(prompt_BT, cache=model.init_cache(B, T + num_tokens - 1, codec))
    out_BT = jnp.zeros((B, num_tokens), jnp.int32).at[:, 0].set(pick(logits_BTV[:, -1], 0))

    def step(i, carry):
        out_BT, cache = carry
        token_B1 = lax.dynamic_slice_in_dim(out_BT, i - 1, 1, axis=1)
        logits_B1V, cache = model(token_B1, cache=cache)
        token_B1 = pick(logits_B1V[:, 0], i)[:, None]
        return lax.dynamic_update_slice_in_dim(out_BT, token_B1, i, axis=1), cache

    return lax.fori_loop(1, num_tokens, step, (out_BT, cache))[0]
