"""A study: variants, how they are matched, learning rates, paired seeds; and the runs it needs.

Runs of one seed see the same batches, and start from the same weights where shapes agree.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from kvjax.checks import at_least, one_of, positive
from kvjax.config import Config, to_dict
from kvjax.ensemble import OWN
from kvjax.matching import match
from kvjax.results import run_name
from kvjax.runs import CONVERSION, RESULT, UPTRAINING_PEAK_LR, differences, uptraining_peak_lr

Matching = Literal["fixed", "params", "kv_bytes", "train_flops"]
MATCHINGS = ("fixed", "params", "kv_bytes", "train_flops")


@dataclass(frozen=True)
class Conversion:
    """Weights of the reference's runs turned into another variant's, then trained on."""

    label: str
    """The variant to become, one of the study's."""
    to: str
    """The preset that has its attention."""
    methods: tuple[str, ...]
    """As in `experiments.convert`."""
    fractions: tuple[float, ...] = (0.0, 0.01, 0.05, 0.1)
    """Of the source's steps to train on for; 0 is the weights as they are."""
    peak_lr: float = UPTRAINING_PEAK_LR
    """Of training on, as a part of the source's."""

    def __post_init__(self):
        positive("conversions.peak_lr", self.peak_lr)


@dataclass(frozen=True)
class Study:
    """What is compared, and by which rules (`peak_lrs` empty: each configuration's own rate)."""

    variants: Mapping[str, Config]
    """By label."""
    reference: str
    """Label of the variant that others are matched to and compared with."""
    matching: Matching = "fixed"
    """What variants have in common with the reference, besides data, depth, width and training."""
    free: str = "decoder.mlp_width"
    """The field that is solved for to match."""
    peak_lrs: tuple[float, ...] = ()
    """Rates to try, of which each variant's best one gets all seeds."""
    seeds: int = 1
    """Paired runs at the best rate."""
    rate_seeds: int = 1
    """Runs of each rate."""
    codecs: tuple[str, ...] = ()
    """How to store the caches of the runs at the best rate, as in `experiments.compress`."""
    codec_seeds: int = 1
    """Runs a variant whose caches are stored so."""
    calibration_tokens: int = 65_536
    """Training tokens that codecs are fitted to."""
    conversions: tuple[Conversion, ...] = field(default=())
    """Of the reference's run of seed 0."""

    def __post_init__(self):
        one_of("reference", self.reference, tuple(self.variants))
        one_of("matching", self.matching, MATCHINGS)
        for name in ("seeds", "rate_seeds", "codec_seeds", "calibration_tokens"):
            at_least(name, getattr(self, name), 1)
        if self.codecs and self.codec_seeds > self.seeds:
            raise ValueError(f"codec_seeds={self.codec_seeds} must be at most seeds={self.seeds}")
        if len(set(self.peak_lrs)) < len(self.peak_lrs):
            raise ValueError(f"peak_lrs={self.peak_lrs} must differ from each other")
        for label in self.variants:
            run_name(label)
        for conversion in self.conversions:
            one_of("conversions.label", conversion.label, tuple(self.variants))


class Step(NamedTuple):
    """A command, which is not run where what it makes is there."""

    arguments: tuple[str, ...]
    """After `python -m`; paths are below the store."""
    makes: str
    """The file or directory, below the store, that it writes at last."""


@dataclass(frozen=True)
class Job:
    """One unit of work: steps, one after the other, the last of which makes the result."""

    name: str
    """Of its directory in the store; holds a digest of all that determines the result."""
    stage: Literal["rates", "seeds", "codecs", "conversions"]
    about: Mapping[str, Any]
    """Label, matching, rate, seed and so on: what reports group by."""
    steps: tuple[Step, ...]
    config: Mapping[str, Any] | None = None
    """Written to the job's directory before the first step."""

    @property
    def result(self) -> str:
        """The file below the store whose existence says that all is done."""
        return self.steps[-1].makes


def alike(a: Job, b: Job) -> bool:
    """Whether these are two training jobs of one variant, which differ in seed and peak learning rate alone."""
    if a.name == b.name or a.config is None or b.config is None or a.about["label"] != b.about["label"]:
        return False
    return all(path in OWN for path, _ in differences(dict(a.config), dict(b.config)))


def matched(study: Study) -> dict[str, tuple[Config, float]]:
    """Every variant's configuration after matching, and by how much of the reference's value it misses it."""
    reference, made = study.variants[study.reference], {}
    for label, config in study.variants.items():
        if study.matching == "fixed" or label == study.reference:
            made[label] = config, 0.0
        else:
            found = match(config, reference, study.matching, study.free)
            made[label] = found.config, found.residual
    return made


