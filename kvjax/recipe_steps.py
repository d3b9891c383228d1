"""One step of a codec's text: a map or a format, with its options (`kvjax.recipes` tells them all)."""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from kvjax.checks import between, one_of, positive
from kvjax.codecs.base import Codec, Exact
from kvjax.codecs.fit import KINDS
from kvjax.codecs.floats import Fp8, Fp8Block, Half, Mx, NvFp4
from kvjax.codecs.integers import Int, IntPerChannel

HEADROOM = 1.25
"""What calibrated scales leave by default above the largest value that calibration saw."""

Options = dict[str, type]
_INT: Options = {"g": int, "asym": bool, "channel": int, "r": int}
_FITTED: Options = {"nomean": bool, "joint": bool, "rest": bool, "all": bool}
FORMATS: dict[str, Options] = {
    **{name: {} for name in ("exact", "bf16", "fp16", "mxfp8", "mxfp4")},
    **{name: _INT for name in ("int8", "int4", "int2")},
    "fp8": {"scale": float, "b": int, "h": float},
    "nvfp4": {"h": float},
}
MAPS: dict[str, Options] = {
    **{kind: _FITTED for kind in KINDS},
    "random": _FITTED | {"seed": int},
    "hadamard": {},
    "haar": {"seed": int},
}
_STEPS = FORMATS | MAPS  # options in the order of the canonical text
_DEFAULTS = {"seed": 0, "h": HEADROOM}
_EXCLUSIVE = (("g", "channel"), ("asym", "channel"), ("scale", "b"), ("scale", "h"), ("b", "h"), ("rest", "all"))
_NUMBERS = {bool: "", int: r"\d+", float: r"\d+(\.\d+)?(e-\d+)?"}


@dataclass(frozen=True)
class Step:
    """A map or a format, with those of its options that are not the default."""

    name: str
    size: str = ""
    """Of a fitted map: its rank, as 48 or 75%; empty if a budget decides."""
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def text(self) -> str:
        """As it is written."""
        written = (option if value is True else f"{option}{_plain(value)}" for option, value in self.options)
        return ":".join([self.name + self.size, *written])

    def get(self, option: str) -> Any:
        """An option's value, or its default, or None."""
        return dict(self.options).get(option, _DEFAULTS.get(option))

    def has(self, option: str) -> bool:
        """Whether an option is given, and not its default."""
        return option in dict(self.options)

    @property
    def fitted(self) -> bool:
        """Whether it is a map that statistics decide."""
        return self.name in KINDS

    @property
    def calibrated(self) -> bool:
        """Whether it is a format whose scale statistics decide."""
        return self.name == "nvfp4" or (self.name == "fp8" and not self.has("scale") and not self.has("b"))

    def rank(self, features: int) -> int:
        """Dimensions of so many; a percentage is rounded to the nearest, halves up, and at least 1."""
        return max(1, math.floor(amount(self.size, features) + Fraction(1, 2)))


def step_of(text: str) -> Step:
    """The step that a text such as `pca75%:joint` or `int4:g32` describes; ValueError by its rules."""
    head, *given = text.split(":")
    letters = _letters(head)
    name, size = (head, "") if head in FORMATS or letters not in MAPS else (letters, head[len(letters) :])
    one_of("codec", name, _STEPS)
    if size and name not in KINDS:
        raise ValueError(f"{head} must have no rank; nearest: {name}")
    step = Step(name, amount_text("rank", size, 100) if size else "", _options(name, given))
    if name in FORMATS:
        codec_of(step)  # has rules of its own
    return step


def codec_of(step: Step, amax: float = 1.0) -> Codec:
    """A format's codec, calibrated ones for values up to `amax` times their headroom; ValueError by its rules."""
    name, get = step.name, step.get
    if name in ("bf16", "fp16"):
        return Half("bfloat16" if name == "bf16" else "float16")
    if name in ("int8", "int4", "int2"):
        bits: Any = int(name[3:])
        if step.has("channel"):
            return IntPerChannel(bits, get("channel"), get("r"))
        if step.has("r"):
            raise ValueError(f"r{get('r')} must go with scales along time, as {name}:channel32:r128")
        return Int(bits, get("g"), not step.has("asym"))
    if step.has("b"):
        return Fp8Block(get("b"))
    if step.has("scale"):
        between("scale", get("scale"), 1e-30, 1e30)
        return Fp8(np.float32(get("scale")))
    if step.calibrated:
        positive("headroom h", get("h"))
        largest = get("h") * amax
        return NvFp4.calibrated(largest) if name == "nvfp4" else Fp8.calibrated(largest)
    return Exact() if name == "exact" else Mx("e4m3" if name == "mxfp8" else "e2m1")


def amount(text: str, whole: int) -> Fraction:
    """What "48" or "75%" of `whole` is."""
    return Fraction(text[:-1]) / 100 * whole if text.endswith("%") else Fraction(text)


def amount_text(field: str, text: str, most_percent: int | None = None) -> str:
    """The canonical form of an integer of at least 1, or of a percentage above 0; ValueError for others."""
    number = text.removesuffix("%")
    percent = number != text
    if not re.fullmatch(_NUMBERS[int] + (r"(\.\d+)?" if percent else ""), number, re.ASCII):
        raise ValueError(f"{field}={text!r} must be an integer, as 48, or a percentage, as 75%")
    if Decimal(number) == 0:
        raise ValueError(f"{field}={text} must be at least 1, or above 0%")
    if percent and most_percent is not None and Decimal(number) > most_percent:
        raise ValueError(f"{field}={text} must be at most {most_percent}%")
    return f"{Decimal(number).normalize():f}%" if percent else str(int(number))


def _options(name: str, given: list[str]) -> tuple[tuple[str, Any], ...]:
    found: dict[str, Any] = {}
    for text in given:
        if not _STEPS[name]:
            raise ValueError(f"{name} must have no options, not {text!r}; nearest: {name}")
        option = _letters(text)
        one_of(f"option of {name}", option, _STEPS[name])
        if option in found:
            raise ValueError(f"{option} is given twice; leave one out")
        number, kind = text[len(option) :], _STEPS[name][option]
        if not re.fullmatch(_NUMBERS[kind], number, re.ASCII):
            rule = {bool: f"{option} alone", int: f"an integer, as {option}32", float: f"a number, as {option}1.5"}
            raise ValueError(f"{text!r} must be {rule[kind]}")
        found[option] = kind(number or True)
    for one, other in _EXCLUSIVE:
        if one in found and other in found:
            raise ValueError(f"{one} does not go with {other}; leave one out")
    return tuple((o, found[o]) for o in _STEPS[name] if o in found and found[o] != _DEFAULTS.get(o))


def _letters(text: str) -> str:
    match = re.match("[a-z]*", text)
    assert match is not None
    return match[0]


def _plain(value: float) -> str:
    return str(int(value) if value == int(value) else value)
