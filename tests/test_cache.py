"""Writing, reading, room and size of the cache, on literal arrays and on compiled programs.

B batch, T tokens, S slots.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kvjax import cache as caches
from kvjax.cache import Cache
from kvjax.codecs import Exact, Storage
from kvjax.slots import Ring, nbytes


def empty(slots: int, chunk: int | None = None, batch: int = 1) -> Cache:
    """One layer that stores a number `flat` [B, S, 1] and two heads `k` [B, 2, S, 1] for each token."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    return caches.empty(({"flat": shape(batch, slots, 1), "k": shape(batch, 2, slots, 1)},), Storage(chunk=chunk))


def entry(*tokens: float, batch: int = 1):
    """Head j of token t holds t + j / 10."""
    flat = jnp.broadcast_to(jnp.asarray(tokens, jnp.float32)[None, :, None], (batch, len(tokens), 1))
    return {"flat": flat, "k": jnp.stack([flat, flat + 0.1], axis=1)}


def read(layer, start=0, size=None):
    (part,) = layer.sources()[0].read(start, size or layer.positions_BS.shape[1])
    return part.memory


def write(cache: Cache, positions_BT, *tokens: float) -> Cache:
    claim = cache.claim(jnp.asarray(positions_BT, jnp.int32))
    layer = claim.layer(0).write(entry(*tokens, batch=cache.positions_BS.shape[0]))
    return claim.written([layer])


def test_an_empty_cache():
    cache = empty(5, batch=2)
    assert cache.positions_BS.tolist() == [[-1] * 5] * 2
    assert (cache.max_len, int(cache.length)) == (5, 0)
    assert {name: a.shape for name, a in cache.memory[0].items()} == {"flat": (2, 5, 1), "k": (2, 2, 5, 1)}
    assert not any(np.asarray(a).any() for a in cache.memory[0].values())


def test_tokens_land_in_the_next_slots():
    cache = write(write(empty(7), [[0, 1, 2]], 11, 12, 13), [[3, 4]], 21, 22)
    assert int(cache.length) == 5
    assert cache.positions_BS.tolist() == [[0, 1, 2, 3, 4, -1, -1]]
    memory = cache.memory[0]
    assert memory["flat"][:, 0].tolist() == [11, 12, 13, 21, 22, 0, 0]
    heads = [[11, 12, 13, 21, 22, 0, 0], [11.1, 12.1, 13.1, 21.1, 22.1, 0, 0]]
    np.testing.assert_allclose(memory["k"][:, :, 0], heads, rtol=1e-6)


def test_rows_share_slots_and_differ_in_positions():
    cache = write(empty(5, batch=3), [[-1, 0], [-1, -1], [0, 1]], 1, 2)
    cache = write(cache, [[1], [0], [2]], 3)
    assert cache.positions_BS.tolist() == [[-1, 0, 1, -1, -1], [-1, -1, 0, -1, -1], [0, 1, 2, -1, -1]]


@pytest.mark.parametrize("batch", [1, 2])
def test_stored_arrays_lack_axes_of_size_1_that_codecs_see(batch):
    claim = empty(5, batch=batch).claim(jnp.zeros((batch, 1), jnp.int32))
    layer = claim.layer(0).write(entry(7.0, batch=batch))
    stored = {1: {"flat": (5, 1), "k": (2, 5, 1)}, 2: {"flat": (2, 5, 1), "k": (2, 2, 5, 1)}}
    assert {name: a.shape for name, a in layer.memory.items()} == stored[batch]
    assert {name: a.shape for name, a in read(layer).items()} == {"flat": (batch, 5, 1), "k": (batch, 2, 5, 1)}
    assert read(layer, 0, 1)["k"].tolist() == [[[[7.0]], [[jnp.float32(7.1)]]]] * batch


RING = Ring(window=4, num_sinks=2)


def test_slots_of_a_ring():
    """Sinks keep theirs; of a stretch only the last `window` positions, and no padding, are written."""
    slots = lambda *positions: [
        slot if slot < 6 else None for slot in RING.slots(jnp.array([positions])).tolist()[0]
    ]
    assert slots(0, 1, 2, 3) == [0, 1, 2, 3]
    assert slots(5, 6, 7) == [5, 2, 3]
    assert slots(-1, 0, 1, 2, 3, 4, 5, 6, 7) == [None, 0, 1, None, None, 2 + 2, 2 + 3, 2, 3]


def test_a_ring_keeps_its_window_and_sinks_whatever_the_parts():
    for parts in ([1] * 13, [3, 1, 9], [13], [2, 11]):
        ring, t = caches.empty(({"flat": jax.ShapeDtypeStruct((1, 6, 1), jnp.float32)},), Exact(), RING), 0
        for size in parts:
            claim = ring.claim(jnp.arange(t, t + size)[None])
            layer = claim.layer(0).write({"flat": jnp.arange(t, t + size, dtype=jnp.float32)[None, :, None]})
            seen = dict(zip(claim.positions_BS[0].tolist(), read(layer)["flat"][0, :, 0].tolist()))
            band = {p for p in range(t + 1) if t - p < 4 or p < 2}  # what the first query of the part sees
            assert band <= set(seen) and all(seen[p] == p for p in band)
            ring, t = claim.written([layer]), t + size
        assert sorted(ring.positions_BS[0].tolist()) == [0, 1, 9, 10, 11, 12]
        assert ring.memory[0]["flat"][:, 0].tolist() == ring.positions_BS[0].tolist()


