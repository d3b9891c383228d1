"""Runs of a model of 1,000 parameters that are stopped, killed, damaged and begun again.

As a program, `python tests/test_loop.py DIRECTORY STEP`, this trains until the batch of STEP is asked for and
is then killed.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from kvjax import accounting, loop, results, train
from kvjax.attention.grouped import Grouped
from kvjax.config import Config, OptimizerConfig, TrainConfig, to_dict
from kvjax.data import Corpus, DataConfig, TrainBatches
from kvjax.data.tokenizer import BPETokenizer
from kvjax.decoder import DecoderConfig
from kvjax.metrics import read_metrics
from kvjax.runs import load_run

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
CONFIG = Config(
    Grouped(2, 1, head_dim=4),
    DecoderConfig(width=8, depth=1, mlp_width=12, output_scale=1.0, dropout=0.1),
    DataConfig(tokenizer="bytes", context=8),
    OptimizerConfig(peak_lr=0.02, warmup_steps=2),
    TrainConfig(
        steps=STEPS,
        batch_size=4,
        eval_every=6,
        eval_batch_size=4,
        checkpoint_every=4,
        log_every=1,
        sample_tokens=5,
    ),
    seed=3,
)
TEXTS = {
    "train": [b"a cache of keys and values, " * 3, b"queries read it " * 4],
    "validation": [b"one latent a token", b"heads that share their keys"],
}
ACTIONS = {}
"""What happens when the batch of a step is asked for."""


class Batches(TrainBatches):
    def __getitem__(self, step):
        ACTIONS.get(step, lambda: None)()
        return super().__getitem__(step)


def corpus(config, tokenizer, split) -> Corpus:
    parts = [np.append(tokenizer.end_id, tokenizer.encode(text)).astype(np.int32) for text in TEXTS[split]]
    starts = np.cumsum([0, *map(len, parts)]).astype(np.int64)
    return Corpus(np.concatenate(parts), starts, np.array([len(text) for text in TEXTS[split]], np.int64))


@contextlib.contextmanager
def small_world():
    """Little text, no search for the machine's peak, and every step compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "load_corpus", corpus)
        patch.setattr(loop, "TrainBatches", Batches)
        patch.setattr(loop, "make_step", functools.cache(train.make_step))
        patch.setattr(loop, "make_scorer", functools.cache(loop.make_scorer))
        patch.setattr(accounting, "matmul_peak", lambda dtype: 1e9)
        yield


@pytest.fixture(scope="module", autouse=True)
def world():
    with small_world():
        yield


@pytest.fixture
def at():
    """Function to have something done when the batch of a step (from 0) is asked for."""
    yield ACTIONS.__setitem__
    ACTIONS.clear()


def stop(signum: int = signal.SIGTERM):
    return lambda: os.kill(os.getpid(), signum)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    loop.run(CONFIG, directory)
    return directory


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was stopped after ten of its twelve steps; its checkpoints are those of steps 8 and 10."""
    directory = tmp_path_factory.mktemp("runs") / "stopped"
    ACTIONS[9] = stop()
    try:
        with pytest.raises(loop.Interrupted):
            loop.run(CONFIG, directory)
    finally:
        ACTIONS.clear()
    return directory


@pytest.fixture
def copy(tmp_path):
    """Function to copy a run's directory."""
    return lambda source: Path(shutil.copytree(source, tmp_path / source.name))


def row(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())


