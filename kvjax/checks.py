"""Rules of single fields and pairs: one line that names the field, the value, the rule, a valid choice."""

import difflib
import math
from collections.abc import Iterable


def at_least(field: str, value: float, least: float) -> None:
    """`value` must be a finite number of at least `least`."""
    if not math.isfinite(value):
        raise ValueError(f"{field}={value} must be a finite number")
    if value < least:
        raise ValueError(f"{field}={value} must be at least {least}")


def between(field: str, value: float, low: float, high: float) -> None:
    """`value` must lie in [low, high)."""
    if not low <= value < high:
        raise ValueError(f"{field}={value} must be at least {low} and below {high}")


def positive(field: str, value: float) -> None:
    """`value` must be a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{field}={value} must be a finite number above 0")


def even(field: str, value: int) -> None:
    """`value` must be even."""
    if value % 2:
        raise ValueError(f"{field}={value} must be even; the nearest are {value - 1} and {value + 1}")


def multiple(field: str, value: int, of_field: str, of: int) -> None:
    """`value` must be a multiple of `of`."""
    if value % of:
        valid = [d for d in range(1, value + 1) if value % d == 0]
        nearest = min(valid, key=lambda d: abs(d - of))
        raise ValueError(f"{field}={value} must be a multiple of {of_field}={of}; nearest {of_field}: {nearest}")


def one_of(field: str, value: str, choices: Iterable[str]) -> None:
    """`value` must be one of `choices`."""
    names = sorted(choices)
    if value not in names:
        near = difflib.get_close_matches(value, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"
        raise ValueError(f"{field}={value!r} is unknown; {hint}")
