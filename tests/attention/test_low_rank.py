"""Low-rank KV: what is rebuilt and what is absorbed.

B batch, T tokens, S slots.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.low_rank import LowRank

JOINT = {"head_dim": 4, "rank": 11}
SPLIT = {"head_dim": 4, "rank": None, "rank_k": 7, "rank_v": 13}


@pytest.mark.parametrize(("name", "heads_of_keys"), [("low_rank_none", 0), ("low_rank", 6)])
def test_keys_are_rebuilt_only_where_they_turn(name, heads_of_keys, model_of, largest_array):
    """256 slots: latents of 11, or keys of 6 heads of 4."""
    model = model_of(name)
    tokens, positions = np.zeros((2, 3, 1), np.int32)
    largest = largest_array(model.step, model.params, tokens, positions, model.empty(3, 256, None))
    assert largest == 3 * 256 * max(11, 4 * heads_of_keys)


def test_without_positions_order_does_not_matter(build, error, quick_jit):
    """The last token sees the same set whichever way the earlier ones are shuffled; with RoPE it does not."""
    x_BTD = np.random.default_rng(0).standard_normal((2, 7, 23)).astype(np.float32)
    positions_BT = np.tile(np.arange(7, dtype=np.int32), (2, 1))
    last = lambda config, order: quick_jit(build(config))(x_BTD[:, order], positions_BT)[0][:, -1]
    here, shuffled = [0, 1, 2, 3, 4, 5, 6], [3, 0, 5, 1, 4, 2, 6]
    none, rope = LowRank(6, **JOINT, position="none"), LowRank(6, **JOINT)
    assert error(last(none, shuffled), last(none, here)) < 5e-6
    assert error(last(rope, shuffled), last(rope, here)) > 0.05


@pytest.mark.parametrize("position", ["rope", "none"])
@pytest.mark.parametrize("ranks", [JOINT, SPLIT], ids=["joint", "split"])
def test_expanded_reading_starts_where_it_takes_fewer_operations(ranks, position, build, quick_jit):
    """By XLA's own count, over enough slots that the queries' part does not matter."""
    module, slots = build(LowRank(6, **ranks, position=position)), 1024
    shape = jax.ShapeDtypeStruct
    memory = {n: shape((1, slots, r), jnp.float32) for n, r in module.config.ranks.items()}

    def operations(read, num_tokens):
        arrays = shape((1, num_tokens, 23), jnp.float32), shape((1, num_tokens), jnp.int32), memory
        return quick_jit(read).lower(*arrays, shape((1, slots), jnp.int32)).cost_analysis()["flops"]

    def expanded(x, positions, memory, slots):
        q, k, v = module.expand(module.project(x, positions)[0], memory, slots)
        return jnp.einsum("BKGTS,BKSV->BKGTV", jnp.einsum("BKGTH,BKSH->BKGTS", q, k), v)

    def absorbed(x, positions, memory, slots):
        scores = module.score(module.absorb(module.project(x, positions)[0]), memory, slots)
        return module.mix(scores, memory)

    saved = lambda num_tokens: operations(absorbed, num_tokens) - operations(expanded, num_tokens)
    assert saved(module.expand_from - 1) < 0 <= saved(module.expand_from)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"head_dim": 0}, "head_dim=0 must be at least 1"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"rank": None}, "rank=None, rank_k=None, rank_v=None must be either a rank alone"),
        ({"rank_k": 7}, "rank=128, rank_k=7, rank_v=None must be either a rank alone"),
        ({"rank": None, "rank_v": 7}, "rank=None, rank_k=None, rank_v=7 must be either a rank alone"),
        ({"rank": None, "rank_k": 7, "rank_v": 0}, "rank_v=0 must be at least 1"),
        ({"position": "rop"}, "position='rop' is unknown; did you mean 'rope'?"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be at least 1"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        LowRank(**fields)


def test_odd_heads_need_no_rotation():
    assert LowRank(head_dim=7, position="none").head_dim == 7
