"""Programs compiled for an H100 on this CPU: what the decode and training steps do there with the cache.

Needs the extra `h100` (the wheel of XLA's CUDA compiler; no GPU, no driver). What is asserted is
read from the compiled program: aliasing, temporaries, instructions on arrays of the cache's size.
B batch, T tokens, S slots, V vocabulary.
"""

import dataclasses
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import gqa4_124m
from kvjax.accounting import abstract_cache
from kvjax.attention.latent import Latent
from kvjax.codecs.base import CHUNK
from kvjax.codecs.floats import Fp8, NvFp4
from kvjax.codecs.integers import Int
from kvjax.decode_benchmark import loop_program
from kvjax.decoder import DecoderConfig, fused
from kvjax.slots import nbytes

INSTALLED = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda12")
pytestmark = pytest.mark.skipif(not INSTALLED, reason="needs the extra h100")

# Public figures of the H100 SXM5, in the form of XLA's target descriptions.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  runtime_version: "12.9.0"
  driver_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
BATCH, SLOTS = 8, 4096
# Six layers say of a layer's cache what twelve do, in half the time.
GQA = dataclasses.replace(
    gqa4_124m.config, decoder=dataclasses.replace(gqa4_124m.config.decoder, depth=6, scan=False)
)
MODELS = {
    "gqa": GQA,
    "mla": dataclasses.replace(
        GQA, attention=Latent(16, rank=512, rope_dim=64, nope_dim=128, value_dim=128), decoder=GQA.decoder
    ),
}
CODECS = {"int8": Int(8), "fp8": Fp8.calibrated(4.0), "nvfp4": NvFp4.calibrated(4.0)}
BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
}
VIEWS = ("parameter", "bitcast", "get-tuple-element", "tuple", "while", "conditional", "call", "constant")


@pytest.fixture(scope="module")
def device():
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices[0]


def on(device, tree):
    sharding = jax.sharding.SingleDeviceSharding(device)
    shape = lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a), sharding=sharding)
    return jax.tree.map(shape, tree)


def decode_program(config, device, codec=None):
    """The generation loop, and its cache as shapes."""

    def build():
        model = config.build(config.data.vocab_size)
        return nnx.merge(*fused(*nnx.split(model), turn=False))

    graphdef, params = nnx.split(nnx.eval_shape(build))
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), params)
    cache = abstract_cache(config, config.data.vocab_size, BATCH, SLOTS, jnp.dtype("bfloat16"), codec)
    return loop_program(graphdef, params, cache, 64, lambda arguments: on(device, arguments)), cache


@pytest.fixture(scope="module", params=MODELS)
def decoding(request, device):
    config = MODELS[request.param]
    return config, *decode_program(config, device)


def buffers(program, least):
    """(operation, bytes, line) of instructions outside of fusions that own a buffer of `least` bytes or more."""
    text, found, computation = program.as_text(), [], None
    fused = set(re.findall(r"calls=%?([\w.\-]+)", text))
    for line in text.splitlines():
        if head := re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            computation = head[1]
        row = re.match(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\([^=]*?\)|\S+) ([a-z][\w\-]*)\(", line)
        if row is None or row[2] in VIEWS or computation in fused:
            continue
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", row[1]):
            size = math.prod(int(d) for d in dims.split(",") if d) * BYTES.get(kind, 4)
            if size >= least:
                found.append((row[2], size, line.strip()))
    return found


def layer_bytes(cache):
    """Bytes of the smallest array that a layer stores."""
    return min(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache.memory))


def test_the_cache_is_written_in_place(decoding):
    _, program, cache = decoding
    assert program.memory_analysis().alias_size_in_bytes >= nbytes(cache.memory)
    assert "input_output_alias" in program.as_text()


def test_temporaries_are_a_small_part_of_the_cache(decoding):
    _, program, cache = decoding
    assert program.memory_analysis().temp_size_in_bytes <= 0.1 * nbytes(cache.memory)


def test_nothing_of_a_layers_size_is_made_but_by_the_write(decoding):
    """Neither a repeat, nor a transpose, nor a copy, nor rebuilt heads: arrays as large are the updated caches."""
    _, program, cache = decoding
    for operation, _, line in buffers(program, layer_bytes(cache)):
        assert operation == "fusion" and "dynamic_update_slice_fusion" in line.partition(" = ")[0], line


