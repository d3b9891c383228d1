"""Fair comparison: an integer field solved for, so that two configurations agree in parameters, bytes or FLOPs."""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from kvjax import accounting
from kvjax.checks import at_least, one_of
from kvjax.config import Config
from kvjax.dry_run import vocabulary
from kvjax.slots import nbytes

LARGEST = 2**24
"""No field is tried beyond this."""


@dataclass(frozen=True)
class Match:
    """A configuration whose free field was solved for."""

    config: Config
    free: str
    value: int
    """Of the free field."""
    by: str
    target: float
    """The reference's quantity."""
    reached: float
    """The configuration's."""

    @property
    def residual(self) -> float:
        """By how much of the target it is missed; positive above."""
        return self.reached / self.target - 1


def match(
    config: Config,
    reference: Config,
    by: str,
    free: str,
    *,
    multiple_of: int = 1,
    tolerance: float | None = None,
) -> Match:
    """`config` with the value of `free` that brings the quantity `by` nearest to the reference's.

    `by`: "params", total parameters; "kv_bytes", bytes a token of an exact bfloat16 cache, all layers;
    "train_flops", FLOPs of training on a token, attention's scores among them, at `config.data.context`. `free`
    is a dotted field, as "decoder.mlp_width" or "attention.rank"; only values that the configuration allows are
    tried (`num_kv_heads` that divide `num_heads`, even `rope_dim`), and only multiples of `multiple_of`. Of two
    that are equally near, the lower one.

    ValueError if the field is unknown or does not move the quantity, if its lowest and highest value are on one
    side of the target, or if the nearest is farther from it than `tolerance`, a part of the target; with a
    `tolerance`, an end of the range that is as near will do.
    """
    one_of("by", by, QUANTITIES)
    at_least("multiple_of", multiple_of, 1)
    measure, context = QUANTITIES[by], config.data.context
    target = measure(reference, context)
    made = lambda value: replaced(config, free, value)
    values = _values(config, free, multiple_of)
    size = lambda index: measure(made(values[index]), context)
    _require_moving(config, by, free, values, size)
    above = _first(lambda index: size(index) >= min(target, size(len(values) - 1)), len(values))
    best = min([max(above - 1, 0), above], key=lambda index: abs(size(index) - target))
    found = Match(made(values[best]), free, values[best], by, target, size(best))
    outside = not size(0) <= target <= size(len(values) - 1)
    if (tolerance is None and outside) or (tolerance is not None and abs(found.residual) > tolerance):
        within = "" if tolerance is None else f" within {tolerance:.3g} of"
        raise ValueError(
            f"{free} must have a value that brings {by} to{within} the reference's {target:,.0f}; nearest: "
            f"{found.value}, which gives {found.reached:,.0f} ({found.residual:+.2%})"
        )
    return found


def replaced(config: Config, field: str, value: Any) -> Config:
    """`config` with one dotted field changed, as "attention.rank"; ValueError if unknown or against a rule."""
    return _replaced(config, "", field, value)


def _replaced(section: Any, prefix: str, field: str, value: Any) -> Any:
    name, _, rest = field.partition(".")
    if name not in {known.name for known in dataclasses.fields(section)}:
        one_of("field", prefix + field, list(_fields(section, prefix)))
    if rest:
        inner = getattr(section, name)
        if not dataclasses.is_dataclass(inner):
            raise ValueError(f"field={prefix + field!r} is unknown; nearest: {prefix + name!r}")
        value = _replaced(inner, f"{prefix}{name}.", rest, value)
    return dataclasses.replace(section, **{name: value})


def _fields(section: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of what a section holds, and what its sections hold."""
    for field in dataclasses.fields(section):
        part = getattr(section, field.name)
        if dataclasses.is_dataclass(part):
            yield from _fields(part, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _params(config: Config, context: int) -> float:
    return accounting.count_parameters(config, vocabulary(config.data))


def _kv_bytes(config: Config, context: int) -> float:
    entry = accounting.entry(config.attention, config.decoder.width, jnp.dtype("bfloat16"))
    return config.decoder.depth * nbytes(entry)


def _train_flops(config: Config, context: int) -> float:
    return accounting.flops_per_token(config, vocabulary(config.data), context, training=True)


QUANTITIES: dict[str, Callable[[Config, int], float]] = {
    "params": _params,
    "kv_bytes": _kv_bytes,
    "train_flops": _train_flops,
}


def _integer_fields(config: Config) -> list[str]:
    """Dotted fields of attention and decoder that hold an integer, or may."""
    names = []
    for part in ("attention", "decoder"):
        hints = typing.get_type_hints(type(getattr(config, part)))
        names += [f"{part}.{name}" for name, hint in hints.items() if int in (hint, *typing.get_args(hint))]
    return names


def _values(config: Config, free: str, multiple_of: int) -> Sequence[int]:
    """What the field may be, in order."""
    one_of("free", free, _integer_fields(config))
    if free == "attention.num_kv_heads":
        heads = config.attention.num_heads
        values = [n for n in range(multiple_of, heads + 1, multiple_of) if heads % n == 0]
        if not values:
            raise ValueError(f"multiple_of={multiple_of} must have multiples that divide num_heads={heads}")
        return values
    # The others may be all multiples of something, as 2 for what turns in pairs.
    step, error = None, None
    for step in range(1, 257):
        try:
            for value in (step, 2 * step, 3 * step):
                replaced(config, free, value)
            break
        except ValueError as broken:
            error = error or broken
    else:
        raise ValueError(f"{free} cannot be solved for: {error}")
    step = math.lcm(step, multiple_of)
    return range(step, LARGEST + 1, step)


def _require_moving(config, by, free, values, size):
    """ValueError unless the quantity differs between low and high values."""
    measure, context = QUANTITIES[by], config.data.context
    if len(values) == 1 or size(0) != size(min(len(values), 64) - 1):
        return
    moving = []
    for name in _integer_fields(config):
        try:
            low, high = _values(config, name, 1)[:2]
        except ValueError:
            continue  # has no two values
        if measure(replaced(config, name, low), context) != measure(replaced(config, name, high), context):
            moving.append(name)
    raise ValueError(f"free={free!r} does not move {by}; choose from {', '.join(moving)}")


def _first(holds: Callable[[int], bool], end: int) -> int:
    """The first index of which a rising condition holds, `end` if it never does."""
    low, step = 0, 1
    while low + step < end and not holds(low + step - 1):
        low, step = low + step, 2 * step
    high = min(low + step, end)  # it holds at high - 1, or high is the end
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
