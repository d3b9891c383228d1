"""What every variant does alike: training, prefill and decoding are one function, and a cache is what it says.

B batch, T tokens, S slots, D width, N heads.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.attention.heads import Band
from kvjax.codecs import Exact, Storage

BATCH, TOKENS, SLOTS = 3, 11, 16
PARTS = (1, 3, 7)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tokens_of(batch: int = BATCH, num_tokens: int = TOKENS) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 29, (batch, num_tokens), np.int32)


def positions_from(first: int) -> np.ndarray:
    return np.tile(np.arange(first, first + TOKENS, dtype=np.int32), (BATCH, 1))


@functools.cache
def splits(num_tokens: int) -> list[tuple[int, ...]]:
    """Every way to write `num_tokens` in parts of 1, 3 and 7."""
    if num_tokens == 0:
        return [()]
    return [(p, *rest) for p in PARTS if p <= num_tokens for rest in splits(num_tokens - p)]


@pytest.fixture(scope="module", params=[None, 8], ids=["whole", "chunk8"])
def chunk(request) -> int | None:
    return request.param


@pytest.fixture(scope="module")
def expected(model) -> np.ndarray:
    """Logits of the training form."""
    return np.asarray(model.forward(model.params, tokens_of(), positions_from(0)), np.float64)


# The training form


def test_training_form_is_the_oracle(variant, build, oracle, error, quick_jit):
    """At positions 0 ... 12, and at others with the same distances."""
    module, x_BTD = build(variant), draw(2, 13, 23)
    run = quick_jit(module)
    expected_BTD = oracle(module, x_BTD)
    for first, tolerance in ((0, 5e-6), (37, 2e-5)):
        positions_BT = np.array([[first], [2 * first]], np.int32) + np.arange(13, dtype=np.int32)
        y_BTD, cache = run(x_BTD, positions_BT)
        assert cache is None
        assert error(y_BTD, expected_BTD) < tolerance
        assert error(y_BTD[:, 1:], expected_BTD[:, 1:]) < tolerance


# Training, prefill and decoding are one function


def test_both_forms_of_reading_are_in_use(variant, build):
    assert 1 < build(variant).expand_from <= 7


@pytest.mark.parametrize("start", [0, 37])
def test_any_split_into_prefill_and_steps_equals_training(model, chunk, expected, start, error):
    for split in splits(TOKENS) if start == 0 else [(3, 7, 1), (7, 1, 3)]:
        logits, cache = model.feed(model.empty(BATCH, SLOTS, chunk), tokens_of(), positions_from(start), split)
        assert error(logits, expected) < 2e-5, split
        assert int(cache.length) == TOKENS


def test_ragged_prompts_equal_each_prompt_alone(model, chunk, error):
    """Left padding has position -1; the third row's covers all of the first chunk."""
    lengths = np.array([11, 8, 2])
    positions = positions_from(0) - (TOKENS - lengths)[:, None].astype(np.int32)
    padded = np.where(positions >= 0, tokens_of(), 17).astype(np.int32)
    logits, _ = model.feed(model.empty(BATCH, SLOTS, chunk), padded, np.maximum(positions, -1), (7, 3, 1))
    assert np.isfinite(logits).all()
    for row, length in enumerate(lengths):
        alone = np.full((BATCH, TOKENS), 5, np.int32)
        alone[:, :length] = tokens_of()[row, TOKENS - length :]
        expected = model.forward(model.params, alone, positions_from(0))[row, :length]
        assert error(logits[row, TOKENS - length :], expected) < 2e-5


def test_bfloat16_parameters(model, expected):
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.params)
    cache = nnx.merge(model.graphdef, params).init_cache(BATCH, SLOTS, Storage(chunk=8))
    assert {a.dtype for a in jax.tree.leaves(cache.memory)} == {jnp.dtype(jnp.bfloat16)}
    half = dataclasses.replace(model, params=params)
    logits, _ = half.feed(cache, tokens_of(), positions_from(0), (7, 1, 1, 1, 1))
    assert np.abs(logits - expected).mean() < 0.03 * expected.std()


