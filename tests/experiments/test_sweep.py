import argparse
import codecs
import contextlib
import functools
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import kvjax.sweep
from experiments import sweep
from kvjax import ensemble, loop
from kvjax.results import RunLock, read_json, write_json
from kvjax.study import jobs

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--config", "tiny", "--over", "attention.num-kv-heads=1,2", "--decoder.width", "8", "--decoder.depth", "1"),
    *("--attention.num-heads=2", "--attention.head-dim=4", "--decoder.mlp-width", "12", "--data.context", "8"),
    *("--train.steps", "5", "--train.batch-size", "2", "--train.eval-every", "5", "--train.checkpoint-every", "5"),
    *("--train.eval-batch-size", "4", "--train.sample-tokens", "2"),
]


def names(output: str) -> list[str]:
    return [line.split()[-1] for line in output.splitlines() if line.split()[:1] in (["rates"], ["seeds"])]


def work(store, jobs_of, options) -> int:
    return kvjax.sweep.work(store, jobs_of, together=options.together)


@pytest.fixture
def in_process(monkeypatch, small_text, quick_jit):
    """Commands run in this process, quickly compiled, over a few sentences; names, and how many runs each had."""
    ran = []
    for module, make in ((loop, loop.make_step), (ensemble, ensemble.make_step)):
        quick = lambda *given, make=make: quick_jit(make(*given).__wrapped__, donate_argnums=0)
        monkeypatch.setattr(module, "make_step", quick)
    monkeypatch.setattr(loop, "make_scorer", functools.cache(loop.make_scorer))

    def run(arguments, root, log, stop) -> int:
        monkeypatch.chdir(root)
        ran.append((arguments[0], len(arguments) - 2))
        output = codecs.getwriter("utf-8")(log)
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return importlib.import_module(arguments[0]).run(arguments[1:])

    monkeypatch.setattr("kvjax.sweep._run", run)
    monkeypatch.setattr(sweep, "watched", lambda options, again, store, jobs_of: work(store, jobs_of, options))
    return ran


def test_a_sweep_trains_each_run_once(tmp_path, command, capfd, in_process):
    """Seeds follow rates, parameters match, and the same command again does nothing."""
    arguments = [*SMALL, "--seeds", "2", "--match", "params", "--store", tmp_path / "store"]
    arguments += ["--json", tmp_path / "rows.json"]
    assert command(sweep.run, arguments) == 0
    rows = read_json(tmp_path / "rows.json")["rows"]
    assert [(row["label"], row["seed"], row["stage"]) for row in rows] == [
        ("num-kv-heads-1", 0, "rates"),
        ("num-kv-heads-2", 0, "rates"),
        ("num-kv-heads-1", 1, "seeds"),
        ("num-kv-heads-2", 1, "seeds"),
    ]
    assert [row["cache_bytes_per_token"] for row in rows] == [1 * 2 * 4 * 4, 2 * 2 * 4 * 4] * 2
    assert abs(rows[0]["parameters"] - rows[1]["parameters"]) <= 3 * 8 / 2  # half a unit of the MLP
    assert len({row["bits_per_byte"] for row in rows}) == 4
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*") if path.is_file()}
    output = capfd.readouterr().out
    assert all(f"{row['bits_per_byte']:.4f}" in output for row in rows)
    difference = sum(rows[i]["bits_per_byte"] - rows[i + 1]["bits_per_byte"] for i in (0, 2)) / 2
    (paired,) = [line for line in output.splitlines() if line.startswith("| `num-kv-heads-1`")]
    assert f"| {difference:+.4f} (" in paired
    assert command(sweep.run, arguments) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*") if p.is_file()} == stamps


def test_runs_that_train_together_have_the_results_of_their_own(tmp_path, command, in_process):
    """Two rates and one that diverges, then two more seeds of the better one."""
    kept = SMALL.index("--over")
    arguments = [*SMALL[:kept], *SMALL[kept + 2 :], "--peak-lrs", "1e-3,4e-3,1e30", "--seeds", "3"]
    made = {}
    for together in (1, 4):
        store, rows = tmp_path / str(together), tmp_path / f"{together}.json"
        more = ["--together", together, "--store", store, "--json", rows]
        assert command(sweep.run, [*arguments, *more]) == 1
        assert list((store / "claims").iterdir()) == []
        failures = {path.name: read_json(path) for path in (store / "failed").iterdir()}
        made[together] = read_json(rows)["rows"], [(n, f["status"], f["message"]) for n, f in failures.items()]
    assert in_process == [("experiments.train", 1)] * 5 + [("experiments.train_together", n) for n in (3, 2)]
    (alone, failed), (grouped, failed_too) = made.values()
    assert [row["job"] for row in grouped] == [row["job"] for row in alone] and len(alone) == 4
    for ours, theirs in zip(grouped, alone):
        assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=1e-5)
    assert len({row["bits_per_byte"] for row in alone}) == 4
    ((name, status, message),) = failed
    assert name.removesuffix(".json") not in {row["job"] for row in alone} and status == 1
    assert re.match(r"stopped: step \d: loss=\S+, grad_norm=nan on batch \d of seed 0; ", message)
    assert failed_too == failed


