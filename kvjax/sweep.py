"""Workers on one store of jobs: each job is done once, whoever does it, and again if its worker dies.

A claim is a file made exclusively, `claims/JOB.0`; its owner touches it now and then. One that was not touched for
`STALE_SECONDS` is overtaken by making `claims/JOB.1`, which only one worker can; the former owner, should it be
alive, sees that and stops. Nothing is locked, so a store may lie on a shared file system.

A worker may claim several training jobs and do them by one command (`experiments.train_together`).
"""

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from kvjax.metrics import read_metrics
from kvjax.results import read_json, run_name, write_json
from kvjax.study import Job, alike

BEAT_SECONDS = 15.0
STALE_SECONDS = 120.0
MANIFEST, CLAIMS, FAILED, LOGS, CONFIG = "manifest.json", "claims", "failed", "logs", "config.json"


class Claim:
    """A job of this worker's, kept fresh by a thread until the block ends, and then let go."""

    def __init__(self, path: Path):
        self._path, self._ended, self._lost = path, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        if not self.lost:
            self.release()

    def release(self) -> None:
        """Let the job go, with what claims were left of it."""
        for path in self._path.parent.glob(f"{self._path.stem}.*"):
            path.unlink(missing_ok=True)

    @property
    def lost(self) -> bool:
        """Whether another worker has overtaken it."""
        return self._lost.is_set()

    def _beat(self):
        generation = int(self._path.suffix[1:])
        while not self._ended.wait(BEAT_SECONDS):
            try:
                os.utime(self._path)
            except FileNotFoundError:  # an heir has already ended it
                self._lost.set()
            if self.lost or self._path.with_suffix(f".{generation + 1}").exists():
                self._lost.set()
                return


class Store:
    """A directory of jobs: one directory each, beside claims, failures and logs."""

    def __init__(self, root: Path):
        self.root = Path(root)

    def finished(self, jobs: list[Job]) -> dict[str, dict[str, Any]]:
        """Results by job's name."""
        places = {job.name: self.root / job.result for job in jobs}
        return {name: read_json(place) for name, place in places.items() if place.is_file()}

    def open(self, jobs: list[Job]) -> list[Job]:
        """Jobs without result or failure, whether or not somebody is at them."""
        finished, failed = self.finished(jobs), self.failed(jobs)
        return [job for job in jobs if job.name not in finished and job.name not in failed]

    def failed(self, jobs: list[Job]) -> dict[str, dict[str, Any]]:
        """What went wrong with jobs that ended without a result, by name."""
        places = {job.name: self.root / FAILED / f"{job.name}.json" for job in jobs}
        return {name: read_json(place) for name, place in places.items() if place.is_file()}

    def record(self, jobs: list[Job]) -> None:
        """Add jobs to the manifest, which names all that were ever wanted here."""
        path = self.root / MANIFEST
        known = read_json(path) if path.is_file() else {}
        if any(job.name not in known for job in jobs):
            write_json(path, known | {job.name: dataclasses.asdict(job) for job in jobs})

    def listed(self) -> list[str]:
        """Names of the manifest's jobs, in the order in which they were added."""
        path = self.root / MANIFEST
        return list(read_json(path)) if path.is_file() else []

    def forget_failures(self) -> None:
        """Failed jobs are to be done again."""
        for path in (self.root / FAILED).glob("*.json"):
            path.unlink()

    def claimed(self) -> dict[str, float]:
        """Seconds since each claimed job's worker was last heard of."""
        now, ages = self._now(), {}
        for path in (self.root / CLAIMS).glob("*.*"):
            if path.suffix[1:].isdecimal():
                age = now - path.stat().st_mtime
                ages[path.stem] = min(age, ages.get(path.stem, age))
        return ages

    def claim(self, job: Job) -> Claim | None:
        """This worker's claim, None where another worker's stands or there is a result."""
        if (self.root / job.result).is_file():
            return None
        folder = self.root / CLAIMS
        folder.mkdir(parents=True, exist_ok=True)
        claims = [path for path in folder.glob(f"{run_name(job.name)}.*") if path.suffix[1:].isdecimal()]
        newest = max(claims, key=lambda path: int(path.suffix[1:]), default=None)
        if newest is not None and self._now() - newest.stat().st_mtime < STALE_SECONDS:
            return None
        generation = 0 if newest is None else int(newest.suffix[1:]) + 1
        path = folder / f"{job.name}.{generation}"
        try:
            with open(path, "x") as file:
                file.write(f"process {os.getpid()} on host {socket.gethostname()}\n")
        except FileExistsError:
            return None
        claim = Claim(path)
        if (self.root / job.result).is_file():  # its owner ended it and let go just before
            claim.release()
            return None
        return claim

    def do(self, jobs: Sequence[Job], lost: Callable[[], bool]) -> None:
        """Run a job's steps, or one command for several, until all is done, a command fails or `lost` says so.

        What they print goes to the log of the first. A job without a result then has failed.
        """
        for job in jobs:
            if job.config is not None and not (self.root / job.name / CONFIG).exists():
                write_json(self.root / job.name / CONFIG, dict(job.config))
        (self.root / LOGS).mkdir(exist_ok=True)
        path = self.root / LOGS / f"{jobs[0].name}.log"
        command: tuple[str, ...] = ()
        status = start = 0
        for command in self._commands(jobs):
            with open(path, "ab") as log:
                start = log.tell()
                status = _run(command, self.root, log, lost)
            if lost():
                return
            if status != 0:
                break
        for job in jobs:
            if not (self.root / job.result).is_file():
                printed = path.read_bytes()[start:].decode(errors="replace").strip().splitlines()
                failure = {"command": list(command), "status": status, "message": _last_words(printed, job.name)}
                write_json(self.root / FAILED / f"{job.name}.json", failure)

    def _commands(self, jobs):
        if len(jobs) > 1:
            return [("experiments.train_together", "--runs", *(job.name for job in jobs))]
        return [step.arguments for step in jobs[0].steps if not (self.root / step.makes).exists()]

    def _now(self) -> float:
        """The file system's clock, which may not be this host's."""
        folder = self.root / CLAIMS
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock-") as probe:
            return os.fstat(probe.fileno()).st_mtime


