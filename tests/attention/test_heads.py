"""Blocked causal attention against NumPy in float64 and against autodiff of the plain formula.

B batch, K kv heads, G query heads a kv head, T tokens, H key dim, V value dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import heads
from kvjax.attention.heads import Band, causal_attention

SCALE = 0.37
LENGTHS = [1, 7, 64, 65, 131]


def draw(T: int, G: int = 2, dtype=np.float32) -> tuple[np.ndarray, ...]:
    """q, k, v and the result's gradient, with H = 5 and V = 3."""
    rng = np.random.default_rng(T)
    shapes = ((2, 3, G, T, 5), (2, 3, T, 5), (2, 3, T, 3), (2, 3, G, T, 3))
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def solved(q, k, v, do, window=10**9, num_sinks=0):
    """Result and gradients of one softmax after the other, in float64."""
    q, k, v, do = (a.astype(np.float64) for a in (q, k, v, do))
    o, dq, dk, dv = np.zeros_like(do), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, j, g, t in np.ndindex(q.shape[:-1]):
        seen = [s for s in range(t + 1) if t - s < window or s < num_sinks]
        p = np.exp(SCALE * k[b, j, seen] @ q[b, j, g, t])
        p /= p.sum()
        o[b, j, g, t] = p @ v[b, j, seen]
        dp = v[b, j, seen] @ do[b, j, g, t]
        dlogits = SCALE * p * (dp - p @ dp)
        dq[b, j, g, t] = dlogits @ k[b, j, seen]
        dk[b, j, seen] += np.outer(dlogits, q[b, j, g, t])
        dv[b, j, seen] += np.outer(p, do[b, j, g, t])
    return o, dq, dk, dv


def with_gradients(attend, quick_jit):
    def run(q, k, v, do):
        o, pull = jax.vjp(attend, q, k, v)
        return o, *pull(do)

    return quick_jit(run)


def plain(q, k, v):
    T = q.shape[-2]
    logits = jnp.where(jnp.tril(jnp.ones((T, T), bool)), SCALE * jnp.einsum("BKGTH,BKSH->BKGTS", q, k), -1e30)
    return jnp.einsum("BKGTS,BKSV->BKGTV", jax.nn.softmax(logits, axis=-1), v)


blocked = functools.partial(causal_attention, scale=SCALE)


def test_lengths_lie_below_at_and_above_a_block():
    assert heads.BLOCK == 64
    assert [len(heads._blocks(T)) for T in LENGTHS] == [1, 1, 1, 2, 3]


@pytest.mark.parametrize("T", LENGTHS)
def test_result_and_gradients(T, error, quick_jit):
    expected = solved(*draw(T))
    for attend in (blocked, plain):
        for got, right in zip(with_gradients(attend, quick_jit)(*draw(T)), expected):
            if right.any():  # one token's softmax has no gradient in q and k
                assert error(got, right) < 2e-5
            else:
                assert np.abs(got).max() < 1e-6


@pytest.mark.parametrize("G", [1, 3])
def test_groups(G, error, quick_jit):
    for got, right in zip(with_gradients(blocked, quick_jit)(*draw(67, G)), solved(*draw(67, G))):
        assert error(got, right) < 2e-5


def test_long_sequences_take_at_most_eight_blocks(monkeypatch, error, quick_jit):
    monkeypatch.setattr(heads, "BLOCK", 4)
    assert heads._blocks(43) == [(start, min(start + 6, 43)) for start in range(0, 43, 6)]
    for got, right in zip(with_gradients(blocked, quick_jit)(*draw(43)), solved(*draw(43))):
        assert error(got, right) < 2e-5


def test_all_rows_at_once_as_on_other_devices(monkeypatch, error, quick_jit):
    """The branch that `lax.platform_dependent` takes elsewhere."""
    monkeypatch.setattr(heads, "_over_rows", lambda f, *rows: jax.vmap(f)(*rows))
    for got, right in zip(with_gradients(blocked, quick_jit)(*draw(65)), solved(*draw(65))):
        assert error(got, right) < 2e-5


def test_bfloat16(error, quick_jit):
    half = [jnp.asarray(a, jnp.bfloat16) for a in draw(65)]
    got = with_gradients(blocked, quick_jit)(*half)
    assert {a.dtype for a in got} == {jnp.dtype(jnp.bfloat16)}
    for a, right in zip(got, solved(*(np.asarray(a, np.float32) for a in half))):
        assert np.sqrt(np.square(np.asarray(a, np.float64) - right).mean()) < 0.02 * right.std()


def test_large_logits_stay_finite(quick_jit):
    q, k, v, do = draw(65)
    for got in with_gradients(blocked, quick_jit)(1e3 * q, 1e3 * k, v, do):
        assert np.isfinite(got).all()


@pytest.mark.parametrize(("T", "window", "num_sinks"), [(13, 5, 0), (13, 1, 2), (131, 67, 3), (131, 29, 0)])
def test_a_window_with_sinks(T, window, num_sinks, error, quick_jit):
    attend = functools.partial(blocked, band=Band(window, num_sinks))
    for got, right in zip(with_gradients(attend, quick_jit)(*draw(T)), solved(*draw(T), window, num_sinks)):
        assert error(got, right) < 2e-5


@pytest.mark.parametrize("band", [Band(), Band(5), Band(5, 2), Band(1, 3), Band(19, 4)])
def test_number_of_positions_seen_is_the_masks(band):
    mask_TT = np.asarray(band.sees(jnp.arange(17)[:, None], jnp.arange(17)[None]))
    assert mask_TT.sum(-1).tolist() == [band.num_seen(t) for t in range(17)]


def test_a_window_of_the_whole_length_changes_nothing(quick_jit):
    whole, banded = (
        with_gradients(f, quick_jit)(*draw(65)) for f in (blocked, functools.partial(blocked, band=Band(65)))
    )
    for a, b in zip(whole, banded):
        np.testing.assert_array_equal(a, b)


def test_gradients_keep_nothing_of_squared_length(quick_jit):
    """32 heads of 512 x 512 scores are 34 MB; blocks of one kv head need a small part of it."""
    shapes = [(4, 4, 2, 512, 16), (4, 4, 512, 16), (4, 4, 512, 16)]

    def temporaries(attend):
        grad = quick_jit(jax.grad(lambda q, k, v: attend(q, k, v).sum(), argnums=(0, 1, 2)))
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return grad.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    scores = 4 * 8 * 512 * 512 * 4
    assert temporaries(plain) > scores
    assert temporaries(blocked) < scores / 5
