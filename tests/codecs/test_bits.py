"""Every code of every format, and encoding at and beside every tie, against the casts of ml_dtypes and NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kvjax.codecs import bits

BYTES, WORDS = np.arange(256, dtype=np.uint8), np.arange(65536, dtype=np.uint16)
FORMATS = {  # decode, encode, every code, as NumPy sees them, largest value
    "e4m3": (bits.e4m3_decode, bits.e4m3_encode, BYTES, ml_dtypes.float8_e4m3fn, 448.0),
    "e2m1": (bits.e2m1_decode, bits.e2m1_encode, BYTES[:16], ml_dtypes.float4_e2m1fn, 6.0),
    "f16": (bits.f16_decode, bits.f16_encode, WORDS, np.float16, 65504.0),
    "bf16": (bits.bf16_decode, bits.bf16_encode, WORDS, ml_dtypes.bfloat16, 2.0**127 * (2 - 2.0**-7)),
}


def same(actual, expected):
    """Bit for bit, but for the bits of a NaN."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(actual[numbers].view(np.uint32), expected[numbers].view(np.uint32))


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_decodes_as_numpy_casts_it(name):
    decode, _, codes, dtype, _ = FORMATS[name]
    same(jax.jit(decode)(codes), codes.view(dtype).astype(np.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_tie_and_neighbour_encodes_as_numpy_casts_it(name):
    _, encode, codes, dtype, top = FORMATS[name]
    with np.errstate(invalid="ignore"):
        values = codes.view(dtype).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    assert values[-1] == top
    ties = (values[1:] + values[:-1]) / 2
    beyond = top * np.array([1 + 2.0**-20, 1.01, 1.0625, 1.5]), np.array([1e30, np.inf])
    exact = np.concatenate([values, ties, *beyond, *(-b for b in beyond)])
    with np.errstate(over="ignore"):
        exact = exact.astype(np.float32)
        grid = np.concatenate([exact, np.nextafter(exact, np.inf), np.nextafter(exact, -np.inf)])
        grid = grid.astype(np.float32)
    grid = grid[~(np.abs(grid) < np.finfo(np.float32).tiny) | (grid == 0)]  # XLA:CPU flushes subnormals
    expected = np.clip(grid, -top, top).astype(dtype).view(codes.dtype)
    np.testing.assert_array_equal(jax.jit(encode)(grid), expected)


@pytest.mark.parametrize("name", ["e4m3", "f16", "bf16"])
def test_nan_stays_nan(name):
    decode, encode, *_ = FORMATS[name]
    assert np.isnan(jax.jit(lambda x: decode(encode(x)))(jnp.float32(jnp.nan)))


def test_ties_of_e2m1_by_hand():
    """The seven thresholds and where they go, and the signs."""
    x = np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -5, 1e9])
    codes = [0, 2, 2, 4, 4, 6, 6, 8, 10, 14, 7]
    np.testing.assert_array_equal(bits.e2m1_encode(x), np.uint8(codes))
    np.testing.assert_array_equal(
        bits.e2m1_decode(np.arange(8, dtype=np.uint8)), np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    )


def test_every_power_of_two_of_e8m0():
    same(jax.jit(bits.e8m0_decode)(BYTES), BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))


@pytest.mark.parametrize("emax", [2, 8])
def test_exponents_of_e8m0_round_down(emax):
    """floor(log2) by frexp, at every power of two and right below it."""
    powers = 2.0 ** np.arange(-126, 128).astype(np.float32)
    amax = np.concatenate([powers, np.nextafter(powers[1:], np.float32(0)), powers * np.float32(1.5)])
    expected = np.maximum(np.frexp(amax)[1] - 1 - emax + 127, 1)
    np.testing.assert_array_equal(jax.jit(bits.e8m0_encode, static_argnums=1)(amax, emax), expected)


def test_e8m0_of_what_has_no_logarithm():
    codes = bits.e8m0_encode(np.float32([0, np.inf, np.nan]), 2)
    np.testing.assert_array_equal(codes, np.uint8([1, 255, 255]))


def test_blocks_of_channels():
    """Five channels in blocks of two: three scales, and the last block is shorter."""
    x = np.float32([[1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(bits.blocks(x, 2), np.float32([[[1, 2], [3, 4], [5, 0]]]))
    np.testing.assert_array_equal(bits.blocks(x, 2, "edge"), np.float32([[[1, 2], [3, 4], [5, 5]]]))
    np.testing.assert_array_equal(bits.joined(bits.blocks(x, 2), 5), x)
    scale, zero = np.float32([[10, 100, 1000]]), np.float32([[1, 2, 3]])
    np.testing.assert_array_equal(bits.rescaled(x, scale, 2), np.float32([[10, 20, 300, 400, 5000]]))
    np.testing.assert_array_equal(bits.rescaled(x, scale, 2, zero), np.float32([[11, 21, 302, 402, 5003]]))