def assert_same_run(directory: Path, whole: Path):
    """Equal final states, and every loss, norm and score equal bit for bit: JSON keeps all digits."""
    ours, theirs = row(directory), row(whole)
    assert ours["digest"] == theirs["digest"]
    assert (directory / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (directory / "samples.txt").read_bytes() == (whole / "samples.txt").read_bytes()
    changing = {"tokens_per_second", "share_of_matmul_peak", "wall_seconds", "environment"}
    assert {k: v for k, v in ours.items() if k not in changing} == {
        k: v for k, v in theirs.items() if k not in changing
    }


def test_result_row(whole):
    parameters = 257 * 8 + 8 * 4 * (2 + 1 + 1 + 2) + 3 * 8 * 12 + 3 * 8
    result = row(whole)
    assert result["cache_bytes_per_token"] == 2 * 1 * 4 * 4
    assert (result["cache_slots"], result["cache_bytes"]) == (8, 8 * 32)
    assert result["parameters"] == parameters
    assert result["training_tokens"] == STEPS * 4 * 8
    assert result["training_flops_per_token"] == 3 * (2 * parameters + 4 * 2 * 4 * 4.5)
    assert result["tokens_per_second"] > 0 and result["wall_seconds"] > 0
    assert result["share_of_matmul_peak"] == pytest.approx(
        result["tokens_per_second"] * result["training_flops_per_token"] / 1e9
    )
    assert result["dtype"] == "float32"
    assert (result["documents"], result["tokens"], result["bytes"]) == (2, 18 + 27, 18 + 27)
    assert result["config"] == to_dict(CONFIG) == json.loads((whole / "config.json").read_text())
    assert result["environment"]["device_count"] == 2
    assert len(result["digest"]) == 64 and isinstance(result["sample"], str)
    assert set(result) == {
        *("perplexity", "perplexity_se", "bits_per_byte", "bits_per_byte_se", "documents", "tokens", "bytes"),
        *("cache_bytes_per_token", "cache_bytes", "cache_slots", "parameters", "training_tokens"),
        *("training_flops_per_token", "tokens_per_second", "share_of_matmul_peak", "matmul_peak_flops"),
        *("wall_seconds", "dtype", "digest", "sample", "config", "environment"),
    }


def test_metrics_and_samples(whole):
    lines = read_metrics(whole / "metrics.jsonl")
    training = [line for line in lines if line["kind"] == "train"]
    validation = [line for line in lines if line["kind"] == "validation"]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    assert set(training[0]) == {"step", "kind", "loss", "lr", "grad_norm", "param_norm", "update_norm"}
    assert [line["step"] for line in validation] == [6, 12]
    assert validation[-1]["perplexity"] == row(whole)["perplexity"] < validation[0]["perplexity"]
    samples = (whole / "samples.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in samples] == ["step 6", "step 12"]
    assert samples[-1] == f"step 12: {row(whole)['sample']!r}"


def test_trained_parameters_read_back(whole):
    trained = load_run(whole)
    assert (trained.config, trained.step, trained.damaged) == (CONFIG, STEPS, ())
    assert trained.tokenizer.vocab_size == 257
    like = train.init_state(CONFIG, 257).params
    assert jax.tree.structure(trained.params) == jax.tree.structure(like)


def test_a_finished_run_is_not_trained_again(whole, monkeypatch, capsys):
    monkeypatch.setattr(loop, "Trainer", None)
    assert loop.run(CONFIG, whole) == row(whole)
    assert capsys.readouterr().out == f"{whole} is finished; choose another --name to train again\n"


def test_a_stopped_run_goes_on_bit_for_bit(stopped, whole, copy, capsys):
    directory = copy(stopped)
    assert not (directory / "result.json").exists()
    assert load_run(directory).step == 10
    loop.run(CONFIG, directory)
    assert "resumed at step 10\n" in capsys.readouterr().out
    assert_same_run(directory, whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_between_steps(tmp_path, at, signum):
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    at(0, stop(signum))
    with pytest.raises(loop.Interrupted) as error:
        loop.run(CONFIG, tmp_path / "run")
    assert str(error.value) == f"{signum.name}: saved step 1; the same command goes on from there"
    assert error.value.signum == signum
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert load_run(tmp_path / "run").step == 1


def test_a_signal_during_the_last_step_lets_it_finish(stopped, whole, copy, at):
    directory = copy(stopped)
    at(11, stop())
    loop.run(CONFIG, directory)
    assert_same_run(directory, whole)


def test_a_killed_run_goes_on_bit_for_bit(whole, tmp_path):
    """Killed while a checkpoint is being written, and nothing of the process lives on."""
    directory = tmp_path / "run"
    command = [sys.executable, __file__, str(directory), "8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (directory / "result.json").exists()
    assert max(line["step"] for line in read_metrics(directory / "metrics.jsonl")) == 8
    loop.run(CONFIG, directory)
    assert_same_run(directory, whole)


def test_killed_between_the_last_checkpoint_and_the_result(whole, copy):
    directory = copy(whole)
    (directory / "result.json").unlink()
    loop.run(CONFIG, directory)
    assert_same_run(directory, whole)


def test_a_damaged_checkpoint_is_named_and_passed_over(stopped, whole, copy, capsys):
    directory = copy(stopped)
    newest = directory / "checkpoints" / "10"
    largest = max((p for p in (newest / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    loop.run(CONFIG, directory)
    out = capsys.readouterr().out
    assert f"damaged checkpoint passed over: checkpoint {newest} is damaged: leaf" in out
    assert "resumed at step 8\n" in out
    assert_same_run(directory, whole)


def test_a_loss_that_is_not_finite_stops_the_run(whole, tmp_path, monkeypatch):
    step, calls = loop.make_step(CONFIG, 257, loop.sharding.make_mesh(4)), []

    def poisoned(state, batch):
        calls.append(int(state.step))
        if calls[-1] == 6:
            state = dataclasses.replace(state, params=jax.tree.map(lambda a: a * np.float32(np.nan), state.params))
        return step(state, batch)

    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_step", lambda *_: poisoned)
        with pytest.raises(loop.NotFinite) as error:
            loop.run(CONFIG, directory)
    assert str(error.value) == (
        "step 7: loss=nan, grad_norm=nan on batch 6 of seed 3; no update was made, the last checkpoint is kept"
    )
    assert read_metrics(directory / "metrics.jsonl")[-1]["step"] == 7
    assert load_run(directory).step == 6
    # The fault is gone: the run goes on as if it had never been.
    loop.run(CONFIG, directory)
    assert_same_run(directory, whole)


def test_two_processes_do_not_write_one_run(stopped, copy, tmp_path):
    directory = copy(stopped)
    for path in (directory, tmp_path / "new"):
        with results.RunLock(path):
            before = sorted(p.name for p in path.iterdir())
            with pytest.raises(ValueError, match=f"{path} is being written by process {os.getpid()} on host"):
                loop.run(CONFIG, path)
            assert sorted(p.name for p in path.iterdir()) == before


def test_a_run_keeps_its_configuration(whole):
    other = dataclasses.replace(CONFIG, attention=dataclasses.replace(CONFIG.attention, head_dim=6))
    with pytest.raises(ValueError) as error:
        loop.run(other, whole)
    message = f"{whole} was begun with attention.head_dim=4, not 6; choose another --name"
    assert str(error.value) == message


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"exists and is not a run \(no config.json\); choose another --name"):
        loop.run(CONFIG, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_configuration_edited_after_training_is_noticed(stopped, copy):
    """Nothing of its checkpoint would show another rope_theta or seed."""
    directory = copy(stopped)
    edited = dataclasses.replace(CONFIG, seed=4)
    results.write_json(directory / "config.json", to_dict(edited))
    for use in (lambda: loop.run(edited, directory), lambda: load_run(directory)):
        with pytest.raises(ValueError, match="does not fit the checkpoint, which was trained with seed=3, not 4"):
            use()


def test_a_tokenizer_that_changed_is_noticed(stopped, copy, monkeypatch):
    directory = copy(stopped)
    monkeypatch.setattr(loop, "load_tokenizer", lambda data: BPETokenizer([("a", "b")]))
    with pytest.raises(ValueError, match="does not fit the checkpoint, which was trained with the tokenizer of"):
        loop.run(CONFIG, directory)
    assert json.loads((directory / "tokenizer.json").read_text()) == {"kind": "bytes"}


def fail(*_):
    raise ValueError("no")


def test_nothing_is_left_of_a_run_that_could_not_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(accounting, "matmul_peak", fail)
    with pytest.raises(ValueError, match="no"):
        loop.run(CONFIG, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_what_was_trained_outlives_any_error(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(results, "write_result", fail)
        with pytest.raises(ValueError, match="no"):
            loop.run(CONFIG, tmp_path / "run")
    assert load_run(tmp_path / "run").step == STEPS
    loop.run(CONFIG, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_metrics_of_a_step_are_read_while_the_next_runs(tmp_path, monkeypatch):
    """Reading waits for the device: a step must be on its way before the last one's numbers are asked for."""
    events = []

    class Number:
        def __init__(self, step: int):
            self.step = step

        def __float__(self):
            events.append(("read", self.step))
            return 1.0

    class Nothing:
        def __getattr__(self, name):
            return lambda *arguments, **named: None

    def step(state, batch):
        events.append(("run", state.step + 1))
        return dataclasses.replace(state, step=state.step + 1), {
            "loss": Number(state.step + 1),
            "grad_norm": Number(state.step + 1),
        }

    monkeypatch.setattr(loop, "make_step", lambda *_: step)
    monkeypatch.setattr(loop.Trainer, "_evaluate", lambda self, params, step, bar: events.append(("score", step)))
    schedule = dataclasses.replace(CONFIG.train, steps=7, eval_every=100, checkpoint_every=4)
    trainer = loop.Trainer(dataclasses.replace(CONFIG, train=schedule), tmp_path, loop.sharding.make_mesh(4))
    trainer.peak, trainer.sample = 1.0, ""
    monkeypatch.setattr(loop.Trainer, "_record", lambda *_: None)
    state = train.TrainState(None, None, 0, True)  # type: ignore[arg-type]
    trainer._steps(state, 0, Nothing(), Nothing(), Nothing(), [], lambda: 0.0)
    order = list(dict.fromkeys(events))
    # Step 4 is saved, which waits for it anyway.
    assert order == [
        ("run", 1),
        ("run", 2),
        ("read", 1),
        ("run", 3),
        ("read", 2),
        ("run", 4),
        ("read", 3),
        ("read", 4),
        ("run", 5),
        ("run", 6),
        ("read", 5),
        ("run", 7),
        ("read", 6),
        ("read", 7),
        ("score", 7),
    ]


def test_description_names_what_is_trained():
    lines = loop.describe(CONFIG, 257, np.dtype("float32"))
    assert lines[0].startswith("Grouped(num_heads=2, ") and ", num_kv_heads=1, head_dim=4, " in lines[0]
    assert "32 cache bytes per token in float32" in lines[1]
    assert "12 steps x 4 x 8 tokens of sotu" in lines[2]
    scanned = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, scan=True))
    assert loop.describe(scanned, 257, np.dtype("float32")) == lines


def test_the_batch_must_divide_over_the_devices(tmp_path):
    odd = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, batch_size=6, accumulate=2))
    message = "train.batch_size / accumulate=3 must be a multiple of the 2 devices; nearest: 2 or 4"
    with pytest.raises(ValueError, match=message):
        loop.run(odd, tmp_path / "run")
    single = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, eval_batch_size=1))
    message = "train.eval_batch_size=1 must be a multiple of the 2 devices; nearest: 2$"
    with pytest.raises(ValueError, match=message):
        loop.run(single, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    ACTIONS[int(sys.argv[2])] = stop(signal.SIGKILL)
    with small_world():
        loop.run(CONFIG, Path(sys.argv[1]))
