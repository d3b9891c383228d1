"""The generation loop as compiled for this CPU: what it does with a cache that it carries.

B batch, S slots.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from kvjax import generate
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.codecs import Exact
from kvjax.decoder import Decoder, DecoderConfig, fused
from kvjax.sampling import GREEDY
from kvjax.slots import nbytes

SLOTS, VOCAB = 2048, 29
VARIANTS = {
    "mha": Grouped(4, 4, head_dim=16),
    "gqa": Grouped(4, 2, head_dim=16),
    "mqa": Grouped(4, 1, head_dim=16),
    "no_position": LowRank(4, head_dim=16, rank=48, position="none"),
    "mla": Latent(4, rank=48, rope_dim=8, nope_dim=16, value_dim=16),
}


def compiled(attention, batch):
    config = DecoderConfig(width=32, depth=8, mlp_width=64)
    split = nnx.split(Decoder(config, attention, VOCAB, jax.random.key(0)))
    graphdef, params = fused(*split, turn=batch == 1)
    cache = nnx.merge(graphdef, params).init_cache(batch, SLOTS, Exact())
    state = cache, jnp.zeros((batch, VOCAB)), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool)
    keys_B, stop_E = jax.random.split(jax.random.key(0), batch), jnp.zeros(16, jnp.int32)
    static = graphdef, 16, GREEDY.form, False
    arguments = params, state, keys_B, jnp.int32(0), jnp.int32(16), GREEDY.numbers(VOCAB), stop_E
    return generate._decode.lower(*static, *arguments).compile(), cache


def large(program, operations, elements):
    """Instructions of these operations that make an array of at least so many elements."""
    pattern = rf"= \w+\[([\d,]+)\]\S* (?:{operations})\("
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(pattern, program.as_text())]
    return [size for size in sizes if size >= elements]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_cache_is_written_in_place_and_never_copied(name, batch):
    program, cache = compiled(VARIANTS[name], batch)
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
