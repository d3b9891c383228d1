"""The text form of a codec, as command lines take it: `k=pca48+int8,v=nvfp4,sinks=4`.

Parts are separated by commas: one codec for every array, or `ARRAY=CODEC` for arrays by name, others being exact,
and options. A codec is a format, or maps and then a format, joined by `+`; after maps alone z is kept in float32.

Formats:
    exact, bf16, fp16           elements as they are, or in 16 bits
    int8, int4, int2            a scale for each token and head, or `:g32` each 32 channels; `:asym` and a minimum
    int4:channel32              a scale and a minimum for each channel's 32 tokens; `:r128` encodes 128 at a time
    fp8                         one calibrated scale, `:h2` with headroom 2 (default 1.25)
    fp8:scale1, fp8:b128        a scale of 1, or one for each token's every 128 channels
    mxfp8, mxfp4, nvfp4         block formats; nvfp4 has a calibrated scale, too (`:h2`)
Maps:
    pca48, pca75%               48 dimensions of every head, or 75% of its features: fitted, and only as the first
                                map. Also query, output, keyquery, querydiag and random (`:seed3`). `:nomean`
                                subtracts no mean, `:joint` is one map for all heads together. `:all` is fitted to
                                all tokens, the default, `:rest` to all but the first of windows, the default if
                                sinks are kept exact
    hadamard, haar              orthogonal, alike for every head; `haar:seed1`
Options:
    sinks=4, recent=64          first positions, and newest tokens, that are kept exact besides
    keys=before_rope            keys are cached unrotated, for which the model must be built (`rope_on_read`)
    layers=0-3                  only these are compressed, others exact
    budget=50%, budget=1536     gives ranks to maps without: the encoded bytes per token of all layers and arrays,
                                exact ones among them, stay within this part of a bfloat16 cache, or so many
    allocate=uniform            how a budget is shared out; or `water`, `sensitivity` (`kvjax.recipe_build`)

`kivi4` and `kivi2` stand for the keys and values of KIVI (arXiv 2402.02750). There the newest 0 to R - 1 keys are
exact until a group of them is whole, and always the newest R values; here keys and values leave the exact part
together, which holds the newest 0 to R - 1 of both, and `recent` more.
"""

import difflib
import re
from dataclasses import dataclass
from typing import Any

from kvjax.checks import one_of
from kvjax.recipe_steps import FORMATS, Step, amount_text, step_of

ALIASES = {
    "kivi4": "k=int4:channel32,v=int4:g32:asym",
    "kivi2": "k=int2:channel32:r128,v=int2:g32:asym",
}
ALLOCATIONS = ("uniform", "water", "sensitivity")

Chain = tuple[Step, ...]


@dataclass(frozen=True)
class Recipe:
    """What a text says; `text` is its canonical form."""

    arrays: tuple[tuple[str, Chain], ...]
    """Codecs by array, sorted; the name "" stands for every array."""
    sinks: int = 0
    recent: int = 0
    keys: str = "rotated"
    """Or "before_rope"."""
    layers: tuple[int, int] | None = None
    """First and last that are compressed; None for all."""
    budget: str | None = None
    """Encoded bytes per token, as 1536, or 50% of a bfloat16 cache's."""
    allocate: str | None = None

    def __post_init__(self):
        if not self.arrays:
            raise ValueError("there must be a codec, as int8 or k=int8")
        if self.arrays[0][0] == "" and len(self.arrays) > 1:
            raise ValueError(f"a codec for every array does not go with {self.arrays[1][0]}=; name every array")
        without = [chain[0].name for _, chain in self.arrays if chain[0].fitted and not chain[0].size]
        if without and self.budget is None:
            raise ValueError(
                f"{without[0]} must have a rank, as {without[0]}48, or go with a budget, as budget=50%"
            )
        if self.budget is not None and not without:
            raise ValueError(f"budget={self.budget} must go with a map that has no rank, as k=pca+int8")
        if self.allocate is not None and self.budget is None:
            raise ValueError(f"allocate={self.allocate} must go with a budget, as budget=50%")

    @property
    def text(self) -> str:
        """As it is written: `parse` of it gives the same recipe."""
        parts = [f"{name}={chain_text(chain)}" if name else chain_text(chain) for name, chain in self.arrays]
        layers = None if self.layers is None else "-".join(map(str, sorted(set(self.layers))))
        options = {"sinks": self.sinks, "recent": self.recent}
        options |= {"keys": None if self.keys == "rotated" else self.keys, "layers": layers}
        options |= {"budget": self.budget, "allocate": self.allocate}
        return ",".join([*parts, *(f"{key}={value}" for key, value in options.items() if value)])


