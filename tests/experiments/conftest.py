"""A world for command lines: little text, and devices that are set up already."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import kvjax.data
from experiments import cli, train
from kvjax import accounting, host, loop
from kvjax.data import Corpus

TEXTS = {
    "train": [b"a cache of keys and values, " * 5, b"queries read it " * 8],
    "validation": [b"one latent a token", b"heads that share their keys"],
    "test": [b"a test is read once"],
}
SMALL = [
    *(
        "--config",
        "tiny",
        "--attention.num-heads",
        "2",
        "--attention.num_kv_heads",
        "1",
        "--attention.head-dim",
        "4",
    ),
    *("--decoder.width", "8", "--decoder.depth", "1", "--decoder.mlp-width", "12", "--data.context", "8"),
    *("--train.steps", "6", "--train.batch-size", "4", "--train.eval-every", "3", "--train.eval-batch-size", "4"),
    *("--train.checkpoint_every=3", "--train.sample-tokens", "5", "--seed", "7"),
]


def corpus(config, tokenizer, split) -> Corpus:
    parts = [np.append(tokenizer.end_id, tokenizer.encode(text)).astype(np.int32) for text in TEXTS[split]]
    starts = np.cumsum([0, *map(len, parts)]).astype(np.int64)
    return Corpus(np.concatenate(parts), starts, np.array([len(text) for text in TEXTS[split]], np.int64))


def prepare(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(host, "prepare", lambda batch_size: None)
    patch.setattr(accounting, "matmul_peak", lambda dtype: 1e9)


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    prepare(monkeypatch)


@pytest.fixture
def small_text(monkeypatch):
    """Every dataset is a few sentences."""
    monkeypatch.setattr(loop, "load_corpus", corpus)
    monkeypatch.setattr(kvjax.data, "load_corpus", corpus)


@pytest.fixture
def command(monkeypatch) -> Callable[[Callable, Sequence[object]], int]:
    """Function to run a command with arguments as from a shell; its exit status."""

    def run(main: Callable, arguments: Sequence[object]) -> int:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main(main)
        assert isinstance(exit.value.code, int)
        return exit.value.code

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A run of six steps, trained from the command line; not to be changed."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        patch.setattr(loop, "load_corpus", corpus)
        assert train.run([*SMALL, "--root", str(root), "--name", "first", "--json", str(root / "row.json")]) == 0
    return root / "first"
