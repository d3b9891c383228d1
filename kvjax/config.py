"""The whole configuration of a run: frozen dataclasses, checked when made, written as JSON beside the run."""

import dataclasses
import difflib
import importlib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
from flax import nnx

from kvjax.attention.base import AttentionConfig
from kvjax.checks import at_least, between, one_of, positive
from kvjax.data.config import DataConfig
from kvjax.decoder import Decoder, DecoderConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) under linear warm-up and cosine decay."""

    peak_lr: float = 2.5e-3
    """Learning rate at the end of the warm-up."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0."""
    final_lr_fraction: float = 0.02
    """Learning rate that the decay ends at, as a fraction of the peak."""
    beta1: float = 0.9
    """Decay of the gradient's mean."""
    beta2: float = 0.99
    """Decay of the gradient's square."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; gains and biases are exempt."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""

    def __post_init__(self):
        positive("optimizer.peak_lr", self.peak_lr)
        at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        between("optimizer.final_lr_fraction", self.final_lr_fraction, 0.0, 1.0)
        between("optimizer.beta1", self.beta1, 0.0, 1.0)
        between("optimizer.beta2", self.beta2, 0.0, 1.0)
        at_least("optimizer.weight_decay", self.weight_decay, 0.0)
        positive("optimizer.clip_norm", self.clip_norm)


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and schedule of a run."""

    steps: int = 2000
    """Optimizer steps."""
    batch_size: int = 4
    """Sequences a step, over all devices and accumulated parts."""
    accumulate: int = 1
    """Parts a step's batch is computed in, one after the other."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; parameters stay float32. auto is float32 on CPU, bfloat16 elsewhere."""
    eval_every: int = 500
    """Steps between evaluations of the whole validation split; the last step is always evaluated."""
    eval_batch_size: int = 32
    """Windows a step of evaluation."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    sample_tokens: int = 64
    """Tokens of text generated at each evaluation."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "eval_every", "eval_batch_size", "checkpoint_every"):
            at_least(f"train.{name}", getattr(self, name), 1)
        at_least("train.log_every", self.log_every, 1)
        at_least("train.sample_tokens", self.sample_tokens, 1)
        one_of("train.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.batch_size={self.batch_size} must be a multiple of train.accumulate={self.accumulate}"
            )


@dataclass(frozen=True)
class Config:
    """One run: a variant in a decoder, its data, its training."""

    attention: AttentionConfig
    """The attention variant and what its cache holds."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """Everything of the model but its attention."""
    data: DataConfig = field(default_factory=DataConfig)
    """Corpus, tokenizer and context."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batch and schedule."""
    seed: int = 0
    """Seed of the initial weights, the data order and dropout."""

    def __post_init__(self):
        between("seed", self.seed, 0, 2**31)
        warmup, steps = self.optimizer.warmup_steps, self.train.steps
        if warmup >= steps:
            raise ValueError(f"optimizer.warmup_steps={warmup} must be below train.steps={steps}")

    def build(self, vocab_size: int, key: jax.Array | None = None) -> Decoder:
        """The model with initial weights from `seed`, or from `key`."""
        nnx.set_graph_mode(False)
        return Decoder(self.decoder, self.attention, vocab_size, jax.random.key(self.seed) if key is None else key)


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON values; the attention's class goes by its module and name."""
    kind = type(config.attention)
    return dataclasses.asdict(config) | {
        "attention": {"class": f"{kind.__module__}.{kind.__qualname__}", **dataclasses.asdict(config.attention)}
    }


def from_dict(values: Mapping[str, Any]) -> Config:
    """The configuration that `to_dict` wrote; ValueError for unknown or missing fields and wrong types."""
    return _make(Config, values, "")


def _make(kind, values, path):
    """`kind` from JSON values, its dataclass fields from objects; `path` is dotted, empty at the root."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{path or 'the configuration'} must be an object with fields, not {values!r}")
    if kind is AttentionConfig:
        values = dict(values)
        kind = _attention_class(values.pop("class", None))
    hints = typing.get_type_hints(kind)
    at = f"{path}." if path else ""
    for name in values:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1) or [f"one of {', '.join(hints)}"]
            raise ValueError(f"{at}{name} is unknown; did you mean {near[0]}?")
    # Options that came later are keywords whose defaults are what was before.
    later = {field.name for field in dataclasses.fields(kind) if field.kw_only}
    fields = {}
    for name, hint in hints.items():
        if name not in values and name in later:
            continue
        if name not in values:
            raise ValueError(f"{at}{name} is missing")
        fields[name] = values[name]
        nested = section(hint)
        if nested is hint or (nested and values[name] is not None):
            fields[name] = _make(nested, values[name], at + name)
        if not _fits(fields[name], hint):
            shown = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise ValueError(f"{at}{name}={fields[name]!r} must be of type {shown}")
    return kind(**fields)


def section(hint: Any) -> Any:
    """The dataclass of a field's type, which may also be None; None where it has no fields of its own."""
    return next((kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)), None)


def _fits(value, hint):
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_args(hint):
        return any(_fits(value, choice) for choice in typing.get_args(hint))
    if dataclasses.is_dataclass(hint):
        return isinstance(value, hint)
    return type(value) is hint or (hint is float and type(value) is int)


def _attention_class(path):
    """A config class of a module below `kvjax.attention`; nothing else is imported."""
    module, _, name = str(path).rpartition(".")
    if module.startswith("kvjax.attention.") and all(part.isidentifier() for part in module.split(".")):
        try:
            kind = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError:
            kind = None
        if isinstance(kind, type) and issubclass(kind, AttentionConfig):
            return kind
    raise ValueError(f"attention.class={path!r} must name an AttentionConfig of a module in kvjax.attention")
