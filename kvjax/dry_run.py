"""What a run would take: parameters, FLOPs, cache and the compiled step's memory, without any weights."""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax import accounting, sharding
from kvjax.config import Config
from kvjax.data.config import DataConfig
from kvjax.data.tokenizer import ByteTokenizer
from kvjax.train import compute_dtype, init_state, make_step

MIB = 2**20


@dataclass(frozen=True)
class StepCost:
    """What compiling the training step took, and what running it takes, in bytes of one device."""

    trace_seconds: float
    """From Python to StableHLO."""
    compile_seconds: float
    """From StableHLO to the program."""
    argument_bytes: int
    """State and batch."""
    temporary_bytes: int
    """Everything between them and the results: activations, gradients, updates."""
    aliased_bytes: int
    """Results that are written over donated arguments."""


def vocabulary(data: DataConfig) -> int:
    """Ids of the tokenizer that `data` names, which need not be trained yet."""
    return ByteTokenizer().vocab_size if data.tokenizer == "bytes" else data.vocab_size


def compile_step(config: Config, vocab_size: int, mesh: Mesh) -> tuple[jax.stages.Compiled, StepCost]:
    """The step as a program `(state, batch) -> (state, metrics)`, compiled for shapes alone.

    The state is on every device of `mesh` and donated, the batch is split over them.
    """
    shape = lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
    state = jax.eval_shape(lambda: init_state(config, vocab_size))
    state = jax.tree.map(lambda a: shape(a, PartitionSpec()), state)
    tokens_BT = jax.ShapeDtypeStruct((config.train.batch_size, config.data.context), jnp.int32)
    tokens_BT = shape(tokens_BT, PartitionSpec(sharding.AXIS))
    started = time.perf_counter()
    lowered = make_step(config, vocab_size, mesh).lower(state, {"tokens_BT": tokens_BT, "targets_BT": tokens_BT})
    traced = time.perf_counter()
    program = lowered.compile()
    compiled = time.perf_counter()
    memory = program.memory_analysis()
    assert memory is not None, "this backend does not report the memory of compiled programs"
    return program, StepCost(
        trace_seconds=traced - started,
        compile_seconds=compiled - traced,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
    )


def report(config: Config) -> list[str]:
    """Lines that say what training `config` would take; nothing is computed, read or written.

    ValueError where the batch does not divide over the devices.
    """
    train, context = config.train, config.data.context
    mesh = sharding.make_mesh(train.batch_size // train.accumulate, "train.batch_size / accumulate")
    dtype, vocab_size = compute_dtype(train.dtype), vocabulary(config.data)
    parameters = accounting.num_parameters(accounting.abstract_params(config, vocab_size))
    forward, training = (accounting.flops_per_token(config, vocab_size, context, t) for t in (False, True))
    measured = accounting.abstract_cache(config, vocab_size, 1, context, dtype).bytes_per_token()
    declared = accounting.declared_bytes_per_token(config, dtype.itemsize)
    assert measured == declared, f"a cached token takes {measured} bytes, but {declared} are declared"
    _, step = compile_step(config, vocab_size, mesh)
    devices = f"{mesh.size} {jax.devices()[0].device_kind} device{'s' if mesh.size > 1 else ''}"
    return [
        f"model: {parameters:,} parameters, vocabulary {vocab_size:,}",
        f"FLOPs per token at context {context}: {forward:,.0f} forward, {training:,.0f} training",
        f"cache: {measured:,.0f} bytes per token in {dtype.name}, declared and measured",
        f"step: {train.batch_size} x {context} tokens in {dtype.name} on {devices}, "
        f"{training * train.batch_size * context / 1e9:,.1f} GFLOPs",
        f"compilation: {step.trace_seconds:.1f} s to trace, {step.compile_seconds:.1f} s to compile",
        f"memory of a device: {step.argument_bytes / MIB:,.1f} MiB arguments, of which "
        f"{step.aliased_bytes / MIB:,.1f} MiB are updated in place, and "
        f"{step.temporary_bytes / MIB:,.1f} MiB temporaries",
    ]