# What is read


def test_a_zeroed_or_random_memory_wrecks_the_next_logits(model, chunk, expected):
    """Decoding reads the cache, and not something that it happens to keep beside it."""
    _, cache = model.feed(model.empty(BATCH, SLOTS, chunk), tokens_of(), positions_from(0), (7, 3))
    last = lambda memory: np.asarray(
        model.step(
            model.params,
            tokens_of()[:, -1:],
            positions_from(0)[:, -1:],
            dataclasses.replace(cache, memory=memory),
        )[0][:, 0]
    )
    zeroed = jax.tree.map(jnp.zeros_like, cache.memory)
    noise = jax.tree.map(lambda a: jnp.asarray(draw(*a.shape, seed=3)) * a.std(), cache.memory)
    right = expected[:, -1]
    change = lambda memory: np.sqrt(np.square(last(memory) - right).mean()) / right.std()
    assert change(cache.memory) < 1e-5
    assert change(zeroed) > 0.2
    assert change(noise) > 0.2


def test_free_slots_are_not_read(model, chunk, expected, error):
    """Whatever a free slot holds has no weight; chunks with free slots alone are not even decoded."""
    _, cache = model.feed(model.empty(BATCH, SLOTS, chunk), tokens_of(), positions_from(0), (3, 1))
    used = np.arange(SLOTS)[:, None] < 4
    far = np.arange(SLOTS)[:, None] >= 8
    junk = lambda a: jnp.where(used, a, jnp.asarray(99 * draw(*a.shape)))
    poison = lambda a: jnp.where(far & (chunk is not None), jnp.asarray(np.nan, a.dtype), junk(a))
    memory = jax.tree.map(poison, cache.memory)
    logits, _ = model.step(
        model.params,
        tokens_of()[:, 4:5],
        positions_from(0)[:, 4:5],
        dataclasses.replace(cache, memory=memory),
    )
    assert error(logits, expected[:, 4:5]) < 2e-5


def test_band():
    """A query at position 2 sees filled slots of positions 0 to 2; at -1 (padding) it sees nothing."""
    queries_BT1, slots_B1S = (
        jnp.array([[2, -1], [0, 3]])[:, :, None],
        jnp.array([[[-1, 0, 1, 2, 3]], [[3, 2, 1, 0, -1]]]),
    )
    assert Band(2, 1).sees(jnp.int32(4), jnp.arange(6)).astype(int).tolist() == [1, 0, 0, 1, 1, 0]
    mask_BTS = Band().sees(queries_BT1, slots_B1S)
    assert mask_BTS.astype(int).tolist() == [
        [[0, 1, 1, 1, 0], [0, 0, 0, 0, 0]],
        [[0, 0, 0, 1, 0], [1, 1, 1, 1, 0]],
    ]


def test_a_step_in_chunks_makes_no_array_larger_than_what_is_stored(model, largest_array):
    """Not even where keys must be rebuilt for every head: 256 slots of them would be the largest."""
    cache = model.empty(BATCH, 256, 8)
    stored = max(a.size for a in jax.tree.leaves(cache.memory))
    now = slice(0, 1)
    assert largest_array(model.step, model.params, tokens_of()[:, now], positions_from(0)[:, now], cache) == stored


# The two algebraic forms


