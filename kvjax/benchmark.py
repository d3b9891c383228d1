"""Timing of training: the real step on random tokens, and what attention costs at growing contexts.

B batch, T tokens, D width, K kv heads, G query heads a kv head, H key dim, V value dim.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax import accounting, sharding
from kvjax.attention.heads import causal_attention
from kvjax.checks import at_least, multiple
from kvjax.config import Config
from kvjax.dry_run import compile_step, vocabulary
from kvjax.train import compute_dtype, init_state

DISTINCT_BATCHES = 4


@dataclass(frozen=True)
class Spread:
    """Median and range over rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of one value a round."""
        return cls(statistics.median(values), min(values), max(values))


def alternate(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What every side returns in every round, one side after the other.

    Only one computes at a time, and what else the machine does meets all of them alike.
    """
    values: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            values[name].append(side())
    return values


def peak_resident_bytes() -> int:
    """The most memory that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def random_batches(config: Config, vocab_size: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """A few batches `tokens_BT, targets_BT` of uniform random ids, int32."""
    rng = np.random.default_rng(seed)
    shape = (config.train.batch_size, config.data.context)
    draw = lambda: rng.integers(0, vocab_size, shape, dtype=np.int32)
    return [{"tokens_BT": draw(), "targets_BT": draw()} for _ in range(DISTINCT_BATCHES)]


class TrainingWorkload:
    """The training step as a run makes it: donated state, batches sent from NumPy within the timing."""

    def __init__(self, config: Config):
        self.vocab_size = vocabulary(config.data)
        parts = config.train.accumulate
        self.mesh = sharding.make_mesh(config.train.batch_size // parts, "train.batch_size / accumulate")
        self._step, self.cost = compile_step(config, self.vocab_size, self.mesh)
        self.batches = random_batches(config, self.vocab_size)
        self.tokens_per_step = config.train.batch_size * config.data.context
        self.flops_per_token = accounting.flops_per_token(config, self.vocab_size, config.data.context, True)
        self._state = sharding.replicate(init_state(config, self.vocab_size), self.mesh)

    def seconds(self, steps: int) -> float:
        """Time of `steps` steps, from the first batch's transfer until the last state is there."""
        started, previous = time.perf_counter(), None
        for i in range(steps):
            batch = sharding.split(self.batches[i % DISTINCT_BATCHES], self.mesh)
            self._state, metrics = self._step(self._state, batch)
            if previous is not None:
                previous.block_until_ready()  # two steps in flight at most, as in a run
            previous = metrics["loss"]
        jax.block_until_ready(self._state)
        return time.perf_counter() - started


@dataclass(frozen=True)
class ContextCost:
    """Seconds per token of the whole step, and of its causal attention alone, at one context."""

    context: int
    batch_size: int
    step: Spread
    attention: Spread


def context_costs(config: Config, contexts: Sequence[int], rounds: int, steps: int) -> Iterator[ContextCost]:
    """Costs at every context, one after the other, with the tokens of a step fixed at those of `config`.

    ValueError where the tokens are no multiple of a context.
    """
    tokens = config.train.batch_size * config.data.context
    for batch_size, context in zip(batch_sizes(config, contexts), contexts):
        resized = replace(
            config,
            data=replace(config.data, context=context),
            train=replace(config.train, batch_size=batch_size, accumulate=1),
        )
        workload, attention = TrainingWorkload(resized), attention_timer(resized)
        sides = {
            "step": lambda workload=workload: workload.seconds(steps) / steps / tokens,
            "attention": lambda attention=attention: attention() / tokens,
        }
        alternate(sides, 1)
        spreads = {name: Spread.of(values) for name, values in alternate(sides, rounds).items()}
        yield ContextCost(context, batch_size, **spreads)


def batch_sizes(config: Config, contexts: Sequence[int]) -> list[int]:
    """Sequences a step at every context; ValueError where the tokens of a step are no multiple of one."""
    tokens = config.train.batch_size * config.data.context
    for context in contexts:
        at_least("--context-sweep", context, 1)
        multiple("train.batch_size * data.context", tokens, "--context-sweep", context)
    return [tokens // context for context in contexts]


def attention_timer(config: Config) -> Callable[[], float]:
    """Function to measure the seconds of all layers' causal attention, forward and backward, of one step.

    Heads of the variant's shapes in the compute dtype; projections are not part of it.
    """
    mesh = sharding.make_mesh(config.train.batch_size, "batch of the context sweep")
    dtype = compute_dtype(config.train.dtype)
    scale, shapes = _heads(config)
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}
    heads = sharding.split(arrays, mesh)

    def gradients(_, heads):
        attend = lambda q, k, v: causal_attention(q, k, v, scale)
        return jax.vjp(attend, heads["q"], heads["k"], heads["v"])[1](heads["do"])

    layer = jax.jit(sharding.over_rows(gradients, mesh, sums=False)).lower(None, heads).compile()

    def seconds() -> float:
        started = time.perf_counter()
        for _ in range(config.decoder.depth):
            jax.block_until_ready(layer(None, heads))
        return time.perf_counter() - started

    return seconds


def _heads(config: Config) -> tuple[float, dict[str, tuple[int, ...]]]:
    """Scale, and shapes of `q_BKGTH, k_BKTH, v_BKTV` and of the result's gradient, of one layer."""
    B, T, D = config.train.batch_size, config.data.context, config.decoder.width
    attention = nnx.eval_shape(lambda: config.attention.build(D, 1.0, jax.random.key(0)))
    graphdef, params = nnx.split(attention)

    def expand(params, x_BTD, positions_BT):
        attention = nnx.merge(graphdef, params)
        queries, entry = attention.project(x_BTD, positions_BT)
        return attention.expand(queries, entry, positions_BT)

    x_BTD, positions_BT = (
        jax.ShapeDtypeStruct((B, T, D), jnp.float32),
        jax.ShapeDtypeStruct((B, T), jnp.int32),
    )
    q, k, v = (a.shape for a in jax.eval_shape(expand, params, x_BTD, positions_BT))
    return attention.scale, {"q": q, "k": k, "v": v, "do": q[:-1] + v[-1:]}