def jobs(
    study: Study, finished: Mapping[str, Mapping[str, Any]], failed: frozenset[str] = frozenset()
) -> list[Job]:
    """All jobs known so far, in the order to do them: the seeds of a best rate follow from the rates' results.

    `finished` holds result rows by job's name, `failed` the names of jobs that ended without one.
    """
    variants = matched(study)
    rates = {label: list(_rates(study, label, *variants[label])) for label in variants}
    ended = {label: all(job.name in finished or job.name in failed for job in rates[label]) for label in variants}
    seeds = {
        label: list(_seeds(study, label, *variants[label], rates[label], finished))
        for label in variants
        if ended[label]
    }
    known = _in_turn(rates)
    if study.codecs:
        chosen = {label: trained[: study.codec_seeds] for label, trained in seeds.items()}
        known += [_codecs(study, run) for run in _in_turn(chosen) if run.name in finished]
    known += _in_turn(seeds)
    for source in seeds.get(study.reference, [])[:1]:
        if source.name in finished:
            known += _conversions(study, source, variants)
    unique: dict[str, Job] = {}
    for job in known:
        unique.setdefault(job.name, job)
    return list(unique.values())


def _in_turn(listed: Mapping[str, list[Job]]) -> list[Job]:
    """The first of every label, then the second, and so on: what is done early compares all."""
    turns = itertools.zip_longest(*listed.values())
    return [job for turn in turns for job in turn if job is not None]


def _rates(study, label, config, residual) -> Iterator[Job]:
    for seed in range(study.rate_seeds):
        for rate in study.peak_lrs or (config.optimizer.peak_lr,):
            yield _training(study, label, config, residual, "rates", rate, seed)


def _seeds(study, label, config, residual, rates, finished) -> Iterator[Job]:
    """Runs at the best of rates that have all ended."""
    losses: dict[float, list[float]] = {}
    for job in rates:
        loss = finished[job.name]["bits_per_byte"] if job.name in finished else None
        losses.setdefault(job.about["peak_lr"], []).append(math.inf if loss is None else loss)
    best = min(losses, key=lambda rate: sum(losses[rate]))
    if math.isinf(sum(losses[best])):
        return
    for seed in range(study.seeds):
        yield _training(study, label, config, residual, "seeds", best, seed)


def _training(study, label, config, residual, stage, rate, seed) -> Job:
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, peak_lr=rate), seed=config.seed + seed
    )
    values = to_dict(config)
    name = f"{label}-{digest(values)}"
    about = {"label": label, "matching": study.matching, "residual": residual}
    about |= {"peak_lr": rate, "seed": config.seed}
    return Job(name, stage, about, (_train(name),), values)


def _train(name) -> Step:
    return Step(("experiments.train", "--run", name), f"{name}/{RESULT}")


def _codecs(study, run) -> Job:
    statistics = f"{run.name}/calibration-{study.calibration_tokens}"
    calibrate = ("experiments.calibrate", "--run", run.name, "--tokens", str(study.calibration_tokens))
    chosen = tuple(argument for codec in study.codecs for argument in ("--codec", codec))
    name = f"{run.about['label']}-codecs-{digest([calibrate, chosen])}"
    compress = ("experiments.compress", "--run", run.name, "--calibration", statistics, *chosen)
    result = f"{name}/{RESULT}"
    steps = (Step((*calibrate, "--out", statistics), statistics), Step((*compress, "--json", result), result))
    return Job(name, "codecs", {**run.about, "source": run.name}, steps)


def _conversions(study, source, variants) -> Iterator[Job]:
    for conversion in study.conversions:
        target = json.dumps(to_dict(variants[conversion.label][0])["attention"], sort_keys=True)
        for method in conversion.methods:
            for fraction in conversion.fractions:
                how: dict[str, Any] = {"label": conversion.label, "method": method, "fraction": fraction}
                told: tuple[str, ...] = ()
                if fraction > 0:
                    rate = uptraining_peak_lr(source.about["peak_lr"], conversion.peak_lr)
                    how["uptraining_peak_lr"] = rate
                    told = "--fraction", str(fraction), "--optimizer.peak-lr", str(rate)
                name = f"{conversion.label}-{method}-{digest([source.name, target, conversion.to, how])}"
                convert = ("experiments.convert", "--run", source.name, "--to", conversion.to, "--method", method)
                steps = (Step((*convert, *told, "--out", name), f"{name}/{CONVERSION}"),)
                if fraction > 0:
                    steps += (_train(name),)
                yield Job(name, "conversions", {**source.about, **how, "source": source.name}, steps)


def digest(value: Any) -> str:
    """Twelve hex digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def labels(over: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Every combination of fields' values, with a label that can name a directory."""
    made: list[dict[str, str]] = [{}]
    for name, values in over.items():
        made = [{**before, name: value} for before in made for value in values]
    for fields in made:
        yield "_".join(f"{name.rpartition('.')[2]}-{value}" for name, value in fields.items()), fields