def test_readings_of_parts_of_the_slots_add_up(variant, build, error, quick_jit):
    """`mix` is linear in the probabilities, and a slot's score does not depend on other slots."""
    module, positions_BT, probs_BNTS = build(variant), positions_from(0)[:, :7], draw(BATCH, 6, 7, 7, seed=1)

    def read(x_BTD, *parts):
        queries, memory = module.project(x_BTD, positions_BT)
        queries, scores, mixed = module.absorb(queries), [], []
        for now in parts:
            part = {name: a[..., now, :] for name, a in memory.items()}
            scores.append(module.score(queries, part, positions_BT[:, now]))
            mixed.append(module.mix(probs_BNTS[..., now], part))
        return jnp.concatenate(scores, axis=-1), sum(mixed[1:], mixed[0])

    run = lambda *parts: quick_jit(lambda x_BTD: read(x_BTD, *parts))(draw(BATCH, 7, 23))
    for whole, added in zip(run(slice(0, 7)), run(slice(0, 3), slice(3, 7))):
        assert error(added, whole) < 2e-6


def test_absorbed_scores_and_values_are_those_of_expanded_heads(variant, build, error, quick_jit):
    module, positions_BT, probs_BNTS = build(variant), positions_from(0)[:, :7], draw(BATCH, 6, 7, 7, seed=1)

    def expanded(x_BTD):
        q_BKGTH, k_BKSH, v_BKSV = module.expand(*module.project(x_BTD, positions_BT), positions_BT)
        scores_BNTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH).reshape(probs_BNTS.shape)
        probs_BKGTS = probs_BNTS.reshape(*q_BKGTH.shape[:3], 7, 7)
        heads_BKGTV = jnp.einsum("BKGTS,BKSV->BKGTV", probs_BKGTS, v_BKSV)
        return scores_BNTS, module.merge(heads_BKGTV.reshape(*probs_BNTS.shape[:3], -1))

    def absorbed(x_BTD):
        queries, memory = module.project(x_BTD, positions_BT)
        scores_BNTS = module.score(module.absorb(queries), memory, positions_BT)
        return scores_BNTS, module.output(module.mix(probs_BNTS, memory))

    x_BTD = draw(BATCH, 7, 23)
    scores, y_BTD = quick_jit(absorbed)(x_BTD)
    expected_scores, expected_BTD = quick_jit(expanded)(x_BTD)
    assert error(scores[:, :, 1:], expected_scores[:, :, 1:]) < 5e-6
    assert error(y_BTD[:, 1:], expected_BTD[:, 1:]) < 5e-6


@pytest.mark.parametrize(
    ("expand_from", "split"), [(1, (1,) * 11), (2**30, (7, 1, 3))], ids=["expanded", "absorbed"]
)
def test_either_form_of_reading_alone(model, expand_from, split, expected, error, quick_jit):
    decoder = nnx.merge(model.graphdef, model.params)
    for block in decoder.layers:
        block.attention.expand_from = expand_from
    graphdef = nnx.split(decoder)[0]
    forced = dataclasses.replace(
        model, step=quick_jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))
    )
    logits, _ = forced.feed(model.empty(BATCH, SLOTS, None), tokens_of(), positions_from(0), split)
    assert error(logits[:, 1:], expected[:, 1:]) < 2e-5


# Bytes


def test_an_entry_holds_what_the_formula_says(variant, build):
    _, entry = jax.eval_shape(build(variant).project, jnp.zeros((2, 13, 23)), jnp.zeros((2, 13), jnp.int32))
    assert all(leaf.shape[0] == 2 and leaf.shape[-2] == 13 for leaf in jax.tree.leaves(entry))
    assert sum(leaf.size for leaf in jax.tree.leaves(entry)) == 2 * 13 * variant.elements_per_token()


@pytest.mark.parametrize(("batch", "slots", "dtype", "itemsize"), [(1, 5, "float32", 4), (3, 17, "bfloat16", 2)])
def test_a_cache_takes_the_bytes_that_are_declared(model, batch, slots, dtype, itemsize):
    params = jax.tree.map(lambda a: a.astype(dtype), model.params)
    cache = nnx.merge(model.graphdef, params).init_cache(batch, slots, Exact())
    declared = model.attention.elements_per_token() * 2 * itemsize
    assert cache.bytes_per_token() == declared
    assert sum(a.nbytes for a in jax.tree.leaves(cache.memory)) == batch * slots * declared
