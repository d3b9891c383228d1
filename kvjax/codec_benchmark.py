"""Codecs side by side in decoding: bytes, time of a token, cost of encoding it, and what fits a memory."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvjax.benchmark import Spread, alternate
from kvjax.calibrate import calibrate
from kvjax.codecs.base import Storage
from kvjax.codecs.statistics import Statistics
from kvjax.compress import entries, key_frequencies
from kvjax.data import Corpus
from kvjax.decode_benchmark import Case, DecodeWorkload, random_model, random_prompts, slot_unit
from kvjax.decoder import rope_on_read
from kvjax.layer_timing import encode_seconds
from kvjax.recipe_build import build
from kvjax.recipes import Recipe, needs_statistics
from kvjax.slots import nbytes

CALIBRATED = 256  # tokens of each row's prompt that codecs are calibrated on


class CodecBench:
    """One model with random weights, its batch and its filled cache, for any number of codecs."""

    def __init__(self, case: Case, memory: int):
        """`memory` is what weights and a cache are to fit, bytes; ValueError if the weights do not."""
        self.case, self.memory = case, memory
        self._model = random_model(case.config)
        weights = nbytes(self._model[1])
        if memory <= weights:
            raise ValueError(f"memory={memory} bytes must be more than the weights' {weights}")
        self._entries = entries(*self._model, case.batch, 1)

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Of what the prompts leave: random weights have no text of their own."""
        graphdef, params = self._model
        ids_BT = random_prompts(self.case, params["embedding_VD"].shape[0])[:, : CALIBRATED + 1]
        B, T = ids_BT.shape
        corpus = Corpus(ids_BT.ravel(), np.arange(0, B * T + 1, T), np.zeros(B, np.int64))
        about = {"model": "random weights", "data": "random tokens"}
        return calibrate(graphdef, params, corpus, T - 1, B * (T - 1), B, **about)

    def storages(self, recipe: Recipe) -> tuple[Storage, ...]:
        """How a recipe stores every layer; ValueError as `recipe_build.build`."""
        statistics = self.statistics if needs_statistics(recipe) else None
        return build(recipe, self._entries, statistics, frequencies=key_frequencies(*self._model))

    def rows(self, recipes: Sequence[Recipe], rounds: int) -> list[dict[str, Any]]:
        """Figures of every recipe, their tokens timed in turns; all are built before the first is timed."""
        storages = [self.storages(recipe) for recipe in recipes]
        models = [rope_on_read(*self._model) if r.keys == "before_rope" else self._model for r in recipes]
        workloads = [DecodeWorkload(self.case, codec, model=model) for codec, model in zip(storages, models)]
        sides = {recipe.text: workload.seconds for recipe, workload in zip(recipes, workloads)}
        alternate(sides, 1)
        values = alternate(sides, rounds)
        return [
            {"codec": text, "seconds_per_token": dataclasses.asdict(Spread.of(seconds)), **figures}
            for (text, seconds), figures in zip(values.items(), map(self._figures, workloads, storages))
        ]

    def _figures(self, workload: DecodeWorkload, storages: tuple[Storage, ...]) -> dict[str, Any]:
        slots, unit = self.case.slots(storages), slot_unit(storages)
        exact_bytes = nbytes(entries(*self._model, self.case.batch, slots))
        temporary_bytes = workload.temporary_bytes()
        units = None  # a window's cache does not grow with the context
        if self.case.config.attention.window is None:
            units = largest(lambda n: workload.bytes_of(self.case.batch, n * unit), self.memory)
        return {
            "cache_bytes_per_token": workload.bytes_per_token,
            "cache_bytes": workload.cache_bytes,
            "exact_cache_bytes": exact_bytes,
            "calibrated_bytes": nbytes(storages),
            "temporary_bytes": temporary_bytes,
            "temporary_part_of_exact_cache": temporary_bytes / exact_bytes,
            "encode_seconds_per_token": encode_seconds(self._entries, storages),
            "slots": slots,
            "largest_batch": largest(lambda n: workload.bytes_of(n, slots), self.memory),
            "longest_context": None if units is None else units * unit,
            "weight_bytes": nbytes(self._model[1]),
            "first_prefill_seconds": workload.first_prefill_seconds,
            "first_round_seconds": workload.first_round_seconds,
        }


def largest(size: Callable[[int], int], room: int) -> int:
    """The largest n of which `size(n)` fits, 0 if none does, of sizes that grow by as much with each."""
    first, more = size(1), size(2) - size(1)
    if first > room:
        return 0
    n = 1 + (room - first) // more
    assert size(n) <= room < size(n + 1)
    return n
