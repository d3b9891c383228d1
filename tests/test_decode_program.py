"""The generation loop as compiled for this CPU: what it does with a cache that it carries.

B batch, S slots, F features, R of a map's image.
"""

import math
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.codecs import Codec, Exact, Storage
from kvjax.codecs.base import CHUNK
from kvjax.codecs.chain import chain
from kvjax.codecs.floats import Fp8, NvFp4
from kvjax.codecs.integers import Int, IntPerChannel
from kvjax.codecs.linear import Linear
from kvjax.decode_benchmark import loop_program
from kvjax.decoder import Decoder, DecoderConfig, fused
from kvjax.slots import nbytes

SLOTS, VOCAB, TOKENS = 2048, 29, 16
VARIANTS = {
    "mha": Grouped(4, 4, head_dim=16),
    "gqa": Grouped(4, 2, head_dim=16),
    "mqa": Grouped(4, 1, head_dim=16),
    "no_position": LowRank(4, head_dim=16, rank=48, position="none"),
    "mla": Latent(4, rank=48, rope_dim=8, nope_dim=16, value_dim=16),
}


def compiled(attention, batch, codec, slots, depth):
    """The loop's program, its cache, and the exact one, both as shapes."""
    config = DecoderConfig(width=32, depth=depth, mlp_width=64)
    split = nnx.split(Decoder(config, attention, VOCAB, jax.random.key(0)))
    graphdef, params = fused(*split, turn=batch == 1)
    model = nnx.merge(graphdef, params)
    cache, exact = (jax.eval_shape(lambda c=c: model.init_cache(batch, slots, c)) for c in (codec, Exact()))
    return loop_program(graphdef, params, cache, TOKENS), params, cache, exact


def large(program, operations, elements, kinds=r"\w+"):
    """Instructions of these operations that make an array of at least so many elements."""
    pattern = rf"= (?:{kinds})\[([\d,]+)\]\S* (?:{operations})\("
    return [dims for dims in re.findall(pattern, program.as_text()) if size(dims) >= elements]


def size(dims):
    return math.prod(map(int, dims.split(",")))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_cache_is_written_in_place_and_never_copied(name, batch):
    program, _, cache, _ = compiled(VARIANTS[name], batch, Exact(), SLOTS, depth=5)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes(cache.memory)
    assert memory.temp_size_in_bytes <= 0.1 * nbytes(cache.memory)
    smallest = min(a.size for a in jax.tree.leaves(cache.memory))
    assert not large(program, "copy|transpose|concatenate|broadcast", smallest)


def test_the_check_sees_a_copy():
    """A carried array with an axis of size 1, as it was stored once."""

    def loop(k_BKSH, q_BKGTH):
        def body(i, carry):
            k_BKSH, out = carry
            k_BKSH = jax.lax.dynamic_update_slice_in_dim(k_BKSH, out[..., 0, :, :], i, 2)
            logits = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH)
            return k_BKSH, jnp.einsum("BKGTS,BKSH->BKGTH", jax.nn.softmax(logits), k_BKSH)

        return jax.lax.fori_loop(0, 9, body, (k_BKSH, q_BKGTH))

    shapes = (
        jax.ShapeDtypeStruct((1, 2, SLOTS, 16), jnp.float32),
        jax.ShapeDtypeStruct((1, 2, 3, 1, 16), jnp.float32),
    )
    program = jax.jit(loop, donate_argnums=0).lower(*shapes).compile()
    assert large(program, "copy", 2 * SLOTS * 16)


# Compressed caches. Slots as many as make a chunk small beside a layer.

CODED_SLOTS, FEATURES, RANK = 8192, 32, 16
GQA = Grouped(4, 2, head_dim=FEATURES)
MLA = Latent(4, rank=48, rope_dim=16, nope_dim=16, value_dim=16)
KINDS = {"uint8": "u8", "uint16": "u16"}  # of codes and scales


def projection(seed):
    """Orthonormal, another one for each of 2 heads."""
    draw = np.random.default_rng(seed).standard_normal((2, FEATURES, FEATURES))
    down_KFR = np.linalg.qr(draw)[0][..., :RANK].astype(np.float32)
    return Linear(jnp.asarray(down_KFR), jnp.asarray(down_KFR.swapaxes(1, 2)), jnp.zeros((2, FEATURES)))


