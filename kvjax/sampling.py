"""The next token from logits: greedy, or drawn at a temperature from the tokens that filters leave.

B batch, V vocabulary.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kvjax.checks import at_least

NO_LOGIT = -1e30


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Filters apply after the temperature, in this order: top-k, top-p, min-p."""

    temperature: float = 0.0
    """What logits are divided by; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens (and those tied with the last of them)."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens that hold this probability (nucleus; Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Keep tokens of at least this share of the likeliest one's probability (Nguyen et al. 2025)."""

    def __post_init__(self):
        at_least("temperature", self.temperature, 0.0)
        if self.top_k is not None:
            at_least("top_k", self.top_k, 1)
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1; 1 keeps every token")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p={self.min_p} must be at least 0 and at most 1; 0 keeps every token")

    def check(self, vocab_size: int) -> None:
        """ValueError where the rules do not fit this vocabulary."""
        if self.top_k is not None and self.top_k > vocab_size:
            raise ValueError(f"top_k={self.top_k} must be at most the vocabulary size {vocab_size}")

    @property
    def form(self) -> tuple[bool, bool]:
        """What is compiled: whether tokens are drawn, and whether that takes a sorted vocabulary."""
        return self.temperature > 0, self.top_k is not None or self.top_p < 1.0

    def numbers(self, vocab_size: int) -> dict[str, jax.Array]:
        """What is passed to the compiled program."""
        top_k = vocab_size if self.top_k is None else self.top_k
        return {
            "temperature": jnp.float32(self.temperature),
            "top_k": jnp.int32(top_k),
            "top_p": jnp.float32(self.top_p),
            "log_min_p": jnp.float32(math.log(self.min_p) if self.min_p > 0 else NO_LOGIT),
        }


GREEDY = Sampling()


def choose(
    logits_BV: jax.Array, keys_B: jax.Array, form: tuple[bool, bool], numbers: dict[str, jax.Array]
) -> jax.Array:
    """Tokens `B`, int32; a row's choice depends on that row and its key alone."""
    if not form[0]:
        return logits_BV.argmax(-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, filtered(logits_BV, form, numbers)).astype(jnp.int32)


def filtered(logits_BV: jax.Array, form: tuple[bool, bool], numbers: dict[str, jax.Array]) -> jax.Array:
    """Logits after the temperature, those of tokens that no filter keeps at -1e30."""
    logits_BV = logits_BV.astype(jnp.float32) / numbers["temperature"]
    least_B1 = logits_BV.max(-1, keepdims=True) + numbers["log_min_p"]
    if form[1]:
        least_B1 = jnp.maximum(least_B1, _least(logits_BV, numbers["top_k"], numbers["top_p"]))
    return jnp.where(logits_BV >= least_B1, logits_BV, NO_LOGIT)


def _least(logits_BV, top_k, top_p):
    """The smallest logit that top-k, and then top-p among what it leaves, keep."""
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    rank_V = jnp.arange(logits_BV.shape[-1])[None]
    probs_BV = jax.nn.softmax(jnp.where(rank_V < top_k, sorted_BV, NO_LOGIT), axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    kept_BV = (rank_V < top_k) & ((before_BV < top_p) | (rank_V == 0))
    return jnp.where(kept_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
