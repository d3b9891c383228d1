"""What is reported of a codec: its text, how a budget is allocated, its cost in quality, bytes and time."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

from kvjax.codecs.base import Exact, Storage
from kvjax.codecs.statistics import Statistics
from kvjax.compress import Comparer, bytes_of, layers_of
from kvjax.decoder import rope_on_read
from kvjax.layer_timing import encode_seconds, step_seconds
from kvjax.mixing import budget_bytes, measured_losses, mixed
from kvjax.recipe_build import build
from kvjax.recipes import Recipe, parse
from kvjax.sensitivity import sensitivities

Bar = Callable[[str], Callable[[list], Iterable]]
"""From what is done to what wraps the list of its steps to show progress."""


@dataclass(frozen=True)
class Plan:
    """A recipe, or `mix:int8|nvfp4|int4@30%`: one of these for each array of each layer, within a budget."""

    recipes: tuple[Recipe, ...]
    budget: str | None = None

    @classmethod
    def of(cls, text: str) -> Self:
        """Parsed; ValueError as `recipes.parse`, and for a mix that names no budget or more than formats."""
        if not text.startswith("mix:"):
            return cls((parse(text),))
        formats, _, budget = text.removeprefix("mix:").partition("@")
        if not budget:
            raise ValueError(f"{text!r} must end with a budget, as mix:int8|int4@30%")
        parsed = tuple(parse(part) for part in formats.split("|"))
        for recipe in parsed:
            if recipe != parse(recipe.text.split(",")[0]) or recipe.arrays[0][0] or recipe.budget:
                raise ValueError(
                    f"{text!r} must mix codecs for every array and no options, as int8, not {recipe.text!r}"
                )
        return cls(parsed, budget)

    @property
    def text(self) -> str:
        """Canonical."""
        texts = "|".join(recipe.text for recipe in self.recipes)
        return texts if self.budget is None else f"mix:{texts}@{self.budget}"


class Bench:
    """A model and its text, for any number of plans."""

    def __init__(
        self,
        comparer: Comparer,
        statistics: Statistics | None,
        context: int,
        batch_size: int,
        training_text: Callable[[], Any],
        bar: Bar = lambda what: iter,
    ):
        """`training_text` gives the corpus on which sensitivities are measured, when they are first needed."""
        self._comparer, self._statistics, self._bar = comparer, statistics, bar
        self._context, self._batch_size, self._training_text = context, batch_size, training_text
        self._corpus: Any = None

    def measure(self, plan: Plan, label: str) -> dict[str, Any]:
        """A row's figures; ValueError for what model or statistics lack."""
        started = time.monotonic()
        comparer = self._comparer
        before_rope = plan.recipes[0].keys == "before_rope"
        storages = self._storages(plan)
        fitted = time.monotonic() - started
        row: dict[str, Any] = {"cache_bytes": bytes_of(comparer.entries, storages, self._context)}
        row |= comparer.compare(storages, before_rope, self._bar(label)).row()
        layers, exact = comparer.layers, [Storage(Exact())] * len(storages)
        row["layers_seconds_per_step_exact"] = step_seconds(layers, comparer.entries, exact, self._context)
        if before_rope:
            layers = layers_of(*rope_on_read(comparer.graphdef, comparer.params))
        row["layers_seconds_per_step"] = step_seconds(layers, comparer.entries, storages, self._context)
        row["encode_seconds_per_step"] = encode_seconds(comparer.entries, storages)
        row["rows_per_step"] = next(iter(comparer.entries[0].values())).shape[0]
        if plan.budget is not None:
            row["formats"] = [{n: type(c).__name__ for n, c in s.named.items()} for s in storages]
        return row | {"fit_seconds": fitted, "seconds": time.monotonic() - started}

    def _storages(self, plan):
        comparer, statistics, context = self._comparer, self._statistics, self._context
        if plan.budget is not None:
            budget = budget_bytes(plan.budget, comparer.entries)
            candidates = [build(r, comparer.entries, statistics, context=context) for r in plan.recipes]
            losses = measured_losses(self._on_training_text(), candidates, self._bar("losses of formats"))
            return mixed(comparer.entries, candidates, losses, budget)
        (recipe,) = plan.recipes
        known: dict[str, Any] = {"frequencies": comparer.frequencies, "context": context}
        if recipe.allocate == "sensitivity":
            known["weights"] = self._weights(recipe)
        return build(recipe, comparer.entries, statistics, **known)

    def _weights(self, recipe):
        if self._statistics is None:
            raise ValueError("allocate=sensitivity needs statistics; experiments.calibrate writes them")
        chains = dict(recipe.arrays)
        chains = dict.fromkeys(self._comparer.entries[0], chains[""]) if "" in chains else chains
        kinds = {name: chain[0].name for name, chain in chains.items() if chain[0].fitted and not chain[0].size}
        before_rope = recipe.keys == "before_rope"
        split, options = (self._comparer.graphdef, self._comparer.params), {"sinks": recipe.sinks}
        sizes = self._context, self._batch_size
        bar = {"keys_before_rope": before_rope, "track": self._bar("sensitivities")}
        return sensitivities(*split, self._train(), self._statistics, kinds, *sizes, **bar, **options)

    def _on_training_text(self):
        split = self._comparer.graphdef, self._comparer.params
        return Comparer(*split, self._train(), self._context, self._batch_size)

    def _train(self):
        if self._corpus is None:
            self._corpus = self._training_text()
        return self._corpus