def test_the_help_tells_where_training_together_pays():
    """The committed rows' figures."""
    rows = {name: read_json(ROOT / f"notebooks/results/ensemble/{name}.json") for name in ("gqa4", "tiny")}
    times = {
        name: {side["members"]: side["ratio_to_alone"]["median"] for side in row["together"]}
        for name, row in rows.items()
    }
    text, gqa4 = " ".join((sweep.__doc__ or "").split()), times["gqa4"].values()
    assert f"(gqa4: {min(gqa4):.2f} to {max(gqa4):.2f} times as fast as separate runs)" in text
    assert f"(tiny: {times['tiny'][4]:.2f} times with 4)" in text


@pytest.fixture
def listed(tmp_path):
    """Options of a sweep of two, and its jobs."""
    options, rest = sweep.arguments([*SMALL, "--store", str(tmp_path)])
    return options, jobs(sweep.studied(options, rest), {})


def test_jobs_are_listed_and_nothing_is_written(tmp_path, command, capfd, listed):
    store = tmp_path / "new"
    assert command(sweep.run, [*SMALL, "--store", store, "--dry-run", "--seeds", "3"]) == 0
    assert names(capfd.readouterr().out) == [job.name for job in listed[1]]
    assert not store.exists()


def test_one_job_by_its_index(tmp_path, command, listed, monkeypatch):
    monkeypatch.setattr("kvjax.sweep._run", lambda arguments, root, log, stop: write_result(root, arguments))
    monkeypatch.setattr(sweep.signal, "signal", lambda signum, handler: None)
    assert command(sweep.run, [*SMALL, "--store", tmp_path, "--index", "1"]) == 2  # no manifest yet
    assert command(sweep.run, [*SMALL, "--store", tmp_path, "--status"]) == 0
    assert command(sweep.run, [*SMALL, "--store", tmp_path, "--index", "1"]) == 0
    assert [(tmp_path / job.result).exists() for job in listed[1]] == [False, True]
    assert command(sweep.run, [*SMALL, "--store", tmp_path, "--index", "2"]) == 2
    write_json(tmp_path / "failed" / f"{listed[1][0].name}.json", {"message": "no memory"})
    monkeypatch.setattr("kvjax.sweep._run", lambda *given: os.EX_TEMPFAIL)
    assert command(sweep.run, [*SMALL, "--store", tmp_path, "--index", "0"]) == 1
    assert command(sweep.run, [*SMALL, "--store", tmp_path, "--index", "0", "--retry"]) == 75
    assert list((tmp_path / "failed").iterdir()) == []


def test_a_run_that_another_process_writes_has_an_exit_status_of_its_own(tmp_path, command, capfd):
    def write(argv):
        with RunLock(tmp_path):
            pass

    with RunLock(tmp_path):
        assert command(write, []) == 75
    error = capfd.readouterr().err
    assert error.startswith(f"error: run {tmp_path} is being written by process ") and error.count("\n") == 1
    assert command(write, []) == 0


@pytest.fixture
def idle(monkeypatch):
    """Workers that do nothing; the arguments that they got."""
    started = []
    monkeypatch.setattr(sweep, "watched", lambda options, again, store, jobs_of: started.append(again))
    return started


def test_jobs_that_no_worker_did_are_told(tmp_path, command, capfd, idle):
    assert command(sweep.run, [*SMALL, "--store", tmp_path]) == 1
    assert capfd.readouterr().out.splitlines()[-1].startswith("2 jobs are left")
    assert command(sweep.run, [*SMALL, "--store", tmp_path, "--status"]) == 0


def test_failures_are_forgotten_once_and_of_this_sweep_alone(tmp_path, command, listed, idle):
    ours, theirs = (tmp_path / "failed" / f"{name}.json" for name in (listed[1][0].name, "theirs"))
    for path in (ours, theirs):
        write_json(path, {"message": "no memory"})
    for harmless in ("--dry-run", "--status"):
        command(sweep.run, [*SMALL, "--store", tmp_path, "--retry", harmless])
        assert ours.exists() and theirs.exists()
    command(sweep.run, [*SMALL, "--store", tmp_path, "--retry"])
    assert theirs.exists() and not ours.exists()
    assert idle == [[*SMALL, "--store", str(tmp_path), "--worker"]]


