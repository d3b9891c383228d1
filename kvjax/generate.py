"""Text from a model: prompts are read in a few compiled lengths, then one jitted loop makes the tokens.

B batch, T prompt tokens, V vocabulary, A tokens made at most, E stop tokens.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from kvjax.cache import Cache
from kvjax.checks import at_least
from kvjax.codecs.base import Codecs, Exact, slot_multiple
from kvjax.decoder import fused
from kvjax.sampling import GREEDY, Sampling, choose
from kvjax.slots import nbytes

Prompts = Sequence[Sequence[int] | np.ndarray] | np.ndarray

PIECE = 16  # prompts are padded to a multiple of this many tokens
LONGEST_PIECE = 256  # and read in parts of PIECE * 2^i up to this many
ROUND_SLOTS = 64
TURNED_BYTES = 2**26  # weights that a CPU's caches may hold; larger ones come at memory's speed in either order


@dataclass(frozen=True)
class Generated:
    """What was made for every row: tokens (the stop token that ended it is one) and their log-probabilities."""

    tokens: list[np.ndarray]
    logprobs: list[np.ndarray] | None
    """Natural logarithm of each token's probability under the model itself, before temperature and filters."""


class Session:
    """Rows that share a cache: `feed` them tokens, `generate` more, in turns."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        batch: int,
        max_len: int,
        codec: Codecs | None = None,
        cache: Cache | None = None,
    ):
        """An empty cache of `max_len` slots, or the one given; ValueError if it was built for other shapes."""
        model = nnx.merge(graphdef, params)
        self.vocab_size, self.batch = model.vocab_size, batch
        if cache is None:
            cache = model.init_cache(batch, max_len, codec or Exact())
        else:
            _check_cache(cache, lambda: model.init_cache(batch, max_len, cache.storages))
        small = nbytes(params) <= TURNED_BYTES
        turn = batch == 1 and small and jax.default_backend() == "cpu"
        self.graphdef, self.params = fused(graphdef, params, turn)
        self.cache = cache
        self._positions_B = jnp.asarray(cache.positions_BS.max(-1) + 1)
        self._logits_BV: jax.Array | None = None
        self._made = 0

    @property
    def state(self) -> tuple[Cache, jax.Array | None, jax.Array]:
        """The cache, the next token's logits and the rows' next positions; may be set to an earlier state."""
        return self.cache, self._logits_BV, self._positions_B

    @state.setter
    def state(self, state: tuple[Cache, jax.Array | None, jax.Array]) -> None:
        self.cache, self._logits_BV, self._positions_B = state

    def feed(self, prompts: Prompts, then: int = 0) -> None:
        """Read one prompt a row, of any lengths; ValueError if they, and `then` more tokens, do not fit."""
        rows = [_row(prompt, i, self.vocab_size) for i, prompt in enumerate(prompts)]
        if len(rows) != self.batch:
            raise ValueError(f"prompts={len(rows)} must be as many as the rows of the cache, {self.batch}")
        slots = padded(max(len(row) for row in rows))
        if self.cache.ring is None:
            used, longest = int(self.cache.length), max(len(row) for row in rows)
            if used + slots + then > self.cache.max_len:
                raise ValueError(
                    f"a prompt of {longest} tokens (in {slots} slots) and num_tokens={then} do not fit "
                    f"max_len={self.cache.max_len} slots with {used} in use; at most "
                    f"{max(0, self.cache.max_len - used - slots)} tokens can follow it"
                )
        tokens_BT = np.zeros((self.batch, slots), np.int32)
        offsets_BT = np.full((self.batch, slots), -1, np.int32)
        for b, row in enumerate(rows):
            tokens_BT[b, slots - len(row) :] = row
            offsets_BT[b, slots - len(row) :] = np.arange(len(row))
        positions_BT = np.where(offsets_BT < 0, -1, np.asarray(self._positions_B)[:, None] + offsets_BT)
        for start, stop in pieces(slots):
            part = tokens_BT[:, start:stop], positions_BT[:, start:stop]
            self.cache, self._logits_BV = _prefill(self.graphdef, self.params, self.cache, *part)
        self._positions_B = jnp.asarray(positions_BT[:, -1] + 1)

    def generate(
        self,
        num_tokens: int,
        sampling: Sampling = GREEDY,
        seeds: int | Sequence[int] = 0,
        stop: Sequence[int] = (),
        logprobs: bool = False,
    ) -> Generated:
        """At most `num_tokens` more tokens a row, until it makes one of `stop`.

        `seeds` are one a row, or the first of consecutive ones. A row's tokens depend on its own
        prompt and seed alone.
        """
        (made,) = self.stream(num_tokens, sampling, seeds, stop, logprobs, every=num_tokens)
        return made

    def stream(
        self,
        num_tokens: int,
        sampling: Sampling = GREEDY,
        seeds: int | Sequence[int] = 0,
        stop: Sequence[int] = (),
        logprobs: bool = False,
        every: int = 16,
    ) -> Iterator[Generated]:
        """As `generate`, in parts of `every` tokens."""
        at_least("num_tokens", num_tokens, 1)
        sampling.check(self.vocab_size)
        if self._logits_BV is None:
            raise ValueError("nothing was fed: a prompt of at least 1 token comes before num_tokens more")
        self.cache.room_for(num_tokens)
        first = range(seeds, seeds + self.batch) if isinstance(seeds, int) else seeds
        if len(first) != self.batch:
            raise ValueError(f"seeds={len(first)} must be as many as the rows, {self.batch}")
        keys_B = jnp.stack([jax.random.key(seed) for seed in first])
        stop_E = np.full(padded(len(stop) or 1), -1, np.int32)
        stop_E[: len(stop)] = stop
        done_B, numbers = jnp.zeros(self.batch, bool), sampling.numbers(self.vocab_size)
        while num_tokens and not bool(done_B.all()):
            now = min(num_tokens, every)
            room = max(PIECE, 1 << (now - 1).bit_length())
            state = self.cache, self._logits_BV, self._positions_B, done_B
            static = (self.graphdef, room, sampling.form, logprobs)
            state, made, out = _decode(*static, self.params, state, keys_B, self._made, now, numbers, stop_E)
            self.cache, self._logits_BV, self._positions_B, done_B = state
            self._made, num_tokens = self._made + int(made), num_tokens - now
            yield _trim(out, int(made))


def generate(
    graphdef: nnx.GraphDef,
    params: Any,
    prompts: Prompts,
    num_tokens: int,
    sampling: Sampling = GREEDY,
    seeds: int | Sequence[int] = 0,
    stop: Sequence[int] = (),
    logprobs: bool = False,
    codec: Codecs | None = None,
    max_len: int | None = None,
) -> Generated:
    """At most `num_tokens` tokens after each prompt, of any lengths, through a cache of `max_len` slots.

    ValueError for an empty prompt, a token out of the vocabulary, or what does not fit; before any work.
    """
    at_least("num_tokens", num_tokens, 1)
    at_least("prompts", len(prompts), 1)
    if max_len is None:
        step = math.lcm(ROUND_SLOTS, slot_multiple(codec))
        longest = max(len(prompt) for prompt in prompts)
        max_len = -(-(padded(longest) + num_tokens) // step) * step
    session = Session(graphdef, params, len(prompts), max_len, codec)
    sampling.check(session.vocab_size)
    session.feed(prompts, then=num_tokens)
    return session.generate(num_tokens, sampling, seeds, stop, logprobs)


def without_cache(
    graphdef: nnx.GraphDef,
    params: Any,
    prompt: Sequence[int] | np.ndarray,
    num_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Sequence[int] = (),
) -> Iterator[int]:
    """The tokens that `generate` makes after one prompt, each from the whole text before it: for comparison."""
    model = nnx.merge(graphdef, params)
    tokens = _row(prompt, 0, model.vocab_size).tolist()
    at_least("num_tokens", num_tokens, 1)
    sampling.check(model.vocab_size)
    numbers, key = sampling.numbers(model.vocab_size), jax.random.key(seed)
    for i in range(num_tokens):
        tokens_1T = np.zeros((1, -(-len(tokens) // ROUND_SLOTS) * ROUND_SLOTS), np.int32)
        tokens_1T[0, : len(tokens)] = tokens
        token = int(whole(graphdef, sampling.form, params, tokens_1T, len(tokens) - 1, key, i, numbers))
        tokens.append(token)
        yield token
        if token in stop:
            return


@functools.partial(jax.jit, static_argnums=(0, 1))
def whole(graphdef, form, params, tokens_1T, last, key, i, numbers):
    """The token after `last`, the i-th made, from all tokens up to it."""
    model = nnx.merge(graphdef, params)
    x_1TD, _ = model.hidden(tokens_1T)
    logits_1V = model.logits(lax.dynamic_slice_in_dim(x_1TD, last, 1, axis=1))[:, 0]
    return choose(logits_1V, jax.random.fold_in(key, i)[None], form, numbers)[0]


def padded(num_tokens: int) -> int:
    """Slots that a prompt takes."""
    return -(-num_tokens // PIECE) * PIECE


def pieces(slots: int) -> list[tuple[int, int]]:
    """Parts of a padded prompt: few lengths, so that few programs read every prompt."""
    parts, start = [], 0
    while start < slots:
        size = min(LONGEST_PIECE, PIECE << ((slots - start) // PIECE).bit_length() - 1)
        parts.append((start, start + size))
        start += size
    return parts


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(graphdef, params, cache, tokens_BT, positions_BT):
    model = nnx.merge(graphdef, params)
    x_BTD, cache = model.hidden(tokens_BT, positions_BT, cache)
    return cache, model.logits(x_BTD[:, -1:])[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def _decode(graphdef, room, form, logprobs, params, state, keys_B, first, limit, numbers, stop_E):
    """State after at most `limit` tokens, how many were made, and the tokens `BA` (-1: the row had ended)."""
    model = nnx.merge(graphdef, params)
    B = keys_B.shape[0]
    out = {"tokens": jnp.full((B, room), -1, jnp.int32)}
    if logprobs:
        out["logprobs"] = jnp.zeros((B, room), jnp.float32)

    def body(carry):
        i, (cache, logits_BV, positions_B, done_B), out = carry
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, first + i)
        token_B = choose(logits_BV, keys, form, numbers)
        put = lambda name, new_B: lax.dynamic_update_slice_in_dim(out[name], new_B[:, None], i, axis=1)
        new = {"tokens": put("tokens", jnp.where(done_B, -1, token_B))}
        if logprobs:
            logp_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32), axis=-1)
            new["logprobs"] = put("logprobs", jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0])
        # A row that has ended goes on as padding, which no query sees.
        at_B = jnp.where(done_B, -1, positions_B)
        x_BTD, cache = model.hidden(token_B[:, None], at_B[:, None], cache)
        positions_B = jnp.where(done_B, positions_B, positions_B + 1)
        done_B |= (token_B[:, None] == stop_E[None]).any(-1)
        return i + 1, (cache, model.logits(x_BTD)[:, 0], positions_B, done_B), new

    going = lambda carry: (carry[0] < limit) & ~carry[1][3].all()
    made, state, out = lax.while_loop(going, body, (jnp.int32(0), state, out))
    return state, made, out


def _trim(out, made):
    tokens_BA = np.asarray(out["tokens"])[:, :made]
    counts = (tokens_BA >= 0).sum(-1)
    rows = lambda a: [row[:count] for row, count in zip(np.asarray(a)[:, :made], counts)]
    return Generated(rows(tokens_BA), rows(out["logprobs"]) if "logprobs" in out else None)


def _row(prompt, index, vocab_size):
    row = np.asarray(prompt)
    if row.ndim != 1 or row.size == 0:
        raise ValueError(f"prompt {index} must have at least 1 token")
    if not np.issubdtype(row.dtype, np.integer):
        raise ValueError(f"prompt {index} must hold integers, not {row.dtype}")
    wrong = row[(row < 0) | (row >= vocab_size)]
    if wrong.size:
        raise ValueError(
            f"token {wrong[0]} of prompt {index} must be at least 0 and below the vocabulary size {vocab_size}"
        )
    return row


def _check_cache(cache, make):
    try:
        expected = jax.eval_shape(make)
    except ValueError as error:
        raise ValueError(f"cache was built for another model: {error}") from error
    shapes = lambda c: [(jax.tree_util.keystr(path), a.shape, a.dtype) for path, a in jax.tree.leaves_with_path(c)]
    ours, right = shapes(cache), shapes(expected)
    if cache.ring != expected.ring or len(ours) != len(right):
        raise ValueError("cache was built for another model: its layers hold other arrays")
    for (name, shape, dtype), (_, right_shape, right_dtype) in zip(ours, right):
        if (shape, dtype) != (right_shape, right_dtype):
            raise ValueError(
                f"cache was built for another model or batch: {name} is {dtype.name}{list(shape)}, "
                f"not {right_dtype.name}{list(right_shape)}"
            )
