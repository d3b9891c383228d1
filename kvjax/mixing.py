"""A format for every array of every layer, from a list, by what each was measured to cost, within a budget."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.codecs.base import Entry, Exact, Storage
from kvjax.codecs.budget import choose
from kvjax.compress import Comparer
from kvjax.recipe_array import token_bits

Units = dict[tuple[int, str], list[float]]
"""Of every layer's every array, a figure for each candidate."""


def measured_losses(
    comparer: Comparer, candidates: Sequence[Sequence[Storage]], track: Callable[[list], Iterable] = iter
) -> Units:
    """KL(exact || compressed), nats per token, of each candidate in one array of one layer, all others exact.

    The text of `comparer` must be calibration's. A candidate says how every layer would be stored. `track` may
    wrap the list of units to show progress.
    """
    units = [(layer, name) for layer, entry in enumerate(comparer.entries) for name in sorted(entry)]
    losses = {}
    for layer, name in track(units):
        losses[layer, name] = []
        for candidate in candidates:
            storages = [Storage(Exact())] * len(comparer.entries)
            storages[layer] = Storage({name: candidate[layer].named[name]})
            comparison = comparer.compare(storages)
            losses[layer, name].append(max(0.0, float(comparison.kl.sum() / comparison.score.tokens.sum())))
    return losses


def bytes_per_token(entries: Sequence[Mapping[str, Any]], candidates: Sequence[Sequence[Storage]]) -> Units:
    """Encoded bytes of a token in each array of each layer, for every candidate, rounded up."""
    sizes = {}
    for layer, entry in enumerate(entries):
        for name, a in entry.items():
            shape = math.prod(a.shape[1:-2]), a.shape[-1], 8 * a.dtype.itemsize
            bits = [token_bits(candidate[layer].named[name], *shape) for candidate in candidates]
            sizes[layer, name] = [float(math.ceil(b / 8)) for b in bits]
    return sizes


def mixed(
    entries: Sequence[Entry], candidates: Sequence[Sequence[Storage]], losses: Units, budget: int
) -> tuple[Storage, ...]:
    """The candidate of least summed loss for every array within `budget` bytes a token.

    Losses of single arrays are added, which neglects what they do to each other. ValueError if even the
    smallest candidates do not fit.
    """
    sizes, units = bytes_per_token(entries, candidates), sorted(losses)
    picks = choose(
        [[(int(size), loss) for size, loss in zip(sizes[unit], losses[unit])] for unit in units], budget
    )
    chosen = dict(zip(units, picks))
    names = [sorted(entry) for entry in entries]
    codec = lambda layer, name: candidates[chosen[layer, name]][layer].named[name]
    return tuple(Storage({n: codec(layer, n) for n in names[layer]}) for layer in range(len(entries)))


def budget_bytes(text: str, entries: Sequence[Entry]) -> int:
    """Bytes a token: `1536`, or `30%` of a bfloat16 cache, rounded down; ValueError for anything else."""
    number, percent = text.removesuffix("%"), text.endswith("%")
    if not (number.isascii() and number.isdecimal() and int(number) > 0):
        raise ValueError(
            f"budget {text!r} must be a whole number of bytes, or percent of a bfloat16 cache, as 30%"
        )
    elements = sum(int(np.prod(a.shape[1:-2])) * a.shape[-1] for entry in entries for a in entry.values())
    return 2 * elements * int(number) // 100 if percent else int(number)
