"""Training as a pure function: loss, state, and one donated step.

B batch, T tokens, D width, V vocabulary, A accumulated parts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from kvjax import sharding
from kvjax.config import Config, OptimizerConfig
from kvjax.decoder import Decoder
from kvjax.losses import cross_entropy

Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes."""

    params: Any
    opt_state: Any
    step: jax.Array
    """Steps taken."""
    finite: jax.Array
    """False from the first non-finite loss or gradient on; then no update is made any more."""


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of activations: "auto" is float32 on CPU, where bfloat16 is emulated, bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def cast(params: Any, dtype: jnp.dtype) -> Any:
    """Parameters as the model computes with them."""
    return jax.tree.map(lambda a: a.astype(dtype), params)


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, cosine to the final rate."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=config.peak_lr * config.final_lr_fraction,
    )


def make_optimizer(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, then AdamW that decays all but gains and biases."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            rate,
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(_decays, params),
        ),
    )


def _decays(path, leaf):
    name = jax.tree_util.keystr(path)
    return "gain" not in name and "bias" not in name


def init_state(config: Config, vocab_size: int) -> TrainState:
    """Initial weights from the seed, zero moments."""
    params = nnx.split(config.build(vocab_size))[1]
    opt_state = make_optimizer(config.optimizer, schedule(config.optimizer, config.train.steps)).init(params)
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32), jnp.ones((), bool))


def graphdef_of(config: Config, vocab_size: int) -> nnx.GraphDef[Decoder]:
    """The model's structure, without computing weights."""
    return nnx.split(nnx.eval_shape(lambda: config.build(vocab_size)))[0]


def dropout_key(config: Config) -> jax.Array | None:
    """What every step's dropout is drawn from; None where there is none."""
    return jax.random.fold_in(jax.random.key(config.seed), 1) if config.decoder.dropout > 0 else None


def make_step(config: Config, vocab_size: int, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted step: state (donated) and batch `tokens_BT, targets_BT` to state and metrics.

    Metrics are scalars: loss (nats per token), lr, grad_norm (before clipping), param_norm,
    update_norm. Where loss or gradient is not finite, the state keeps its parameters and moments.

    Read a step's metrics before the step after the next is dispatched: on several CPU devices, XLA's
    all-reduce starves and aborts when tens of steps are queued (seen with jax 0.10.2 and 50).
    """
    update = make_update(config, vocab_size, mesh)
    rate = schedule(config.optimizer, config.train.steps)

    def step(state: TrainState, batch: Batch):
        return update(state, batch, dropout_key(config), rate)

    return jax.jit(step, donate_argnums=0)


def make_update(
    config: Config, vocab_size: int, mesh: Mesh
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """`make_step`'s function before it is jitted: (state, batch, `dropout_key`, learning rate of a step).

    Of `config` it takes neither the seed nor the peak learning rate.
    """
    graphdef = graphdef_of(config, vocab_size)
    dtype = compute_dtype(config.train.dtype)
    parts = config.train.accumulate

    def loss(params, part, key):
        model = nnx.merge(graphdef, cast(params, dtype))
        x_BTD, _ = model.hidden(part["tokens_BT"], key=key)
        return cross_entropy(x_BTD, model.unembedding(), part["targets_BT"])

    def gradient(shared, batch):
        params, key = shared
        key = None if key is None else jax.random.fold_in(key, lax.axis_index(sharding.AXIS))
        if parts == 1:
            return jax.value_and_grad(loss)(params, batch, key)
        batch_ABT = jax.tree.map(lambda a: a.reshape(parts, -1, a.shape[-1]), batch)

        def add(total, numbered):
            i, part = numbered
            part_key = None if key is None else jax.random.fold_in(key, i)
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, part, part_key)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = lax.scan(add, zero, (jnp.arange(parts), batch_ABT))
        return jax.tree.map(lambda a: a / parts, total)

    gradient = sharding.over_rows(gradient, mesh, sums=True)

    def update(state: TrainState, batch: Batch, key: jax.Array | None, rate: optax.Schedule):
        optimizer = make_optimizer(config.optimizer, rate)
        key = None if key is None else jax.random.fold_in(key, state.step)
        value, grads = gradient((state.params, key), batch)
        grad_norm = optax.tree.norm(grads)
        finite = state.finite & jnp.isfinite(value) & jnp.isfinite(grad_norm)
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            lr = rate(state.step)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        metrics = {
            "loss": value,
            "lr": lr,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(updates),
        }
        return TrainState(params, opt_state, state.step + 1, finite), metrics

    return update
