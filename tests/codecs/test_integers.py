"""Integer formats: vectors encoded by hand, and the formats' definitions in NumPy.

T tokens, F features.
"""

import numpy as np
import pytest

from kvjax.codecs.integers import Int, IntPerChannel


@pytest.fixture
def check(roundtrip):
    """Function to compare what tokens become with what they should, by hand."""

    def compare(codec, x, stored, decoded):
        actual, actual_decoded = roundtrip(codec, np.float32(x))
        assert actual.keys() == stored.keys()
        for name, expected in stored.items():
            bits = np.uint8(expected) if name == "code" else np.float16(expected).view(np.uint16)
            np.testing.assert_array_equal(actual[name], bits, err_msg=name)
        np.testing.assert_array_equal(actual_decoded, np.float32(decoded))

    return compare


def test_symmetric_by_hand(check):
    """Scales 254 / 127 and 1 / 2 for 8 bits, ties to even; codes are offset by 8 and 2 for the others."""
    x = [[254, -254, 3, 5, -1], [63.5, 0.25, 0.75, -0.5, -63.5]]
    code = [[127, 256 - 127, 2, 2, 0], [127, 0, 2, 255, 256 - 127]]
    decoded = [[254, -254, 4, 4, 0], [63.5, 0, 1, -0.5, -63.5]]
    check(Int(8), x, {"code": code, "scale": [[2.0], [0.5]]}, decoded)
    check(Int(4), [[14, -14, 3, 1]], {"code": [[15, 1, 10, 8]], "scale": [[2.0]]}, [[14, -14, 4, 0]])
    check(Int(2), [[3, -3, 1.5, 2]], {"code": [[3, 1, 2, 3]], "scale": [[3.0]]}, [[3, -3, 0, 3]])


def test_symmetric_blocks_by_hand(check):
    """Five channels, two to a scale."""
    stored = {"code": [[15, 8, 1, 8, 15]], "scale": [[1.0, 2.0, 4.0]]}
    check(Int(4, channels=2), [[7, 0, -14, 1, 28]], stored, [[7, 0, -14, 0, 28]])


def test_asymmetric_by_hand(check):
    """Two blocks of three: 10 ... 25 by 1, and the shorter one -6 ... 24 by 2; no zero that fills up counts."""
    stored = {"code": [[0, 15, 2, 0, 15]], "scale": [[1.0, 2.0]], "zero": [[10.0, -6.0]]}
    check(Int(4, channels=3, symmetric=False), [[10, 25, 12.5, -6, 24]], stored, [[10, 25, 12, -6, 24]])
    stored = {"code": [[0, 3, 1]], "scale": [[1.0]], "zero": [[-1.0]]}
    check(Int(2, symmetric=False), [[-1, 2, 0.25]], stored, [[-1, 2, 0]])


def test_per_channel_by_hand(check):
    """Two groups of two tokens, two channels: each channel has its own scale and zero point in each group."""
    x = [[0, 100], [15, 130], [-8, 5], [7, 5]]
    stored = {
        "code": [[0, 0], [15, 15], [0, 0], [15, 0]],
        "scale": [[1, 2], [1, 2.0**-24]],
        "zero": [[0, 100], [-8.0, 5]],
    }
    check(IntPerChannel(4, tokens=2), x, stored, x)


def test_the_rounded_scale_divides(check):
    """2000 / 127 is 15.748..., as float16 15.75: 118.1 is 7.498 of those, and 7.4994 of the exact ones; 118.115 not."""
    x = np.float32([[2000, 118.115]])
    assert np.rint(x[0, 1] / (2000 / 127)) == 8
    check(Int(8), x, {"code": [[127, 7]], "scale": [[15.75]]}, [[127 * 15.75, 7 * 15.75]])


def test_scales_of_almost_nothing_and_of_too_much(check):
    """The smallest and the largest float16 stand for what is beyond."""
    check(Int(8), [[0, 0], [1e-30, 0]], {"code": [[0, 0]] * 2, "scale": [[2.0**-24]] * 2}, [[0, 0]] * 2)
    top = 127 * 65504
    check(Int(8), [[1e30, -1e30]], {"code": [[127, 129]], "scale": [[65504.0]]}, [[top, -top]])
    stored = {"code": [[0, 15]], "scale": [[65504.0]], "zero": [[-65504.0]]}
    check(Int(4, symmetric=False), [[-1e30, 1e30]], stored, [[-65504, 14 * 65504]])