def test_reading_a_part():
    cache = write(empty(7), [[0, 1, 2, 3, 4]], 1, 2, 3, 4, 5)
    layer = cache.claim(jnp.zeros((1, 0), jnp.int32)).layer(0)
    assert read(layer, 2, 3)["flat"][0, :, 0].tolist() == [3, 4, 5]
    assert read(layer)["k"].shape == (1, 2, 7, 1)
    np.testing.assert_allclose(read(layer, jnp.int32(1), 2)["k"][0, 1, :, 0], [2.1, 3.1], rtol=1e-6)


def test_jax_alone_would_move_a_write_that_does_not_fit():
    """Why `room_for` exists: two tokens written at slot 4 of 5 overwrite slot 3."""
    slots = lax.dynamic_update_slice_in_dim(jnp.arange(5), jnp.array([91, 92]), 4, 0)
    assert slots.tolist() == [0, 1, 2, 91, 92]


@pytest.mark.parametrize(("used", "more", "fit"), [(0, 6, 5), (4, 2, 1), (5, 1, 0)])
def test_a_full_cache_refuses(used, more, fit):
    cache = empty(5)
    if used:
        cache = write(cache, [list(range(used))], *range(used))
    before = jax.tree.map(np.array, cache)
    message = f"num_tokens={more} do not fit a cache of max_len=5 slots with {used} in use; at most {fit} fit"
    for refused in (lambda: cache.room_for(more), lambda: cache.claim(jnp.zeros((1, more), jnp.int32))):
        with pytest.raises(ValueError, match=re.escape(message)):
            refused()
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), cache, before)))
    cache.room_for(fit)


def test_too_many_tokens_are_refused_while_tracing():
    with pytest.raises(ValueError, match="num_tokens=6 do not fit"):
        jax.jit(lambda cache: cache.claim(jnp.zeros((1, 6), jnp.int32)).cache)(empty(5))


def test_a_decoder_refuses_before_it_writes(model_of):
    """The cacheless model has no such limit."""
    model = model_of("gqa3")
    tokens, positions = np.zeros((3, 11), np.int32), np.tile(np.arange(11, dtype=np.int32), (3, 1))
    with pytest.raises(ValueError, match="num_tokens=11 do not fit a cache of max_len=7"):
        model.step(model.params, tokens, positions, model.empty(3, 7, None))
    assert model.forward(model.params, tokens, positions).shape == (3, 11, 29)


@pytest.mark.parametrize("chunk", [0, -8])
def test_a_chunk_has_slots(chunk):
    with pytest.raises(ValueError, match=rf"chunk={chunk} must be at least 1"):
        Storage(chunk=chunk)


@pytest.mark.parametrize(("slots", "nearest"), [(12, "8 or 16"), (3, "8 or 8")])
def test_slots_must_be_whole_chunks(slots, nearest):
    with pytest.raises(ValueError, match=rf"max_len={slots} must be a multiple of .*chunk=8; nearest: {nearest}"):
        empty(slots, chunk=8)
    assert empty(16, chunk=8).claim(jnp.zeros((1, 0), jnp.int32)).layer(0).chunk == 8


def test_nbytes_counts_arrays_and_shapes():
    tree = {
        "a": jnp.zeros((3, 5), jnp.bfloat16),
        "b": (np.zeros(7, np.uint8), jax.ShapeDtypeStruct((2,), jnp.float32)),
    }
    assert nbytes(tree) == 3 * 5 * 2 + 7 + 2 * 4


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("slots", [1, 7])
def test_bytes_per_token_do_not_depend_on_the_size_of_the_cache(batch, slots):
    cache = empty(slots, batch=batch)
    assert cache.bytes_per_token() == 3 * 4
    assert nbytes(cache.memory) == batch * slots * 3 * 4


def test_a_cache_is_a_pytree_whose_codec_is_static():
    cache = empty(16, chunk=8)
    leaves, structure = jax.tree.flatten(cache)
    assert len(leaves) == 4
    assert jax.tree.unflatten(structure, leaves).storages == (Storage({"flat": Exact(), "k": Exact()}, chunk=8),)
    assert jax.tree.structure(empty(16)) != structure


def test_a_donated_cache_is_updated_in_place(model, quick_jit):
    cache = jax.tree.map(jnp.copy, model.empty(3, 16, 8))
    tokens, positions = np.zeros((3, 1), np.int32), np.zeros((3, 1), np.int32)
    donated = (
        quick_jit(model.step.__wrapped__, donate_argnums=3).lower(model.params, tokens, positions, cache).compile()
    )
    assert donated.memory_analysis().alias_size_in_bytes >= nbytes(cache)
    pointers = lambda cache: [a.unsafe_buffer_pointer() for a in jax.tree.leaves(cache.memory)]
    before = pointers(cache)
    assert pointers(donated(model.params, tokens, positions, cache)[1]) == before
    assert all(a.is_deleted() for a in jax.tree.leaves(cache))
