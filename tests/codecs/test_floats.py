"""Float formats: vectors encoded by hand, and the formats' definitions in NumPy with the casts of ml_dtypes.

T tokens, F features.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kvjax.codecs.floats import Fp8, Fp8Block, Half, Mx, NvFp4

E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
T = 11


@pytest.fixture
def check(roundtrip):
    """Function to compare what one token's channels become with what they should, by hand."""

    def compare(codec, x, stored, decoded):
        actual, actual_decoded = roundtrip(codec, np.float32([x]))
        assert actual.keys() == stored.keys()
        for name, expected in stored.items():
            np.testing.assert_array_equal(actual[name], [expected], err_msg=name)
        np.testing.assert_array_equal(actual_decoded, np.float32([decoded]))

    return compare


def test_halves_by_hand(check):
    x = [1, -2, 1 + 2.0**-11, 1 + 2.0**-8, 1e30, 2.0**-24]
    f16 = [0x3C00, 0xC000, 0x3C00, 0x3C04, 0x7BFF, 0x0001]
    check(Half("float16"), x, {"code": f16}, [1, -2, 1, 1 + 2.0**-8, 65504, 2.0**-24])
    bf16 = [0x3F80, 0xC000, 0x3F80, 0x3F80, 0x714A, 0x3380]
    check(Half("bfloat16"), x, {"code": bf16}, [1, -2, 1, 1, 202 * 2.0**92, 2.0**-24])


def test_fp8_by_hand(check):
    codec = Fp8(jnp.float32(2))
    check(codec, [2, -3, -896, 1e30, 2.0**-8], {"code": [0x38, 0xBC, 0xFE, 0x7E, 1]}, [2, -3, -896, 896, 2.0**-8])
    check(Fp8.calibrated(896), [896, 1], {"code": [0x7E, 0x30]}, [896, 1])


def test_fp8_blocks_by_hand(check):
    """Blocks of two, the last one shorter, one of zeros and one whose scale would be a subnormal."""
    x = [896, 3, 0, 0, 1e-37, 0, -56]
    stored = {"code": [0x7E, 0x3C, 0, 0, 0, 0, 0xFE], "scale": [2, 1, 1, 0.125]}
    check(Fp8Block(block=2), x, stored, [896, 3, 0, 0, 0, 0, -56])


def test_mx_by_hand(check):
    """Of 7 the exponent is 2 and the scale 2^0; of 24 it is 4 and the scale 2^2; of 500 it is 8, of 1000 it is 9."""
    x = [4, 7, 0.75, -5, 24, -10, 0, 2]
    stored = {"code": [6, 7, 2, 14, 7, 12, 0, 1], "scale": [127, 129]}
    check(Mx("e2m1", block=4), x, stored, [4, 6, 1, -4, 24, -8, 0, 2])
    stored = {"code": [0x7E, 0x38, 0x7E, 0xB8], "scale": [127, 128]}
    check(Mx("e4m3", block=2), [500, 1, 1000, -2], stored, [448, 1, 896, -2])


def test_nvfp4_by_hand(check):
    """Scales 12 / (6 / 2) = 4, of zeros 1, and 10 / 3, which E4M3 rounds to 3.25: 4.1 is 2.52 of those, not 2.46."""
    x = [12, 1, -7] + 13 * [0] + 16 * [0] + [10, 4.1]
    code = [7, 1, 14] + 29 * [0] + [7, 5]
    decoded = [12, 1, -8] + 29 * [0] + [9.75, 4.875]
    check(NvFp4(jnp.float32(0.5)), x, {"code": code, "scale": [0x48, 0x38, 0x45]}, decoded)


def test_nvfp4_scale_bounds(check):
    """A block far below the calibrated range has the least scale, one beyond it the largest and saturates."""
    x = [2.0**-9, 2.0**-20] + 14 * [0] + [6 * 448, 1e30]
    decoded = [2.0**-9] + 15 * [0] + [6 * 448] * 2
    stored = {"code": [2] + 15 * [0] + [7, 7], "scale": [0x01, 0x7E]}
    check(NvFp4(jnp.float32(1)), x, stored, decoded)


def test_nvfp4_calibration():
    assert NvFp4.calibrated(6 * 448).tensor_scale == 1
    assert NvFp4.calibrated(3 * 448, headroom=4).tensor_scale == 2
    assert Fp8.calibrated(np.float32(56)).scale == 0.125