def numpy_symmetric(x, bits):
    """Codes and scale of one block."""
    top = 2 ** (bits - 1) - 1
    scale = max(np.float16(np.abs(x).max() / np.float32(top)), np.float16(2.0**-24))
    q = np.clip(np.rint(x / np.float32(scale)), -top, top)
    return q, scale, np.float16(0)


def numpy_asymmetric(x, bits):
    """Codes, scale and zero point of one block."""
    top = 2**bits - 1
    scale = max(np.float16((x.max() - x.min()) / np.float32(top)), np.float16(2.0**-24))
    zero = np.float16(x.min())
    return np.clip(np.rint((x - np.float32(zero)) / np.float32(scale)), 0, top), scale, zero


def in_blocks(x, block, encode, bits):
    """Codes `[T, F]`, scales and zero points `[T, N]` of blocks of channels, by plain loops."""
    codes, scales, zeros = np.empty(x.shape), [], []
    for t, x_F in enumerate(x):
        parts = [encode(x_F[start : start + block], bits) for start in range(0, len(x_F), block)]
        codes[t] = np.concatenate([part[0] for part in parts])
        scales.append([part[1] for part in parts])
        zeros.append([part[2] for part in parts])
    return codes, np.float16(scales), np.float16(zeros)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("features, channels", [(7, None), (131, 32), (96, 16), (5, 64)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_channels_follow_the_definition(bits, features, channels, symmetric, roundtrip):
    """Codes, scales and zero points bit for bit, of tokens of six orders of magnitude and with means."""
    rng = np.random.default_rng(features)
    x = ((rng.standard_normal((11, features)) + 1) * 10 ** rng.uniform(-3, 3, (11, 1))).astype(np.float32)
    encode = numpy_symmetric if symmetric else numpy_asymmetric
    q, scale, zero = in_blocks(x, channels or features, encode, bits)
    codec = Int(bits, channels, symmetric)
    stored, decoded = roundtrip(codec, x)
    if not symmetric:
        np.testing.assert_array_equal(stored["zero"], zero.view(np.uint16))
        offset = 0
    else:
        offset = {8: 0, 4: 8, 2: 2}[bits]
    np.testing.assert_array_equal(stored["scale"], scale.view(np.uint16))
    np.testing.assert_array_equal(stored["code"], (q + offset).astype(np.int64) % 256)
    over = lambda a: np.repeat(a.astype(np.float64), channels or features, axis=-1)[:, :features]
    np.testing.assert_array_equal(decoded, (q * over(scale) + over(zero)).astype(np.float32))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_time_follows_the_definition(bits, roundtrip):
    """Three groups of eight tokens, channels with means that are a hundred times their spread."""
    rng = np.random.default_rng(bits)
    x = (rng.standard_normal((2, 24, 13)) + 100 * rng.standard_normal(13)).astype(np.float32)
    codec = IntPerChannel(bits, tokens=8, residual=24)
    stored, decoded = roundtrip(codec, x)
    for b in range(2):
        q, scale, zero = in_blocks(x[b].T, 8, numpy_asymmetric, bits)
        np.testing.assert_array_equal(stored["code"][b], q.T)
        np.testing.assert_array_equal(stored["scale"][b], scale.T.copy().view(np.uint16))
        np.testing.assert_array_equal(stored["zero"][b], zero.T.copy().view(np.uint16))
        over = lambda a: np.repeat(a.T.astype(np.float64), 8, axis=0)
        np.testing.assert_array_equal(decoded[b], (q.T * over(scale) + over(zero)).astype(np.float32))


def test_tokens_encoded_together():
    assert Int(4).group == 1
    assert IntPerChannel(4).group == 32
    assert IntPerChannel(2, tokens=16, residual=128).group == 128


def test_options_that_cannot_be():
    for kind in (Int, IntPerChannel):
        with pytest.raises(ValueError, match="bits=3 must be 8, 4 or 2; nearest: 4"):
            kind(3)
    with pytest.raises(ValueError, match="channels=0 must be at least 1"):
        Int(channels=0)
    with pytest.raises(ValueError, match="tokens=0 must be at least 1"):
        IntPerChannel(tokens=0)
    with pytest.raises(ValueError, match="residual=0 must be at least 1"):
        IntPerChannel(residual=0)
    with pytest.raises(ValueError, match="residual=100 must be a multiple of tokens=32; nearest tokens: 25"):
        IntPerChannel(residual=100)