def _last_words(printed, name) -> str:
    """What was printed of a run that stopped while others went on, or the last line."""
    stopped = [line.removeprefix(f"{name} ") for line in printed if line.startswith(f"{name} stopped: ")]
    return "".join((stopped or printed)[-1:])


def _run(command, root, log, stop) -> int:
    """Exit status of `python -m COMMAND` in `root`; it is ended where `stop` says so, or this process dies."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_checkout()), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "kvjax.with_parent", *command],
        cwd=root,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    try:
        while True:
            try:
                return process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                if stop():
                    process.terminate()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _checkout() -> Path:
    return Path(__file__).resolve().parents[1]


def work(store: Store, jobs_of: Callable[[], list[Job]], poll_seconds: float = 5.0, together: int = 1) -> int:
    """Do jobs that nobody does until all have ended; how many were done here.

    `jobs_of` lists those known so far. Up to `together` that are alike are done at a time.
    """
    done = 0
    while open_jobs := store.open(jobs_of()):
        for job in open_jobs:
            others = [other for other in open_jobs if alike(job, other)] if together > 1 else []
            if ended := attempt(store, [job, *others], together):
                done += ended
                break  # results may open others that come first
        else:
            time.sleep(poll_seconds)  # what others are at may open new jobs
    return done


def attempt(store: Store, jobs: Sequence[Job], most: int = 1) -> int:
    """Claim the first of these jobs, and then others up to `most`, and do them; how many have ended by that."""
    with contextlib.ExitStack() as held:  # claims are let go also where this worker is told to stop
        mine: list[Job] = []
        claims: list[Claim] = []
        for job in jobs:
            claim = store.claim(job) if len(mine) < most else None
            if claim is not None:
                mine.append(job)
                claims.append(held.enter_context(claim))
            elif not mine:
                return 0
        lost = lambda: any(claim.lost for claim in claims)
        store.do(mine, lost)
        return 0 if lost() else len(mine)


def progress(root: Path, job: Job) -> tuple[int, int] | None:
    """Steps made and to make of a training job that is under way."""
    if job.config is None:
        return None
    path, total = root / job.name / "metrics.jsonl", job.config["train"]["steps"]
    steps = [row["step"] for row in read_metrics(path)] if path.exists() else []
    return max(steps, default=0), total