CODECS = {
    "int8": Int(8),
    "fp8": Fp8.calibrated(4.0),
    "nvfp4": NvFp4.calibrated(4.0),
    "int4": Int(4, 32, symmetric=False),
    "kivi": Storage({"k": IntPerChannel(4, 32), "v": Int(4, 32, symmetric=False)}),
    "sinks_recent": Storage(Int(8), sinks=4, recent=64),
    "projected": Storage({name: chain(projection(seed), Int(8)) for seed, name in enumerate("kv")}),
}
CODED = [(GQA, name, 3) for name in CODECS] + [(MLA, "int8", 3), (MLA, "nvfp4", 3)]
CODED += [(GQA, "nvfp4", 1), (GQA, "sinks_recent", 1), (MLA, "int8", 1)]


def decoded_elements(exact):
    """Of the smallest of a layer's arrays."""
    return min(a.size for a in jax.tree.leaves(exact.memory))


def wide(text, elements):
    """Arrays of so many elements or more, but for the stored kinds; in tuples and in fusions, too."""
    shapes = set(re.findall(r"\b([a-z]+\d+\w*|pred)\[([\d,]+)\]", text))
    return [(kind, dims) for kind, dims in shapes if kind not in KINDS.values() and size(dims) >= elements]


def made(text, operations, arrays):
    """Instructions of these operations that make an array as one of these, in whatever order of axes."""
    axes = lambda dims: tuple(sorted(n for n in dims if n > 1))
    whole = {(KINDS.get(a.dtype.name, "f32"), axes(a.shape)) for a in arrays}
    pattern = rf"= (\w+)\[([\d,]+)\]\S* (?:{operations})\("
    return [row for row in re.findall(pattern, text) if (row[0], axes(map(int, row[1].split(",")))) in whole]


@pytest.mark.parametrize(("attention", "name", "batch"), CODED)
def test_a_compressed_cache_is_carried_as_it_is_stored(attention, name, batch):
    """Bytes are those of the arrays in the donated cache; what is decoded is a chunk at a time."""
    program, params, cache, exact = compiled(attention, batch, CODECS[name], CODED_SLOTS, depth=1)
    memory, text = program.memory_analysis(), program.as_text()
    rows = batch * (4 * VOCAB + 4 + 1 + 8)  # logits, position, whether it has ended, key
    scalars = 4 + 4 + 4 * TOKENS  # tokens made and to be made, tokens to stop at
    assert memory.argument_size_in_bytes == nbytes((params, cache)) + rows + scalars
    assert memory.alias_size_in_bytes >= nbytes(cache.memory)
    assert memory.temp_size_in_bytes <= 0.1 * nbytes(exact.memory)
    assert not wide(text, decoded_elements(exact) // 8)  # a chunk has 256 of 8,192 slots
    (layer,) = cache.memory
    stored = jax.tree.leaves([layer[n] for n in exact.memory[0]])
    assert not made(text, "copy|transpose|concatenate|broadcast|select|scatter|gather", stored)
    assert not made(text, "copy|concatenate|scatter", jax.tree.leaves(layer.get("recent")))
    taken = [
        (*a.shape[:-2], a.shape[-2] * CHUNK // CODED_SLOTS, a.shape[-1]) for a in stored if a.dtype == "uint8"
    ]
    codes = [jax.ShapeDtypeStruct(shape, "uint8") for shape in taken]
    assert not made(text, "copy|fusion|custom-call", codes)  # they are decoded where they are read
    for kind in KINDS.values():  # unpacked codes would be larger than packed ones
        largest = max((a.size for a in stored if KINDS.get(a.dtype.name) == kind), default=0)
        assert not large(program, r"[a-z\-]+", largest + 1, kind)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Cast(Codec):
    """FP8 read by `astype`."""

    def encode(self, x):
        return x.astype(jnp.float8_e4m3fn)

    def decode(self, stored, dtype):
        return stored.astype(dtype)

    def bits_per_token(self, heads, features, element_bits):
        return heads * features * 8


def test_the_check_sees_a_cache_that_is_decoded_whole():
    """XLA:CPU moves a cast of all slots out of the walk over chunks."""
    program, _, _, exact = compiled(GQA, 3, Cast(), CODED_SLOTS, depth=1)
    assert wide(program.as_text(), decoded_elements(exact) // 8)
    assert program.memory_analysis().temp_size_in_bytes > 0.1 * nbytes(exact.memory)
