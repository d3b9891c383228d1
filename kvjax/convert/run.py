"""A converted model as a run at step 0, which every command takes, and from which training goes on."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from kvjax import results
from kvjax.checkpoint import Checkpoints
from kvjax.config import Config, to_dict
from kvjax.data import Tokenizer
from kvjax.runs import CHECKPOINTS, CONFIG, CONVERSION, TOKENIZER
from kvjax.train import init_state


def require_new(directory: Path) -> None:
    """ValueError unless the directory is missing or empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty; choose a new directory")


def write_run(
    directory: Path, config: Config, tokenizer: Tokenizer, params: Any, conversion: dict[str, Any]
) -> None:
    """A run's directory whose checkpoint of step 0 holds `params` and a fresh optimizer's state.

    `conversion` (JSON) says where they come from. It is there whole or not at all; ValueError as `require_new`.
    """
    require_new(directory)
    state = dataclasses.replace(init_state(config, tokenizer.vocab_size), params=params)
    metadata = {"config": to_dict(config), "tokenizer": tokenizer.digest, "wall_seconds": 0.0}
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        made = Path(scratch) / "run"
        with Checkpoints(made / CHECKPOINTS) as checkpoints:
            checkpoints.save(0, state, metadata)
        results.write_bytes(made / TOKENIZER, tokenizer.to_json().encode())
        results.write_json(made / CONFIG, to_dict(config))
        results.write_json(made / CONVERSION, conversion)
        made.replace(directory)  # which may be there, empty
