"""Workers on one store of jobs: each job is done once, whoever does it, and again if its worker dies.

A claim is a file made exclusively, `claims/JOB.0`; its owner touches it now and then. One that was not touched for
`STALE_SECONDS` is overtaken by making `claims/JOB.1`, which only one worker can; the former owner, should it be
alive, sees that and stops. Claims need no locks. Locked, by `flock`, are each run's own directory,
by the command that trains there, and the manifest, while jobs are added: a store may lie on any shared file system
that has these locks. A run that its former owner's command still writes is tried again later.

A worker may claim several training jobs and do them by one command (`experiments.train_together`).
"""

import contextlib
import dataclasses
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from kvjax import with_parent
from kvjax.data.store import data_folder, locked
from kvjax.metrics import read_metrics
from kvjax.results import read_json, run_name, write_json
from kvjax.runs import CONFIG
from kvjax.study import Job, alike

BEAT_SECONDS = 15.0
STALE_SECONDS = 120.0
BUSY_SECONDS = 60.0
"""Until a run that another process was writing is tried again."""
MANIFEST, CLAIMS, FAILED, LOGS = "manifest.json", "claims", "failed", "logs"


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
                overtaken = self._path.with_suffix(f".{generation + 1}").exists()
            except FileNotFoundError:  # an heir has already ended it
                overtaken = True
            except OSError:  # a file system that does not answer now may do at the next beat
                continue
            if overtaken:
                self._lost.set()
                return


class Store:
    """A directory of jobs: one directory each, beside claims, failures and logs."""

    def __init__(self, root: Path):
        self.root = Path(root)
        self.busy: dict[str, float] = {}
        """When each job whose run another process was writing was last tried, by this process's clock."""

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
        found = {}
        for job in jobs:
            if not (self.root / job.result).is_file():
                with contextlib.suppress(FileNotFoundError):  # none, or forgotten just now
                    found[job.name] = read_json(self._failure(job))
        return found

    def _failure(self, job: Job) -> Path:
        return self.root / FAILED / f"{job.name}.json"

    def record(self, jobs: list[Job]) -> None:
        """Add jobs to the manifest, which names all that were ever wanted here."""
        if {job.name for job in jobs} <= self._manifest().keys():
            return
        with locked(self.root / f".{MANIFEST}.lock"):
            # Known jobs keep their places, whoever added others meanwhile.
            added = {job.name: dataclasses.asdict(job) for job in jobs}
            write_json(self.root / MANIFEST, self._manifest() | added)

    def listed(self) -> list[str]:
        """Names of the manifest's jobs, in the order in which they were added."""
        return list(self._manifest())

    def _manifest(self) -> dict[str, Any]:
        path = self.root / MANIFEST
        return read_json(path) if path.is_file() else {}

    def forget_failures(self, jobs: list[Job]) -> None:
        """Those of these jobs that failed are to be done again."""
        for job in jobs:
            self._failure(job).unlink(missing_ok=True)

    def claimed(self) -> dict[str, float]:
        """Seconds since each claimed job's worker was last heard of."""
        now, ages = self._now(), {}
        for path in (self.root / CLAIMS).glob("*.*"):
            if path.suffix[1:].isdecimal() and (beat := _last_beat(path)) is not None:
                ages[path.stem] = min(now - beat, ages.get(path.stem, now - beat))
        return ages

    def claim(self, job: Job) -> Claim | None:
        """This worker's claim; None where another's stands, there is a result, or it was busy a moment ago."""
        tried = self.busy.get(job.name, -BUSY_SECONDS)
        if (self.root / job.result).is_file() or time.monotonic() - tried < BUSY_SECONDS:
            return None
        folder = self.root / CLAIMS
        folder.mkdir(parents=True, exist_ok=True)
        claims = [path for path in folder.glob(f"{run_name(job.name)}.*") if path.suffix[1:].isdecimal()]
        newest = max(claims, key=lambda path: int(path.suffix[1:]), default=None)
        generation = 0
        if newest is not None and (beat := _last_beat(newest)) is not None:
            if self._now() - beat < STALE_SECONDS:
                return None
            generation = int(newest.suffix[1:]) + 1
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

    def do(self, jobs: Sequence[Job], lost: Callable[[], bool]) -> bool:
        """Run a job's steps, or one command for several, until all is done, a command fails or `lost` says so.

        What they print goes to the log of the first. A job without a result then has failed. False where they are
        left open: they were lost, or a command says that another process is at them.
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
                return False
            if status == os.EX_TEMPFAIL:
                self.busy |= {job.name: time.monotonic() for job in jobs}
                return False
            if status != 0:
                break
        for job in jobs:
            if not (self.root / job.result).is_file():
                printed = path.read_bytes()[start:].decode(errors="replace").strip().splitlines()
                failure = {"command": list(command), "status": status, "message": _last_words(printed, job.name)}
                write_json(self._failure(job), failure)
        return True

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


def _last_beat(path: Path) -> float | None:
    """When a claim was last touched; None where it was let go since it was listed."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


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
    if "KVJAX_DATA" in os.environ:
        environment["KVJAX_DATA"] = str(data_folder().absolute())  # the command runs in another directory
    process = with_parent.start(command, environment, cwd=root, stdout=log, stderr=subprocess.STDOUT)
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
            # Of several that were tried together one was busy: each is tried alone.
            alone = together == 1 or job.name in store.busy
            others = [] if alone else [o for o in open_jobs if alike(job, o) and o.name not in store.busy]
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
        return len(mine) if store.do(mine, lost) else 0


def progress(root: Path, job: Job) -> tuple[int, int] | None:
    """Steps made and to make of a training job that is under way."""
    if job.config is None:
        return None
    path, total = root / job.name / "metrics.jsonl", job.config["train"]["steps"]
    steps = [row["step"] for row in read_metrics(path)] if path.exists() else []
    return max(steps, default=0), total