@pytest.mark.parametrize(("name", "codec"), [("gqa", name) for name in CODECS] + [("mla", "nvfp4")])
def test_a_compressed_cache_is_decoded_a_chunk_at_a_time(name, codec, device):
    """In place, and what owns a buffer is no larger than a float32 chunk, but for the written arrays."""
    config = MODELS[name]
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, depth=2))
    program, cache = decode_program(config, device, CODECS[codec])
    exact = abstract_cache(config, config.data.vocab_size, BATCH, SLOTS, jnp.dtype("bfloat16"))
    memory = program.memory_analysis()
    assert nbytes(cache.memory) < 0.53 * nbytes(exact.memory)
    assert memory.alias_size_in_bytes >= nbytes(cache.memory)
    assert memory.temp_size_in_bytes <= 0.1 * nbytes(exact.memory)
    chunk = max(a.size for a in jax.tree.leaves(exact.memory)) // SLOTS * CHUNK * 4
    stored = {f"u{8 * a.dtype.itemsize}[{','.join(map(str, a.shape))}]" for a in jax.tree.leaves(cache.memory)}
    for operation, size, line in buffers(program, 1):
        name, _, made = line.partition(" = ")
        if size > chunk or made.partition("{")[0] in stored:
            assert operation == "fusion" and "dynamic_update_slice_fusion" in name, line


def test_absorbed_mla_reads_the_latent_alone(device):
    """No array of the program has heads x slots x features: keys and values of 16 heads are never rebuilt."""
    program, _ = decode_program(MODELS["mla"], device)
    expanded = {f"{BATCH},16,{SLOTS},{width}" for width in (128, 192)} | {f"{BATCH * 16},{SLOTS},128"}
    shapes = set(re.findall(r"\w+\[([\d,]+)\]", program.as_text()))
    assert f"{BATCH},{SLOTS},512" in shapes
    assert not shapes & expanded


def test_the_check_sees_a_repeat(device):
    """What the assertions above would find in a step that repeats the keys of 4 heads for 12."""

    def step(k_BKSH, q_BNTH, new_BKTH, i):
        k_BKSH = jax.lax.dynamic_update_slice_in_dim(k_BKSH, new_BKTH, i, 2)
        k_BNSH = jax.lax.optimization_barrier(jnp.repeat(k_BKSH, 3, axis=1))
        return k_BKSH, jnp.einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNSH)

    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)
    shapes = (shape(8, 4, 4096, 64), shape(8, 12, 1, 64), shape(8, 4, 1, 64), jax.ShapeDtypeStruct((), jnp.int32))
    program = jax.jit(step, donate_argnums=0).lower(*on(device, shapes)).compile()
    large = [line for _, size, line in buffers(program, 2 * 8 * 4 * 4096 * 64 * 2)]
    assert large, "the repeated keys were not found"


def test_the_training_step(device):
    """State aliased; no array of T x T scores for all heads; no keys repeated."""
    import numpy as np
    from jax.sharding import Mesh

    from kvjax import sharding
    from kvjax.train import init_state, make_step

    config = dataclasses.replace(
        GQA,
        decoder=DecoderConfig(width=768, depth=2, mlp_width=2048),
        train=dataclasses.replace(GQA.train, batch_size=4, accumulate=1),
    )
    mesh = Mesh(np.array([device]), (sharding.AXIS,))
    vocab, T = config.data.vocab_size, config.data.context
    state = on(device, jax.eval_shape(lambda: init_state(config, vocab)))
    tokens_BT = on(device, jax.ShapeDtypeStruct((4, T), jnp.int32))
    step = make_step(config, vocab, mesh)
    program = step.lower(state, {"tokens_BT": tokens_BT, "targets_BT": tokens_BT}).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes(state)
    heads = config.attention.num_heads
    scores = 4 * heads * T * T * 4
    assert not [line for _, size, line in buffers(program, scores)]


def test_members_share_their_kernels(device):
    """Four runs as one program have about as many instructions to launch as one."""
    import numpy as np
    from jax.sharding import Mesh

    from configs import tiny
    from kvjax import ensemble, sharding

    config = dataclasses.replace(tiny.config, train=dataclasses.replace(tiny.config.train, dtype="bfloat16"))
    mesh = Mesh(np.array([device]), (sharding.AXIS,))
    counts = {}
    for number in (1, 4):
        members = ensemble.Members(config, tuple(range(number)), (1e-3,) * number)
        states = on(device, jax.eval_shape(lambda members=members: ensemble.init_states(members, 257)))
        shape = (config.train.batch_size, number, config.data.context)
        tokens = on(device, jax.ShapeDtypeStruct(shape, jnp.int32))
        step = ensemble.make_step(members, 257, mesh)
        program = step.lower(states, {"tokens_BT": tokens, "targets_BT": tokens}).compile()
        assert program.memory_analysis().alias_size_in_bytes >= nbytes(states)
        counts[number] = len({line for _, _, line in buffers(program, 1)})
    assert counts[4] < 1.1 * counts[1]
