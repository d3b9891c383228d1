"""Rotary frequencies, and the ways to stretch them to longer texts.

H features of a head, of which H / 2 pairs turn.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvjax.checks import at_least, one_of, positive

FIELDS = {
    "linear": (),
    "llama3": ("low_freq_factor", "high_freq_factor", "original_len"),
    "yarn": ("beta_fast", "beta_slow", "original_len", "magnitude"),
}
"""Fields that each kind takes besides its factor, all of them needed."""


@dataclass(frozen=True)
class RopeScaling:
    """A rule that slows rotary frequencies down, as pretrained models name it."""

    kind: Literal["linear", "llama3", "yarn"]
    """linear: all frequencies (Chen et al. 2023); llama3: long wavelengths (Llama 3.1); yarn: Peng et al. 2023."""
    factor: float
    """How much slower the slowed frequencies turn."""
    original_len: int | None = None
    """Context of the training before; wavelengths are judged by the turns they make in it."""
    low_freq_factor: float | None = None
    """llama3: frequencies of fewer turns are slowed wholly."""
    high_freq_factor: float | None = None
    """llama3: frequencies of more turns stay."""
    beta_fast: float | None = None
    """yarn: frequencies of more turns stay."""
    beta_slow: float | None = None
    """yarn: frequencies of fewer turns are slowed wholly."""
    truncate: bool = True
    """yarn: the two ends of the ramp are rounded outwards to whole pairs."""
    magnitude: float | None = None
    """yarn: what rotated features are multiplied by (its attention factor)."""

    def __post_init__(self):
        one_of("rope_scaling.kind", self.kind, FIELDS)
        at_least("rope_scaling.factor", self.factor, 1.0)
        known = {name for names in FIELDS.values() for name in names}
        for name in sorted(known):
            value, needed = getattr(self, name), name in FIELDS[self.kind]
            if needed != (value is not None):
                rule = "must be given" if needed else "must be left out"
                raise ValueError(f"rope_scaling.{name}={value} {rule} with kind={self.kind!r}")
            if value is not None:
                positive(f"rope_scaling.{name}", value)
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if high in FIELDS[self.kind] and not getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"rope_scaling.{low}={getattr(self, low)} must be below {high}={getattr(self, high)}"
                )


def frequencies(theta: float, features: int, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians a position of every pair, float32 `[H / 2]`: theta^(-2j / H) (Su et al. 2021), scaled."""
    if scaling is not None and scaling.kind == "yarn" and theta <= 1.0:
        raise ValueError(f"rope_theta={theta} must be above 1 with YaRN, whose ramp divides by its logarithm")
    pairs = np.arange(features // 2)
    plain = theta ** (-2.0 * pairs / features)
    if scaling is None:
        return plain.astype(np.float32)
    slow = plain / scaling.factor
    if scaling.kind == "linear":
        return slow.astype(np.float32)
    length = scaling.original_len
    assert length is not None
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        assert low is not None and high is not None
        kept = np.clip((length * plain / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
    else:
        # The ramp is linear in the pair's number, not in its turns.
        pair_of = lambda turns: features * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, features - 1)
        kept = 1.0 - np.clip((pairs - first) / (last - first or 0.001), 0.0, 1.0)
    return (plain * kept + slow * (1.0 - kept)).astype(np.float32)