def test_workers_end_with_the_command_that_started_them(tmp_path, monkeypatch):
    started, seen = [], []

    def start(arguments):
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        seen.append(arguments)
        return started[-1]

    monkeypatch.setattr(sweep.with_parent, "start", start)
    ours = lambda *_: pytest.fail("the signal came through")
    before = signal.signal(signal.SIGTERM, ours)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    try:
        timer.start()
        with pytest.raises(SystemExit) as ended:
            options = argparse.Namespace(workers=2)
            sweep.watched(options, ["--worker"], kvjax.sweep.Store(tmp_path), lambda: [])
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        timer.join()
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143 and [worker.poll() for worker in started] == [-signal.SIGTERM] * 2
    assert [arguments[:2] for arguments in seen] == [["experiments.sweep", "--worker"]] * 2


def test_slurm_jobs_have_hours(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    given = []
    monkeypatch.setattr(submitit.AutoExecutor, "update_parameters", lambda self, **named: given.append(named))
    monkeypatch.setattr(submitit.AutoExecutor, "submit", lambda self, command: argparse.Namespace(job_id="1"))
    monkeypatch.setattr(submitit.AutoExecutor, "batch", lambda self: contextlib.nullcontext())
    more = ["--slurm", "--slurm-hours", "1.5", "--slurm-options", "partition=gpu,gpus_per_node=1"]
    options, _ = sweep.arguments([*SMALL, "--store", str(tmp_path), *more])
    options.cluster = "debug"  # needs no sbatch
    sweep.submitted(options, [], kvjax.sweep.Store(tmp_path), lambda: [])
    assert given == [{"timeout_min": 90, "slurm_partition": "gpu", "slurm_gpus_per_node": 1}]


def test_data_folders_are_the_same_ones_in_the_store(tmp_path, monkeypatch, listed):
    monkeypatch.chdir(tmp_path)
    folders = ["--data.data-dir", "prepared", "--data.manual-dir", "/by/hand"]
    (variant, _) = sweep.studied(*sweep.arguments([*SMALL, *folders])).variants.values()
    assert (variant.data.data_dir, variant.data.manual_dir) == (str(tmp_path / "prepared"), "/by/hand")
    assert all(job.config["data"]["data_dir"] is None for job in listed[1])


def write_result(root, arguments) -> int:
    write_json(root / arguments[-1] / "result.json", {"bits_per_byte": 1.0})
    return 0


@pytest.mark.parametrize("how", [["--workers", "2"], ["--slurm", "--cluster", "local"]])
def test_workers_are_processes_of_their_own(how, tmp_path, listed):
    """Here or through submitit, by its local stand-in for Slurm; their commands fail at once on a broken run."""
    if "--slurm" in how:
        pytest.importorskip("submitit")
    for job in listed[1]:
        write_json(tmp_path / job.name / "config.json", {})
    arguments = [sys.executable, "-m", "experiments.sweep", *SMALL, "--store", str(tmp_path), *how]
    ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    failed = [line for line in ended.stdout.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2 and all("attention is missing" in line for line in failed)
    assert ("submitted " in ended.stdout) == (tmp_path / "submitit").is_dir() == ("--slurm" in how)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--study", "kv_cache", "--seeds", "3"], "--seeds goes with --config; a study says it itself"),
        (["--study", "kv_cach"], "--study='kv_cach' is unknown; did you mean 'kv_cache'?"),
        (["--study", "kv_cache", "--seed", "3"], "--seed goes with --config"),
        (["--config", "tiny", "--over", "attention.num-kv-heads"], "must be FIELD=A,B, as"),
        (["--config", "tiny", "--over", "attention.num-kv-heds=1"], "did you mean --attention.num-kv-heads?"),
        (["--config", "tiny", "--over", "attention.num-kv-heads=3"], "num_kv_heads=3"),
        (["--config", "tiny", "--peak-lrs", "1e-3,0"], "must be numbers above 0"),
        (["--config", "tiny", "--reference", "mha"], "reference='mha' is unknown"),
        (["--config", "tiny", "--workers", "0"], "--workers=0 must be at least 1"),
        (
            ["--config", "tiny", "--over", "seed=1", "--over", "seed=2"],
            "--over seed must be given once, not twice",
        ),
        (
            ["--config", "tiny", "--over", "decoder.mlp-width=8,9", "--match", "params"],
            "--free decoder.mlp_width must not be one of the --over fields",
        ),
        (["--config", "tiny", "--slurm-options", "a=1,gpu"], "--slurm-options has 'gpu', which must be A=B"),
        (["--config", "tiny", "--slurm-hours", "0"], "--slurm-hours=0.0 must be above 0"),
        (["--config", "tiny", "--together", "0"], "--together=0 must be at least 1"),
        (["--config", "tiny", "--together", "2", "--index", "0"], "--together=2 goes with workers"),
    ],
)
def test_what_cannot_be_swept_is_refused(arguments, message, tmp_path, command, capfd):
    assert command(sweep.run, [*arguments, "--store", tmp_path / "store", "--dry-run"]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "store").exists()