def parse(text: str) -> Recipe:
    """The recipe that a text describes; ValueError naming the part, the rule and a valid choice."""
    arrays: dict[str, Chain] = {}
    options: dict[str, Any] = {}
    parts = (ALIASES.get(part.strip(), part) for part in text.split(","))
    for part in ",".join(parts).split(","):
        try:
            _add(part.strip(), arrays, options)
        except ValueError as error:
            raise ValueError(f"recipe {text!r}, part {part.strip()!r}: {error}") from error
    if "budget" in options:
        options.setdefault("allocate", "uniform")
    try:
        return Recipe(tuple(sorted(arrays.items())), **options)
    except ValueError as error:
        raise ValueError(f"recipe {text!r}: {error}") from error


def needs_statistics(recipe: Recipe) -> bool:
    """Whether it takes a calibration to build it."""
    return any(step.fitted or step.calibrated for _, chain in recipe.arrays for step in chain)


def chain_text(chain: Chain) -> str:
    """As it is written."""
    return "+".join(step.text for step in chain)


def _add(part: str, arrays: dict[str, Chain], options: dict[str, Any]) -> None:
    name, equals, value = part.partition("=")
    if equals and name in _OPTIONS:
        if name in options:
            raise ValueError(f"{name} is given twice; leave one out")
        options[name] = _OPTIONS[name](value)
        return
    if equals and not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
        raise ValueError(f"{name!r} must be an array's name, as k or v, or one of {', '.join(_OPTIONS)}")
    name, codec = (name, value) if equals else ("", part)
    if not codec:
        raise ValueError("there must be a codec, as int8 or k=int8")
    if name in arrays:
        raise ValueError(f"there is another codec for {name or 'every array'} already; leave one out")
    near = difflib.get_close_matches(name, _OPTIONS, n=1, cutoff=0.8)
    try:
        arrays[name] = _chain(codec)
    except ValueError:
        if near:
            raise ValueError(f"option {name!r} is unknown; did you mean {near[0]!r}?") from None
        if codec in ALIASES or (not equals and difflib.get_close_matches(codec, ALIASES, cutoff=0.8)):
            raise ValueError(f"{codec!r} must be {' or '.join(ALIASES)}, and stand alone") from None
        raise


def _chain(text: str) -> Chain:
    steps = tuple(map(step_of, text.split("+")))
    formats = [step for step in steps if step.name in FORMATS]
    fitted = [step for step in steps if step.fitted]
    for kind, found in (("format", formats), ("fitted map", fitted)):
        if len(found) > 1:
            raise ValueError(f"{found[1].text} must be left out: {found[0].text} is the one {kind} of this chain")
    order = lambda step: 0 if step.fitted else 2 if step.name in FORMATS else 1
    right = tuple(sorted(steps, key=order))
    if steps != right:
        raise ValueError(f"a fitted map must come first, and a format last; nearest: {chain_text(right)}")
    if steps[0].fitted and not steps[0].size and any(step.name == "hadamard" for step in steps):
        raise ValueError("hadamard, which few ranks have, must not follow a map without a rank; nearest: haar")
    # What maps give is kept as it is without a format, too.
    return steps[:-1] if len(steps) > 1 and steps[-1].name == "exact" else steps


def _integer(text: str) -> int:
    if not re.fullmatch(r"\d+", text, re.ASCII):
        raise ValueError(f"{text!r} must be an integer of at least 0, as 4")
    return int(text)


def _layers(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text, re.ASCII)
    if match is None:
        raise ValueError(f"layers={text!r} must be a layer, as 2, or the first and the last of some, as 0-3")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f"layers={text} must begin with the lower one; nearest: layers={last}-{first}")
    return first, last


def _choice(field: str, choices: tuple[str, ...], text: str) -> str:
    one_of(field, text, choices)
    return text


_OPTIONS = {
    "sinks": _integer,
    "recent": _integer,
    "keys": lambda text: _choice("keys", ("rotated", "before_rope"), text),
    "layers": _layers,
    "budget": lambda text: amount_text("budget", text),
    "allocate": lambda text: _choice("allocate", ALLOCATIONS, text),
}
