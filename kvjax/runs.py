"""What a run's directory holds, read back: configuration, tokenizer, parameters."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from kvjax import results
from kvjax.checkpoint import Checkpoints
from kvjax.config import Config, from_dict, to_dict
from kvjax.data import Tokenizer, from_json
from kvjax.train import init_state

CONFIG, TOKENIZER, CHECKPOINTS, RESULT = "config.json", "tokenizer.json", "checkpoints", "result.json"
CONVERSION = "conversion.json"  # of a run that began as another model
UPTRAINING_PEAK_LR = 0.2
"""Peak rate of training a converted model on, as a part of its source's (`notebooks/results/uptraining_rates`):
a whole second warm-up loses what the source's decay had gained, which some steps do not win back."""


def uptraining_peak_lr(source: float, part: float = UPTRAINING_PEAK_LR) -> float:
    """This part of the source's peak rate, to four digits."""
    return float(f"{part * source:.4g}")


@dataclass(frozen=True)
class Run:
    """A trained model with all that it needs to be used."""

    config: Config
    tokenizer: Tokenizer
    step: int
    params: Any
    """Float32, in the structure of `train.graphdef_of`."""
    damaged: tuple[str, ...]
    """Damaged checkpoints that were passed over, a line each."""


def load_config(directory: Path) -> Config:
    """The resolved configuration of a run; ValueError if it is none."""
    if not (directory / CONFIG).is_file():
        raise ValueError(f"run={str(directory)!r} must be the directory of a run: it has no {CONFIG}")
    values = results.read_json(directory / CONFIG)
    try:
        return from_dict(values)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG} is not a configuration: {error}") from error


def load_run(directory: Path) -> Run:
    """Configuration, tokenizer and newest sound parameters.

    ValueError for a directory that is no run, no sound checkpoint, or a checkpoint that was trained
    with another tokenizer or configuration.
    """
    config = load_config(directory)
    tokenizer = _load_tokenizer(directory / TOKENIZER)
    checkpoints = Checkpoints(directory / CHECKPOINTS)
    metadata = checkpoints.metadata()
    if metadata is None:
        raise ValueError(f"run={str(directory)!r} has no checkpoint yet")
    check_same_origin(directory, metadata, config, tokenizer)
    like = jax.eval_shape(lambda: init_state(config, tokenizer.vocab_size))
    restored = checkpoints.restore(like)
    assert restored is not None
    step, state, _ = restored
    return Run(config, tokenizer, step, state.params, tuple(checkpoints.damaged))


def _load_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        return from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def check_same_origin(directory: Path, metadata: dict[str, Any], config: Config, tokenizer: Tokenizer) -> None:
    """ValueError where a checkpoint's metadata name another tokenizer or configuration."""
    if metadata["tokenizer"] != tokenizer.digest:
        raise ValueError(
            f"{directory / TOKENIZER} (digest {tokenizer.digest[:12]}) does not fit the checkpoint, which was "
            f"trained with the tokenizer of digest {metadata['tokenizer'][:12]}"
        )
    for path, (theirs, ours) in differences(to_dict(from_dict(metadata["config"])), to_dict(config)):
        raise ValueError(
            f"{directory / CONFIG} does not fit the checkpoint, which was trained with {path}={theirs}, not {ours}"
        )


def check_same_config(directory: Path, config: Config) -> dict[str, Any] | None:
    """The result of a finished run, None for a new or unfinished one; ValueError for another's directory."""
    if not directory.exists() or [path.name for path in directory.iterdir()] == [".lock"]:
        return None
    if not (directory / CONFIG).is_file():
        raise ValueError(f"{directory} exists and is not a run (no {CONFIG}); choose another --name")
    theirs, ours = to_dict(load_config(directory)), to_dict(config)
    for path, (a, b) in differences(theirs, ours):
        raise ValueError(f"{directory} was begun with {path}={a}, not {b}; choose another --name")
    return results.read_json(directory / RESULT) if (directory / RESULT).is_file() else None


def differences(
    a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Dotted names in which two configurations, as dictionaries, differ, with both values (None: not there)."""
    for name in {**a, **b}:
        if isinstance(a.get(name), dict) and isinstance(b.get(name), dict):
            yield from differences(a[name], b[name], f"{prefix}{name}.")
        elif a.get(name) != b.get(name):
            yield prefix + name, (a.get(name), b.get(name))
