"""Workers on one store; jobs are `python -m job`, from a file in the store."""

import dataclasses
import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvjax import sweep, with_parent
from kvjax.results import read_json, write_json
from kvjax.study import Job, Step

JOB = """
import json, os, pathlib, sys, time
name, seconds, status = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
with open("order.log", "a") as log:
    log.write(f"{name} {os.getpid()}\\n")
time.sleep(seconds)
if status:
    sys.exit(f"no result: {name}")
pathlib.Path(name).mkdir(exist_ok=True)
pathlib.Path(name, "result.json").write_text(json.dumps({"of": name}))
"""
WORKER = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
import test_sweep
from kvjax import sweep
sweep.work(sweep.Store(Path(sys.argv[1])), lambda: [test_sweep.job("slow", 60.0)])
"""


def job(name: str, seconds: float = 0.0, status: int = 0) -> Job:
    return Job(name, "rates", {}, (Step(("job", name, str(seconds), str(status)), f"{name}/result.json"),))


@pytest.fixture
def store(tmp_path) -> sweep.Store:
    (tmp_path / "job.py").write_text(JOB)
    return sweep.Store(tmp_path)


def started(store: sweep.Store) -> list[str]:
    path = store.root / "order.log"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def test_each_job_is_done_once_by_several_workers(store):
    every = [job(f"job{i}", 0.05) for i in range(9)]
    done = []
    workers = [
        threading.Thread(target=lambda: done.append(sweep.work(store, lambda: every, 0.1))) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sum(done) == 9 and sorted(started(store)) == sorted(job.name for job in every)
    assert store.finished(every) == {job.name: {"of": job.name} for job in every}
    assert sweep.work(store, lambda: every) == 0 and len(started(store)) == 9
    assert store.claimed() == {}


def test_results_open_new_jobs_which_come_first(store):
    def known():
        first = [job("a"), job("z")]
        return [first[0], job("b"), first[1]] if store.finished(first) else first

    assert sweep.work(store, known) == 3 and started(store) == ["a", "b", "z"]


def test_what_a_killed_worker_left_is_done_by_another(store, monkeypatch):
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    worker = subprocess.Popen([sys.executable, "-c", WORKER.format(paths=paths), str(store.root)])
    deadline = time.monotonic() + 60
    try:
        while not started(store) and time.monotonic() < deadline:
            time.sleep(0.05)
        (line,) = (store.root / "order.log").read_text().splitlines()
        command = int(line.split()[1])
        assert _alive(command)
        assert store.claim(job("slow")) is None
    finally:
        worker.kill()
        worker.wait()
    monkeypatch.setattr(sweep, "STALE_SECONDS", 0.0)
    assert sweep.work(store, lambda: [job("slow")], 0.1) == 1
    assert started(store) == ["slow", "slow"] and store.finished([job("slow")])
    while _alive(command) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(command)  # it went with its worker


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_stale_claim_has_one_heir_and_its_owner_gives_up(store, monkeypatch):
    monkeypatch.setattr(sweep, "BEAT_SECONDS", 0.05)
    slow = job("slow", 60.0)
    claim = store.claim(slow)
    assert claim is not None and store.claim(slow) is None
    path = store.root / "claims" / "slow.0"
    os.utime(path, (0, 0))
    heirs = [store.claim(slow) for _ in range(3)]
    assert sum(heir is not None for heir in heirs) == 1
    with claim:
        began = time.monotonic()
        store.do([slow], lambda: claim.lost)
        assert claim.lost and time.monotonic() - began < 30
    assert store.failed([slow]) == {} and store.finished([slow]) == {}


def test_a_claim_is_kept_fresh(store, monkeypatch):
    monkeypatch.setattr(sweep, "BEAT_SECONDS", 0.05)
    claim = store.claim(job("a"))
    assert claim is not None
    path = store.root / "claims" / "a.0"
    os.utime(path, (0, 0))
    with claim:
        deadline = time.monotonic() + 20
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert store.claimed()["a"] < 20 and not claim.lost


def test_a_claim_let_go_while_it_is_looked_at_is_none(store):
    (store.root / "claims").mkdir()
    for name in ("a.3", "b.0"):  # listed, but not there
        (store.root / "claims" / name).symlink_to("nowhere")
    assert store.claimed() == {}
    assert store.claim(job("a")) is not None and set(store.claimed()) == {"a"}


def test_a_claim_outlives_a_file_system_that_does_not_answer_for_a_while(store, monkeypatch):
    monkeypatch.setattr(sweep, "BEAT_SECONDS", 0.02)
    claim, path, touch = store.claim(job("a")), store.root / "claims" / "a.0", os.utime
    assert claim is not None
    touch(path, (0, 0))
    errors = [OSError(errno.ESTALE, "stale"), OSError(errno.EIO, "input/output")]

    def utime(*given):
        if errors:
            raise errors.pop()
        touch(*given)

    monkeypatch.setattr(sweep.os, "utime", utime)
    with claim:
        deadline = time.monotonic() + 20
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert path.stat().st_mtime > 0 and not claim.lost and not errors


def test_a_busy_run_is_left_open_and_tried_again_later(store, monkeypatch):
    every = [job("busy", status=os.EX_TEMPFAIL), job("other")]
    (store.root / "job.py").write_text(JOB.replace('sys.exit(f"no result: {name}")', "sys.exit(status)"))
    assert sweep.attempt(store, every) == 0 and sweep.attempt(store, every[1:]) == 1
    assert store.failed(every) == {} and store.open(every) == every[:1] and store.claimed() == {}
    assert sweep.attempt(store, every) == 0 and started(store) == ["busy", "other"]  # not at once
    monkeypatch.setattr(sweep, "BUSY_SECONDS", 0.0)
    (store.root / "job.py").write_text(JOB.replace("if status:", "if not status:"))
    assert sweep.work(store, lambda: every) == 1 and started(store) == ["busy", "other", "busy"]


def test_of_several_of_which_one_was_busy_each_is_tried_alone(store, monkeypatch):
    every, ran = [training("a", seed) for seed in range(3)], []

    def run(command, root, log, stop) -> int:
        names = [argument for argument in command[1:] if not argument.startswith("--")]
        ran.append(names)
        if every[1].name in names and len(ran) < 5:
            return os.EX_TEMPFAIL
        for name in names:
            write_json(root / name / "result.json", {})
        return 0

    monkeypatch.setattr(sweep, "_run", run)
    monkeypatch.setattr(sweep, "BUSY_SECONDS", 0.0)
    assert sweep.work(store, lambda: every, 0.01, together=3) == 3
    names = [job.name for job in every]
    assert ran == [names, names[1:2], names[2:], names[:1], names[1:2]]


def test_commands_find_the_data_of_their_worker(store, monkeypatch):
    (store.root / "where.py").write_text(
        "import os; print(os.environ['KVJAX_DATA'], os.environ.get('KVJAX_PARENT'))"
    )
    monkeypatch.chdir(store.root.parent)
    monkeypatch.setenv("KVJAX_DATA", "data")
    with open(store.root / "log", "wb") as log:
        assert sweep._run(("where",), store.root, log, lambda: False) == 0
    assert (store.root / "log").read_text() == f"{store.root.parent / 'data'} None\n"


def test_a_command_whose_parent_died_before_it_could_ask_does_not_run(store):
    environment = {**os.environ, with_parent.PARENT: "1000000000"}  # above any process id
    command = [sys.executable, "-m", "kvjax.with_parent", "job", "a", "0", "0"]
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    assert subprocess.run(command, cwd=store.root, env=environment, timeout=60).returncode == 143
    assert started(store) == []


def test_a_failure_is_kept_with_its_last_words_and_done_again_only_when_asked(store):
    every = [job("bad", status=1), job("good")]
    assert sweep.work(store, lambda: every) == 2
    assert store.failed(every) == {
        "bad": {"command": ["job", "bad", "0.0", "1"], "status": 1, "message": "no result: bad"}
    }
    assert sweep.work(store, lambda: every) == 0
    write_json(store.root / "failed" / "other.json", {})
    store.forget_failures(every)
    assert [path.name for path in (store.root / "failed").iterdir()] == ["other.json"]
    assert sweep.work(store, lambda: every) == 1 and started(store) == ["bad", "good", "bad"]
    write_json(store.root / "bad" / "result.json", {"of": "another worker"})
    assert store.failed(every) == {}


def test_a_configuration_is_written_before_the_command_and_not_over_one(store):
    made = [dataclasses.replace(job(name), config={"seed": 1}) for name in "ab"]
    write_json(store.root / "b" / "config.json", {"seed": 7})
    assert sweep.work(store, lambda: made) == 2
    assert [read_json(store.root / name / "config.json") for name in "ab"] == [{"seed": 1}, {"seed": 7}]


def test_a_step_whose_work_is_there_is_not_done_again(store):
    first, second = job("first").steps[0], Step(("job", "second", "0", "1"), "second/result.json")
    both = [Job("both", "rates", {}, (first, second))]
    assert sweep.work(store, lambda: both) == 1 and list(store.failed(both)) == ["both"]
    (store.root / "job.py").write_text(JOB.replace("if status:", "if not status:"))
    store.forget_failures(both)
    assert sweep.work(store, lambda: both) == 1 and started(store) == ["first", "second", "second"]
    assert store.finished(both) == {"both": {"of": "second"}}


def test_the_manifest_keeps_all_jobs_that_were_ever_wanted(store):
    store.record([job("a")])
    store.record([job("b"), job("c")])
    manifest = read_json(store.root / "manifest.json")
    assert list(manifest) == ["a", "b", "c"] and manifest["b"]["steps"] == [
        [["job", "b", "0.0", "0"], "b/result.json"]
    ]


def test_jobs_that_are_added_at_once_all_get_places_that_stay(store, monkeypatch):
    def slow(path, value):
        time.sleep(0.05)
        write_json(path, value)

    monkeypatch.setattr(sweep, "write_json", slow)
    store.record([job("first")])
    threads = [threading.Thread(target=store.record, args=([job("first"), job(name)],)) for name in "abcd"]
    for thread in threads:
        thread.start()
    seen = [store.listed()]
    while any(thread.is_alive() for thread in threads):
        seen.append(store.listed())
    seen.append(store.listed())
    assert sorted(seen[-1]) == ["a", "b", "c", "d", "first"]
    assert all(seen[-1][: len(names)] == names for names in seen)


def training(label: str, seed: int, peak_lr: float = 1e-3, width: int = 8) -> Job:
    config = {"seed": seed, "optimizer": {"peak_lr": peak_lr}, "decoder": {"width": width}}
    name = f"{label}-{seed}-{peak_lr}-{width}"
    step = Step(("experiments.train", "--run", name), f"{name}/result.json")
    return Job(name, "rates", {"label": label}, (step,), config)


@pytest.fixture
def commands(store, monkeypatch):
    """What workers ran, with the jobs claimed meanwhile; all have results, but of seed 666."""
    ran = []

    def run(command, root, log, stop) -> int:
        names = [argument for argument in command[1:] if not argument.startswith("--")]
        ran.append((command[0], names, set(store.claimed())))
        bad = [name for name in names if "-666-" in name]
        for name in names:
            if name not in bad:
                write_json(root / name / "result.json", {"of": name})
        for name in bad:
            log.write(f"{name} stopped: its loss is not finite\n".encode())
        log.write(b"the last line\n")
        return 1 if bad else 0

    monkeypatch.setattr(sweep, "_run", run)
    return ran


def test_jobs_that_differ_in_seed_and_rate_alone_go_together(store, commands):
    every = [training("a", 0), training("b", 0), training("a", 1), job("other"), training("a", 0, 2e-3)]
    every += [training("a", 2, width=9), training("a", 3), training("b", 1)]
    assert sweep.work(store, lambda: every, together=3) == len(every)
    groups = [[0, 2, 4], [1, 7], [3], [5], [6]]
    assert [set(names) & {job.name for job in every} for _, names, _ in commands] == [
        {every[i].name for i in group} for group in groups
    ]
    one, several = "experiments.train", "experiments.train_together"
    assert [command for command, _, _ in commands] == [several, several, "job", one, one]
    assert [claimed for _, _, claimed in commands] == [{every[i].name for i in group} for group in groups]
    assert store.claimed() == {} and store.failed(every) == {} and len(store.finished(every)) == len(every)
    assert all(read_json(store.root / job.name / "config.json") == job.config for job in every if job.config)


def test_members_that_others_do_are_left_to_them(store, commands):
    every = [training("a", seed) for seed in range(4)]
    theirs = store.claim(every[1])
    write_json(store.root / every[2].result, {"of": "another worker"})
    assert sweep.attempt(store, every, 4) == 2
    assert commands == [
        ("experiments.train_together", [every[0].name, every[3].name], {every[i].name for i in (0, 1, 3)})
    ]
    assert theirs is not None and list(store.claimed()) == [every[1].name]


def test_a_member_without_result_fails_alone(store, commands):
    every = [training("a", 0), training("a", 666), training("a", 2)]
    assert sweep.work(store, lambda: every, together=4) == 3
    assert list(store.finished(every)) == [every[0].name, every[2].name]
    names = [job.name for job in every]
    assert store.failed(every) == {
        names[1]: {
            "command": ["experiments.train_together", "--runs", *names],
            "status": 1,
            "message": "stopped: its loss is not finite",
        }
    }
    assert store.claimed() == {}


def test_a_command_that_breaks_fails_all_of_its_members_with_its_last_line(store, monkeypatch):
    every = [training("a", 0), training("a", 1)]
    monkeypatch.setattr(sweep, "_run", lambda command, root, log, stop: (log.write(b"x\nno memory\n"), 137)[1])
    assert sweep.work(store, lambda: every, together=2) == 2
    assert [failure["message"] for failure in store.failed(every).values()] == ["no memory"] * 2


def test_all_stop_where_one_claim_is_lost(store, monkeypatch):
    monkeypatch.setattr(sweep, "BEAT_SECONDS", 0.02)
    every = [training("a", 0), training("a", 1)]

    def run(command, root, log, stop) -> int:
        os.utime(store.root / "claims" / f"{every[1].name}.0", (0, 0))
        (store.root / "claims" / f"{every[1].name}.1").touch()  # as an heir would
        deadline = time.monotonic() + 20
        while not stop() and time.monotonic() < deadline:
            time.sleep(0.02)
        return 143

    monkeypatch.setattr(sweep, "_run", run)
    assert sweep.attempt(store, every, 2) == 0
    assert store.failed(every) == {} and list(store.claimed()) == [every[1].name]
