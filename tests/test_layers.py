"""The plain layers against hand-solved numbers and NumPy in float64.

B batch, N heads, T tokens, H features.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import primer
from kvjax.layers import MLP, RMSNorm, dropout, normal, rotate, subkey

LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@LAYOUTS
def test_rotation_by_hand(interleaved):
    """theta = 4 and four features: at position 2, pair 0 turns by 2 and pair 1 by 2 / sqrt(4) = 1."""
    y = rotate(jnp.array([[1.0, 2.0, 3.0, 4.0]]), jnp.array([2]), 4.0, interleaved)[0]
    turn = lambda a, b, angle: (
        a * math.cos(angle) - b * math.sin(angle),
        b * math.cos(angle) + a * math.sin(angle),
    )
    if interleaved:
        expected = [*turn(1, 2, 2), *turn(3, 4, 1)]
    else:
        (a, c), (b, d) = turn(1, 3, 2), turn(2, 4, 1)
        expected = [a, b, c, d]
    np.testing.assert_allclose(y, expected, atol=1e-6)


@LAYOUTS
@pytest.mark.parametrize("heads", [(), (3,), (3, 2)], ids=["shared", "heads", "groups"])
def test_rotation_of_rows_with_their_own_positions(interleaved, heads, error):
    x = draw(2, *heads, 7, 10)
    positions_BT = np.array([[0, 1, 2, 3, 4, 5, 6], [5, 98, 3, 41, 0, 17, 60]], np.int32)
    y = rotate(jnp.asarray(x), jnp.asarray(positions_BT), 101.0, interleaved)
    rows = zip(x.astype(np.float64), positions_BT)
    assert error(y, np.stack([primer.rope(row, p, 101.0, interleaved) for row, p in rows])) < 1e-5


def test_rotation_angles_are_float32_in_bfloat16(error):
    x_TH, positions_T = jnp.asarray(draw(7, 10), jnp.bfloat16), np.arange(1000, 1007)
    y_TH = rotate(x_TH, jnp.asarray(positions_T), 10_000.0)
    assert y_TH.dtype == jnp.bfloat16
    assert error(y_TH, primer.rope(np.asarray(x_TH, np.float64), positions_T, 10_000.0)) < 0.02


@LAYOUTS
def test_padding_is_not_rotated(interleaved):
    x_TH = jnp.asarray(draw(3, 10))
    assert (rotate(x_TH, jnp.array([-1, -1, -1]), 10_000.0, interleaved) == x_TH).all()


def test_rms_norm(error):
    """rms([3, 4]) = sqrt(12.5); then against the oracle, in both dtypes, at rows of any size."""
    norm = RMSNorm(2)
    np.testing.assert_allclose(norm(jnp.array([3.0, 4.0])), np.array([3, 4]) / math.sqrt(12.5), rtol=1e-6)
    norm = RMSNorm(11)
    norm.gain_H[...] = jnp.asarray(draw(11))
    x = draw(2, 3, 11) * np.array([1e-3, 1, 1e3], np.float32)[:, None]
    expected = primer.rms_norm(x.astype(np.float64), draw(11).astype(np.float64))
    assert error(norm(jnp.asarray(x)), expected) < 1e-6
    y = norm(jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert error(y, expected) < 0.03
    assert (norm(jnp.zeros((1, 11))) == 0).all()


def test_mlp(error, quick_jit):
    mlp = quick_jit(lambda: MLP(7, 13, 1.0, jax.random.key(0)))()
    x = draw(2, 3, 7).astype(np.float64)
    gate, up = np.split(x @ np.asarray(mlp.gate_up_DE[...], np.float64), 2, axis=-1)
    expected = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(mlp.down_FD[...], np.float64)
    assert error(mlp(jnp.asarray(x, jnp.float32)), expected) < 2e-6


def test_initial_weights_have_the_declared_spread():
    weights = np.asarray(normal(jax.random.key(0), (101, 103), 101, 0.5)[...])
    assert weights.dtype == np.float32
    assert abs(weights.mean()) < 4 * 0.5 / math.sqrt(101 * weights.size)
    assert weights.std() == pytest.approx(0.5 / math.sqrt(101), rel=0.03)


def test_subkeys_go_by_the_crc32_of_their_name():
    """0xCBF43926 is the published check value of CRC-32: keys must not change between processes."""
    key = jax.random.key(7)
    assert subkey(key, "123456789") == jax.random.fold_in(key, 0xCBF43926)
    assert subkey(key, "a") != subkey(key, "b")


def test_dropout():
    x, key = jnp.asarray(1 + np.abs(draw(101, 103))), jax.random.key(0)
    y = dropout(x, 0.25, key)
    kept = np.asarray(y != 0)
    assert kept.mean() == pytest.approx(0.75, abs=0.02)
    np.testing.assert_allclose(y[kept], x[kept] / 0.75, rtol=1e-6)
    assert y.mean() == pytest.approx(float(x.mean()), rel=0.03)
    assert dropout(x.astype(jnp.bfloat16), 0.25, key).dtype == jnp.bfloat16
    assert (dropout(x, 0.25, jax.random.key(1)) != y).any()


def test_dropout_is_off_without_a_key_or_a_rate():
    x = jnp.asarray(draw(3, 5))
    assert dropout(x, 0.25, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x
