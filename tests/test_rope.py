"""Rotary frequencies against hand-solved cases."""

import math

import numpy as np
import pytest

from kvjax.rope import RopeScaling, frequencies


def test_plain_frequencies_by_hand():
    np.testing.assert_allclose(frequencies(10_000.0, 8), [1.0, 0.1, 0.01, 0.001], rtol=1e-6)


def test_linear_scaling_turns_slower():
    np.testing.assert_allclose(frequencies(100.0, 4, RopeScaling("linear", 4.0)), [0.25, 0.025], rtol=1e-6)


def test_llama3_keeps_fast_pairs_and_slows_slow_ones():
    """In 200 pi positions the frequencies 1, 0.1, 0.01, 0.001 make 100, 10, 1, 0.1 turns; the ramp is 1 to 19."""
    scaling = RopeScaling("llama3", 8.0, 628, low_freq_factor=1.0, high_freq_factor=19.0)
    turns = 628 * 0.1 / (2 * math.pi)
    kept = (turns - 1) / 18
    expected = [1.0, 0.1 * kept + 0.1 / 8 * (1 - kept), 0.01 / 8, 0.001 / 8]
    np.testing.assert_allclose(frequencies(10_000.0, 8, scaling), expected, rtol=1e-6)


def test_yarn_ramps_over_pairs():
    """Pair j of 8 turns 2^-j radians: 2^7 / pi positions make 2^6 / pi^2 ... turns; ends by hand: pairs 2 and 5."""
    theta, length = 2.0**8, 512
    turns_of = lambda pair: length * 2.0**-pair / (2 * math.pi)
    ends = {"beta_fast": turns_of(2), "beta_slow": turns_of(5)}
    scaling = RopeScaling("yarn", 4.0, length, **ends, magnitude=1.0, truncate=False)
    kept = np.array([1, 1, 1, 2 / 3, 1 / 3, 0, 0, 0])
    plain = 2.0 ** -np.arange(8)
    expected = plain * kept + plain / 4 * (1 - kept)
    np.testing.assert_allclose(frequencies(theta, 16, scaling), expected, rtol=1e-5)
    wider = RopeScaling("yarn", 4.0, length, beta_fast=turns_of(2.5), beta_slow=turns_of(4.5), magnitude=1.0)
    np.testing.assert_allclose(frequencies(theta, 16, wider), expected, rtol=1e-5)  # rounded outwards


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "yarm", "factor": 2.0}, "rope_scaling.kind='yarm' is unknown; did you mean 'yarn'?"),
        ({"kind": "linear", "factor": 0.5}, "rope_scaling.factor=0.5 must be at least 1.0"),
        ({"kind": "linear", "factor": 2.0, "beta_fast": 3.0}, "rope_scaling.beta_fast=3.0 must be left out with"),
        ({"kind": "llama3", "factor": 2.0}, "rope_scaling.high_freq_factor=None must be given with kind='llama3'"),
        (
            {"kind": "llama3", "factor": 2.0, "original_len": 9, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "rope_scaling.low_freq_factor=4.0 must be below high_freq_factor=4.0",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError) as error:
        RopeScaling(**fields)
    assert str(error.value).startswith(message)
