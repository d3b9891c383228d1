"""Timing of decoding: one token a row and step, from a cache that holds a given number of tokens.

B batch, T tokens, V vocabulary.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax import generate
from kvjax.accounting import median_seconds
from kvjax.cache import Cache
from kvjax.codecs.base import Codecs, slot_multiple
from kvjax.config import Config
from kvjax.decoder import Decoder, decodable
from kvjax.dry_run import vocabulary
from kvjax.generate import PIECE, ROUND_SLOTS, Session, padded, whole
from kvjax.sampling import GREEDY
from kvjax.slots import nbytes
from kvjax.train import cast, compute_dtype

Model = tuple[nnx.GraphDef[Decoder], Any]
"""Structure and parameters."""

BANDWIDTH_BYTES = 2**28


@dataclass(frozen=True)
class Case:
    """What is timed: a model, a batch, and how many tokens its cache holds when the timing starts."""

    config: Config
    batch: int
    filled: int
    tokens: int = 32
    """Tokens a row and round."""

    def slots(self, codec: Codecs | None) -> int:
        """Of a cache for all this, in whole units of what the codec packs together."""
        slots = padded(self.filled) + self.tokens
        return slots + -slots % slot_unit(codec)


class DecodeWorkload:
    """Greedy generation by random weights from a filled cache; every round starts from the same one."""

    def __init__(
        self, case: Case, codec: Codecs | None = None, expanded: bool = False, model: Model | None = None
    ):
        """`expanded` reads the cache in expanded form, where decoding would take the absorbed one.

        `model` is `random_model` of the case, or one made of it, where several workloads share it.
        """
        self.case, config = case, case.config
        graphdef, params = random_model(config) if model is None else model
        if expanded:
            decoder = nnx.merge(graphdef, params)
            for block in decoder.layers:
                block.attention.expand_from = 1
            graphdef, params = nnx.split(decoder)
        self._session = Session(graphdef, params, case.batch, case.slots(codec), codec)
        started = time.perf_counter()
        self._session.feed(random_prompts(case, vocabulary(config.data)))
        self._state = jax.block_until_ready(self._session.state)
        self.first_prefill_seconds = time.perf_counter() - started
        """With compilation."""
        started = time.perf_counter()
        self.seconds()
        self.first_round_seconds = time.perf_counter() - started
        """With compilation."""
        # A tied embedding is read whole for the logits; of an untied one a step reads a row.
        untied = 0 if config.decoder.tie_embeddings else nbytes(params["embedding_VD"])
        self.weight_bytes = nbytes(params) - untied
        self.cache_bytes = nbytes(self._session.cache.memory)
        self.bytes_per_token = self._session.cache.bytes_per_token()

    def seconds(self) -> float:
        """Time of one token for every row, the mean over a round."""
        self._session.state = jax.block_until_ready(jax.tree.map(jnp.copy, self._state))
        started = time.perf_counter()
        self._session.generate(self.case.tokens)
        jax.block_until_ready(self._session.state)
        return (time.perf_counter() - started) / self.case.tokens

    def temporary_bytes(self) -> int:
        """What the compiled loop of a round holds besides its arguments."""
        session = self._session
        program = loop_program(session.graphdef, session.params, session.cache, self.case.tokens)
        memory = program.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    def bytes_of(self, batch: int, slots: int) -> int:
        """All weights and a cache, stored so, of so many rows and slots."""
        session = self._session
        model, codec = nnx.merge(session.graphdef, session.params), session.cache.storages
        return nbytes(session.params) + nbytes(jax.eval_shape(lambda: model.init_cache(batch, slots, codec)))

    def prefill_seconds(self) -> float:
        """Time of reading the prompts into an empty cache."""
        session = self._session
        fresh = Session(
            session.graphdef, session.params, self.case.batch, session.cache.max_len, session.cache.storages
        )
        prompts = random_prompts(self.case, session.vocab_size)
        started = time.perf_counter()
        fresh.feed(prompts)
        jax.block_until_ready(fresh.state)
        return time.perf_counter() - started

    def whole_seconds(self) -> float:
        """Time of one token of the first row from the whole text before it, without a cache."""
        session = self._session
        tokens_1T = random_prompts(self.case, session.vocab_size)[:1]
        numbers, key = GREEDY.numbers(session.vocab_size), jax.random.key(0)
        started = time.perf_counter()
        arguments = session.params, tokens_1T, self.case.filled - 1, key, 0, numbers
        whole(session.graphdef, GREEDY.form, *arguments).block_until_ready()
        return time.perf_counter() - started


def random_model(config: Config) -> Model:
    """Random weights in the compute dtype, in a form that can decode."""
    graphdef, params = decodable(*nnx.split(config.build(vocabulary(config.data))))
    return graphdef, cast(params, compute_dtype(config.train.dtype))


def slot_unit(codec: Codecs | None) -> int:
    """What generation rounds a cache's slots up to a multiple of."""
    return math.lcm(ROUND_SLOTS, slot_multiple(codec))


def loop_program(
    graphdef: nnx.GraphDef,
    params: Any,
    cache: Cache,
    tokens: int = PIECE,
    place: Callable[[Any], Any] = lambda arguments: arguments,
) -> jax.stages.Compiled:
    """What `Session.generate` runs, greedy, compiled for these arrays or their shapes.

    The model is one that `fused` gives; `place` may put the arguments on a device that is not here.
    """
    B, V = cache.positions_BS.shape[0], nnx.merge(graphdef, params).vocab_size
    shape = jax.ShapeDtypeStruct
    state = cache, shape((B, V), jnp.float32), shape((B,), jnp.int32), shape((B,), bool)
    keys_B = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
    numbers, stop_E = GREEDY.numbers(V), shape((PIECE,), jnp.int32)
    arguments = params, state, keys_B, 0, tokens, numbers, stop_E
    room = max(PIECE, 1 << (tokens - 1).bit_length())
    return generate._decode.lower(graphdef, room, GREEDY.form, False, *place(arguments)).compile()


def random_prompts(case: Case, vocab_size: int) -> np.ndarray:
    """Uniform random ids `BT`, int32."""
    return np.random.default_rng(0).integers(0, vocab_size, (case.batch, case.filled), dtype=np.int32)


def read_bandwidth(runs: int = 5) -> float:
    """Bytes a second at which the device reads 256 MiB: the better of a sum and a matrix-vector product."""
    a = jnp.ones((2**13, BANDWIDTH_BYTES // 4 // 2**13))
    v = jnp.ones(a.shape[0])
    forms = (jax.jit(lambda a, v: a.sum()), jax.jit(lambda a, v: v @ a))
    return a.nbytes / min(median_seconds(lambda f=f: f(a, v), runs) for f in forms)
