"""Reading what is remembered: softmax over slots, whole or chunk by chunk, from one source or several.

B batch, T query tokens, N query heads, S memory slots, C slots of a part, M any features of a reading.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from kvjax.attention.heads import MASKED


class Map(Protocol):
    """An affine map that a codec begins with, undone outside of the walk over slots."""

    def enter(self, q_BNTF: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries `BNTR` for its image, and their scores `BNT1` against its mean."""
        ...

    def leave(self, mixed_BNTR: jax.Array, total_BNT1: jax.Array) -> jax.Array:
        """A weighted sum `BNTF`, from that of the image and the sum of the weights."""
        ...


class Part(NamedTuple):
    """What one step of a reading sees."""

    memory: dict[str, jax.Array]
    positions_BS: jax.Array
    """Position of the token in each slot, -1 where the slot is empty."""
    hidden_BTS: jax.Array | None = None
    """Slots that these queries read elsewhere; axes of size 1 are shared."""


class Source(NamedTuple):
    """Slots to read."""

    num_slots: int
    length: jax.Array | int
    """Slots in use, from the first."""
    read: Callable[[jax.Array | int, int], Sequence[Part]]
    """So many slots from a first one on, in parts of equal size."""
    num_parts: int = 1
    maps: Mapping[str, Map] = {}
    """Of the arrays that are given as their map left them, that map."""


Form = Callable[[Mapping[str, Map]], tuple[Callable, Callable]]
"""From a source's maps: part -> masked logits `BNTS` and their `mix`; and what undoes the maps of a sum."""


def read(sources: Sequence[Source], form: Form, chunk: int | None) -> jax.Array:
    """The softmax-weighted sum `BNTM` over the slots of all sources; `chunk` slots at a time, or all of them."""
    if len(sources) == 1 and sources[0].num_parts == 1 and (chunk is None or chunk >= sources[0].num_slots):
        logits_and_mix, leave = form(sources[0].maps)
        (part,) = sources[0].read(0, sources[0].num_slots)
        logits_BNTS, mix = logits_and_mix(part)
        mixed_BNTM = mix(_cast(jax.nn.softmax(logits_BNTS, axis=-1), part.memory))
        return leave(mixed_BNTM, jnp.ones((*mixed_BNTM.shape[:3], 1)))
    tops, totals, mixes = zip(*(_walk(source, form(source.maps), chunk) for source in sources))
    top_BNT1 = functools.reduce(jnp.maximum, tops)
    shrink = [jnp.exp(top - top_BNT1) for top in tops]
    add = lambda terms: functools.reduce(jnp.add, [term * s for term, s in zip(terms, shrink)])
    return add(mixes) / add(totals)


def _walk(source, form, chunk):
    """Online softmax (Milakov & Gimelshein 2018) over chunks: the time follows the slots in use.

    Gives the largest logit, the sum of the weights and the weighted sum.
    """
    logits_and_mix, leave = form
    S = source.num_slots
    C = S if chunk is None else min(chunk, S)

    def join(carry, part, unread_C):
        top_BNT1, total_BNT1, mixed_BNTM = carry
        logits_BNTC, mix = logits_and_mix(part)
        if unread_C is not None:
            logits_BNTC = jnp.where(unread_C[None, None, None], logits_BNTC, MASKED)
        new_top_BNT1 = jnp.maximum(top_BNT1, logits_BNTC.max(-1, keepdims=True))
        weights_BNTC = jnp.exp(logits_BNTC - new_top_BNT1)
        shrink_BNT1 = jnp.exp(top_BNT1 - new_top_BNT1)
        total_BNT1 = total_BNT1 * shrink_BNT1 + weights_BNTC.sum(-1, keepdims=True)
        part_BNTM = mix(_cast(weights_BNTC, part.memory)).astype(jnp.float32)
        return new_top_BNT1, total_BNT1, mixed_BNTM * shrink_BNT1 + part_BNTM

    def step(i, carry):
        start = jnp.minimum(i * C, S - C)  # the last chunk begins earlier where C does not divide S
        size = C // source.num_parts
        for p, part in enumerate(source.read(start, C)):
            unread_C = None if S % C == 0 else start + p * size + jnp.arange(size) >= i * C
            carry = join(carry, part, unread_C)
        return carry

    def first() -> Any:
        part = source.read(0, C)[0]
        logits_BNTC, mix = logits_and_mix(part)
        return logits_BNTC.max(-1, keepdims=True), mix(_cast(logits_BNTC, part.memory))

    top, mixed = jax.eval_shape(first)
    start = (jnp.full(top.shape, MASKED), jnp.zeros(top.shape), jnp.zeros(mixed.shape, jnp.float32))
    top_BNT1, total_BNT1, mixed_BNTM = lax.fori_loop(0, (source.length + C - 1) // C, step, start)
    return top_BNT1, total_BNT1, leave(mixed_BNTM, total_BNT1)


def _cast(probs, memory):
    return probs.astype(jax.tree.leaves(memory)[0].dtype)
