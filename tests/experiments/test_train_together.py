import dataclasses
import signal

import pytest

from experiments import train_together
from experiments.cli import override, preset
from kvjax import ensemble
from kvjax.config import to_dict
from kvjax.loop import Interrupted, NotFinite
from kvjax.results import write_json, write_result

SMALL = [
    *("--attention.num-heads=2", "--attention.num-kv-heads=1", "--attention.head-dim=4", "--decoder.width=8"),
    *("--decoder.depth=1", "--decoder.mlp-width=12", "--data.context=8", "--train.steps=5"),
    *("--train.batch-size=2", "--train.eval-every=5", "--train.checkpoint-every=5", "--train.eval-batch-size=4"),
    "--train.sample-tokens=2",
]
CONFIG = override(preset("tiny"), SMALL, "", "")


@pytest.fixture
def run_of(tmp_path):
    """Function to make a run's directory, with a configuration; its path."""

    def make(name: str, seed: int = 0, peak_lr: float = 1e-3, config=CONFIG):
        config = dataclasses.replace(config, seed=seed)
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, peak_lr=peak_lr))
        write_json(tmp_path / name / "config.json", to_dict(config))
        return tmp_path / name

    return make


@pytest.fixture
def trained(monkeypatch) -> dict:
    """Directories to their outcomes, or an exception, in place of training; tests/experiments/test_sweep.py trains."""
    outcomes = {}

    def train(runs, mesh):
        if None in outcomes:
            raise outcomes[None]
        for _, directory in runs:
            if isinstance(outcomes[directory], dict):
                write_result(directory, outcomes[directory])
        return {directory: outcomes[directory] for _, directory in runs}

    monkeypatch.setattr(ensemble, "_train", train)
    return outcomes


ROW = {"perplexity": 7.125, "bits_per_byte": 2.5, "tokens_per_second": 1234.5, "wall_seconds": 60.4}
LINE = "perplexity 7.12, 2.5000 bits/byte, 1,234 tokens/s, 60 s"


def test_each_run_has_its_line_and_one_that_diverges_its_status(run_of, command, capsys, trained):
    """Finished ones are left as they are, alone and beside others."""
    first, second = run_of("first", seed=3), run_of("second", peak_lr=1e30)
    trained |= {first: ROW, second: NotFinite("step 2: loss=nan")}
    assert command(train_together.run, ["--runs", first, second]) == 1
    assert capsys.readouterr().out == f"{first}: {LINE}\n{second} stopped: step 2: loss=nan\n"
    trained |= {first: {}, second: ROW}
    assert command(train_together.run, ["--runs", first, second]) == 0
    finished = "is finished; choose another --name to train again\n"
    assert capsys.readouterr().out == f"{first} {finished}{first}: {LINE}\n{second}: {LINE}\n"
    assert command(train_together.run, ["--runs", second]) == 0
    assert capsys.readouterr().out == f"{second} {finished}{second}: {LINE}\n"


def test_a_signal_is_the_exit_status(run_of, command, capsys, trained):
    trained[None] = Interrupted("SIGTERM: saved step 2", signal.SIGTERM)
    assert command(train_together.run, ["--runs", run_of("a"), run_of("b", 1)]) == 143
    assert capsys.readouterr().err == "stopped: SIGTERM: saved step 2\n"


WIDER = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, width=10))
OTHER_BATCH = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, batch_size=4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda of: [of("a"), of("b", 1), of("a")], "a must be named once, not 2 times"),
        (lambda of: [of("a"), of("a").parent / "b" / ".." / "a"], "a must be named once, not 2 times"),
        (lambda of: [of("a"), of("b")], "seed=0 with optimizer.peak_lr=0.001 must be one member, not several"),
        (lambda of: [of("a"), of("b", 1, config=WIDER)], "decoder.width=10 of member 1 must be 8, as of member 0"),
        (lambda of: [of("a"), of("b", 1, config=OTHER_BATCH)], "train.batch_size=4 of member 1 must be 2"),
        (lambda of: [of("a"), of("a").parent / "b"], "b' must be the directory of a run: it has no config.json"),
        (lambda of: [of("a"), "--run"], "unrecognized arguments: --run"),
        (lambda of: [], "expected at least one argument"),
    ],
)
def test_what_cannot_go_together_is_refused(make, message, run_of, command, capsys, tmp_path):
    arguments = ["--runs", *make(run_of)]
    before = sorted(tmp_path.rglob("*"))
    assert command(train_together.run, arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
