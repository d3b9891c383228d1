"""What every quantizing codec promises, and the errors they are known to make.

B batch, K heads, T tokens, F features.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs.floats import Fp8, Fp8Block, Half, Mx, NvFp4
from kvjax.codecs.integers import Int, IntPerChannel

T = 16  # a multiple of all that is encoded together
CODECS = {
    "f16": Half("float16"),
    "bf16": Half("bfloat16"),
    "fp8": Fp8.calibrated(5.0),
    "fp8_block": Fp8Block(),
    "mxfp8": Mx("e4m3"),
    "mxfp4": Mx("e2m1"),
    "nvfp4": NvFp4.calibrated(5.0),
    "int8": Int(8),
    "int8_asymmetric": Int(8, symmetric=False),
    "int4_g48": Int(4, channels=48),
    "int4_g48_asymmetric": Int(4, channels=48, symmetric=False),
    "int2": Int(2),
    "kivi4": IntPerChannel(4, tokens=8),
    "kivi2": IntPerChannel(2, tokens=4, residual=8),
}
each_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


@pytest.fixture(scope="module", name="x_BKTF")
def normal() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 3, T, 53)).astype(np.float32)


def stored_bits(codec, stored) -> int:
    return sum(a.size * codec.code_bits.get(name, a.dtype.itemsize * 8) for name, a in stored.items())


@each_codec
def test_bits_are_those_of_the_arrays(codec):
    for F in (1, 48, 131):
        stored = jax.eval_shape(codec.encode, jax.ShapeDtypeStruct((3, T, F), jnp.float32))
        assert codec.bits_per_value(F) == pytest.approx(stored_bits(codec, stored) / (3 * T * F), rel=1e-12)


def test_bits_of_the_published_formats():
    """Of heads of 128 channels."""
    published = {
        Fp8Block(): 8.25, Int(8): 8.125, Int(4, channels=32, symmetric=False): 5, IntPerChannel(2): 3, Fp8(): 8,
        Mx("e4m3"): 8.25, Mx("e2m1"): 4.25, Int(4): 4.125, Int(4, 64, symmetric=False): 4.5, NvFp4(np.float32(1)): 4.5,
    }  # fmt: skip
    assert {codec: codec.bits_per_value(128) for codec in published} == published


@each_codec
def test_codes_fit_their_bits(codec, x_BKTF, roundtrip):
    stored, _ = roundtrip(codec, x_BKTF)
    for name, width in codec.code_bits.items():
        assert stored[name].dtype == np.uint8
        assert stored[name].shape == x_BKTF.shape
        assert 2 ** (width - 1) <= stored[name].max() < 2**width


@each_codec
def test_neither_other_tokens_nor_other_heads_change_a_token(codec, x_BKTF, roundtrip):
    """The first of the groups of one head alone is stored bit for bit as in the midst of the others."""
    whole, decoded = roundtrip(codec, x_BKTF)
    alone, decoded_alone = roundtrip(codec, x_BKTF[1, 2, : codec.group])
    np.testing.assert_array_equal(decoded[1, 2, : codec.group], decoded_alone)
    for name, array in alone.items():
        np.testing.assert_array_equal(whole[name][1, 2, : array.shape[0]], array, err_msg=name)
    later = x_BKTF.copy()
    later[:, :, codec.group :] *= -1000
    np.testing.assert_array_equal(roundtrip(codec, later)[1][:, :, : codec.group], decoded[:, :, : codec.group])


@each_codec
def test_zeros_stay_zeros(codec, roundtrip):
    zeros = np.zeros((T, 53), np.float32)
    np.testing.assert_array_equal(roundtrip(codec, zeros)[1], zeros)


@each_codec
def test_what_an_empty_cache_holds_is_finite(codec, quick_jit):
    """Unused slots are all bits zero, and are read by zero weights."""
    stored = jax.eval_shape(codec.encode, jax.ShapeDtypeStruct((T, 53), jnp.float32))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), stored)
    assert np.isfinite(quick_jit(codec.decode, static_argnums=1)(zeros, jnp.float32)).all()


@each_codec
def test_no_number_becomes_none(codec, x_BKTF, roundtrip):
    """Tokens, channels and single elements of 1e-38 ... 1e38 beside ordinary ones."""
    sizes = np.float32([0, 1e-38, 1e-30, 1e-6, 7e4, 1e30, 1e38])
    x = x_BKTF[0, 0, :, :].copy()
    x[: len(sizes)] *= sizes[:, None]
    x[8:, : len(sizes)] *= sizes
    x[-1, -1] = 3e38
    for sign in (1, -1):
        assert np.isfinite(roundtrip(codec, sign * x)[1]).all()


@each_codec
def test_what_is_no_number_is_not_hidden(codec, x_BKTF, roundtrip):
    """A NaN is read back as NaN, and no other group of tokens is touched."""
    x = x_BKTF[0, 0].copy()
    x[-1, 20] = np.nan
    decoded = roundtrip(codec, x)[1]
    assert np.isnan(decoded[-1, 20])
    np.testing.assert_array_equal(decoded[: T - codec.group], roundtrip(codec, x_BKTF[0, 0])[1][: T - codec.group])


@each_codec
def test_bfloat16_in_and_out(codec, x_BKTF, roundtrip, quick_jit):
    """As from and to float32, but for the last rounding."""
    x = jnp.asarray(x_BKTF[0, 0], jnp.bfloat16)
    decoded = quick_jit(lambda codec, x: codec.decode(codec.encode(x), x.dtype))(codec, x)
    assert decoded.dtype == jnp.bfloat16
    expected = roundtrip(codec, np.asarray(x, np.float32))[1]
    np.testing.assert_array_equal(decoded, expected.astype(jnp.bfloat16))


@each_codec
def test_leaves_may_be_anything(codec):
    """JAX rebuilds codecs around None, shapes and tracers, which no check of the options may look at."""
    assert jax.tree.leaves(jax.tree.map(lambda _: None, codec)) == []
    assert jax.tree.structure(jax.eval_shape(lambda codec: codec, codec)) == jax.tree.structure(codec)


# Normalized mean squared errors of 1024 tokens of 128 channels, all Gaussian, and one of them 20 times as large.
ERRORS = {
    "int8": (4.2e-5, 4.1e-4),
    "fp8": (7.0e-4, 7.0e-4),
    "fp8_unscaled": (7.0e-4, 7.2e-4),
    "fp8_block": (6.6e-4, 2.6e-4),
    "mxfp8": (8.7e-4, 1.6e-3),
    "kivi4_keys": (6.2e-3, 6.3e-3),
    "nvfp4": (9.1e-3, 8.1e-3),
    "kivi4_values": (8.1e-3, 2.7e-2),
    "mxfp4": (1.3e-2, 3.1e-2),
    "int4": (1.4e-2, 6.7e-2),
    "kivi2_keys": (0.156, 0.156),
}


def formats(amax: float):
    return {
        "int8": Int(8),
        "fp8": Fp8.calibrated(amax),
        "fp8_unscaled": Fp8(),
        "fp8_block": Fp8Block(),
        "mxfp8": Mx("e4m3"),
        "kivi4_keys": IntPerChannel(4, tokens=32),
        "nvfp4": NvFp4.calibrated(amax),
        "kivi4_values": Int(4, channels=64, symmetric=False),
        "mxfp4": Mx("e2m1"),
        "int4": Int(4),
        "kivi2_keys": IntPerChannel(2, tokens=32),
    }


def noise(roundtrip, x, signal) -> dict[str, float]:
    power = lambda a: np.square(a, dtype=np.float64).sum()
    codecs = formats(np.abs(x).max())
    return {name: power(roundtrip(codec, x)[1] - x) / power(signal) for name, codec in codecs.items()}


def test_errors_are_the_known_ones(roundtrip):
    """Within 3 % on Gaussian data; within a factor of two with an outlier channel, whose size is not known."""
    x = np.random.default_rng(1).standard_normal((1024, 128)).astype(np.float32)
    assert noise(roundtrip, x, x) == pytest.approx({name: e[0] for name, e in ERRORS.items()}, rel=0.03)

    outlier = x.copy()
    outlier[:, 5] *= 20
    found = noise(roundtrip, outlier, outlier)
    for name, (_, expected) in ERRORS.items():
        assert expected / 2 < found[name] < expected * 2, name

    # A constant in one channel: only scales along time leave it out of the other channels' errors.
    biased = x.copy()
    biased[:, 5] += 100
    found = noise(roundtrip, biased, x)
    for name in ("kivi4_keys", "kivi2_keys"):
        assert found[name] == pytest.approx(ERRORS[name][0], rel=0.03)
    for name in ("int8", "fp8", "fp8_unscaled", "mxfp8", "nvfp4", "kivi4_values", "mxfp4", "int4"):
        assert found[name] > 10 * ERRORS[name][0], name