def in_blocks(x_TF, block, encode_block):
    """Codes of each token, and scales of each block, by plain loops."""
    codes, scales = np.empty(x_TF.shape, np.uint8), []
    for t, x_F in enumerate(x_TF):
        scales.append([])
        for start in range(0, len(x_F), block):
            code, scale = encode_block(x_F[start : start + block])
            codes[t, start : start + block] = code
            scales[t].append(scale)
    return {"code": codes, "scale": np.asarray(scales)}


def fp8_block(x):
    scale = np.abs(x).max() / np.float32(448)
    return np.clip(x / scale, -448, 448).astype(E4M3).view(np.uint8), scale


def mx_block(element, emax, top):
    def encode(x):
        exponent = np.frexp(np.abs(x).max())[1] - 1 - emax
        scale = np.float32(2.0**exponent).astype(ml_dtypes.float8_e8m0fnu)
        return np.clip(x / scale.astype(np.float32), -top, top).astype(element).view(np.uint8), scale.view(
            np.uint8
        )

    return encode


def nvfp4_block(tensor_scale):
    def encode(x):
        wanted = np.abs(x).max() / (np.float32(6) * tensor_scale)
        scale = np.clip(wanted, 2.0**-9, 448).astype(E4M3)
        code = np.clip(x / (scale.astype(np.float32) * tensor_scale), -6, 6).astype(E2M1)
        return code.view(np.uint8), scale.view(np.uint8)

    return encode


NVFP4 = NvFp4.calibrated(1e3)
DEFINITIONS = {
    "fp8_block": (Fp8Block(), 128, fp8_block, E4M3),
    "fp8_block_of_40": (Fp8Block(block=40), 40, fp8_block, E4M3),
    "mxfp8": (Mx("e4m3"), 32, mx_block(E4M3, 8, 448), E4M3),
    "mxfp4": (Mx("e2m1"), 32, mx_block(E2M1, 2, 6), E2M1),
    "nvfp4": (NVFP4, 16, nvfp4_block(NVFP4.tensor_scale), E2M1),
}


@pytest.mark.parametrize("features", [7, 131, 160])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_blocks_follow_the_definition(name, features, roundtrip):
    """Bit for bit, of tokens whose sizes differ by six orders of magnitude."""
    codec, block, encode_block, element = DEFINITIONS[name]
    rng = np.random.default_rng(features)
    x_TF = rng.standard_normal((T, features)) * 10 ** rng.uniform(-3, 3, (T, 1))
    x_TF = x_TF.astype(np.float32)
    expected = in_blocks(x_TF, block, encode_block)
    stored, decoded_TF = roundtrip(codec, x_TF)
    for field, array in expected.items():
        np.testing.assert_array_equal(stored[field], array, err_msg=field)

    scale = expected["scale"]
    if scale.dtype == np.uint8:
        scale = scale.view(ml_dtypes.float8_e8m0fnu if "mx" in name else E4M3).astype(np.float32)
    if name == "nvfp4":
        scale = scale * NVFP4.tensor_scale
    scale_TF = np.repeat(scale, block, axis=-1)[:, :features]
    np.testing.assert_array_equal(decoded_TF, expected["code"].view(element).astype(np.float32) * scale_TF)


def test_calibrated_scales_are_leaves(quick_jit):
    """One program serves every calibration."""
    compiled = []

    def roundtrip(codec, x):
        compiled.append(type(codec))
        return codec.decode(codec.encode(x), jnp.float32)

    jitted, x = quick_jit(roundtrip), np.full((1, 16), 5.0, np.float32)
    for kind, scale in ((Fp8, "scale"), (NvFp4, "tensor_scale")):
        small, large = (jitted(kind(**{scale: jnp.float32(s)}), x)[0, 0] for s in (2.0**-13, 1.0))
        assert small < 1  # saturated
        assert abs(large - 5) <= 1
    assert compiled == [Fp8, NvFp4]


def test_options_that_cannot_be():
    with pytest.raises(ValueError, match=r"kind='float61' is unknown; did you mean 'float16'\?"):
        Half("float61")
    with pytest.raises(ValueError, match="element='e5m2' is unknown; choose from e2m1, e4m3"):
        Mx("e5m2")
    for kind in (lambda block: Mx("e2m1", block), Fp8Block):
        with pytest.raises(ValueError, match="block=0 must be at least 1"):
            kind(0)
    for calibrated in (Fp8.calibrated, NvFp4.calibrated):
        for amax in (0.0, -3.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"amax={amax} must be"):
                calibrated(amax)
    for headroom in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match=r"headroom=.* must be"):
            NvFp4.calibrated(1.0, headroom=headroom)
