"""Results: one directory per run, holding JSON files that are written whole or not at all."""

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import re
import socket
import subprocess
from pathlib import Path
from typing import Any, NoReturn, Self

import jax

from kvjax.files import atomic_file


def plain(value: Any, name: str) -> Any:
    """`value` as JSON returns it (tuples become lists); ValueError naming a field that JSON cannot hold."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} must be finite: JSON has no such number")
        return float(value)
    if isinstance(value, list | tuple):
        return [plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{name} has the key {key!r}: JSON keys must be strings")
        return {key: plain(item, f"{name}.{key}") for key, item in value.items()}
    raise ValueError(
        f"{name} is a {type(value).__name__}: JSON holds only dict, list, str, int, float, bool and None"
    )


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` with `value` as JSON in one step, durably; ValueError as in `plain`."""
    path = Path(path)
    text = json.dumps(plain(value, path.stem), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` with `content`: a crash at any moment leaves the old file or the new one."""
    with atomic_file(path) as file:
        file.write(content)


def read_json(path: Path) -> Any:
    """The value in `path`; ValueError naming the file if it is not JSON."""
    try:
        return json.loads(Path(path).read_bytes().decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def run_name(name: str) -> str:
    """`name` if it can name a run's directory, else ValueError."""
    rule = None
    if not name:
        rule = "must not be empty"
    elif len(name) > 100:
        rule = f"must be at most 100 characters long, not {len(name)}"
    elif not re.fullmatch("[A-Za-z0-9._-]+", name):
        rule = f"must hold only letters, digits, '.', '_' and '-'; try {_nearest_name(name)}"
    elif name[0] in ".-" or ".." in name:
        rule = f"must not start with '.' or '-', nor hold '..'; try {_nearest_name(name)}"
    if rule is not None:
        raise ValueError(f"name={name[:120]!r} {rule}")
    return name


def _nearest_name(name: str) -> str:
    name = re.sub(r"\.{2,}", ".", re.sub("[^A-Za-z0-9._-]+", "-", name))
    return repr(name.strip(".-") or "run")


class Busy(ValueError):
    """Another process is writing there: the same again, later, may do."""


class RunLock:
    """Context manager that keeps a run's directory to one writing process; Busy if another one has it.

    The kernel frees it however the process ends.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._file: int | None = None

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        file = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Empty between the holder's locking and writing.
            holder = os.pread(file, 1000, 0).decode().strip() or "another process"
            os.close(file)
            raise Busy(
                f"run {self.directory} is being written by {holder}; wait for it or choose another --name"
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)
        self._file = file
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._file is not None
        # The file stays: were it unlinked, a third process could lock a new one while a second holds this.
        os.close(self._file)
        self._file = None


def git_revision() -> dict[str, Any] | None:
    """`{"revision": 40 hex digits, "dirty": bool}` of the checkout that holds this file, or None."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()

    try:
        # An installed copy may lie in an ignored folder of somebody else's checkout.
        git("ls-files", "--error-unmatch", here.name)
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> dict[str, Any]:
    """Versions, devices, CPU and code revision that a result was made with; without the machine's name."""
    devices = jax.devices()
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "platform": platform.platform(),
        "backend": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "cpu_model": _cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "git": git_revision(),
    }


def _cpu_model() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def write_result(directory: Path, row: dict[str, Any]) -> None:
    """Writes `row` as the run's one result, `directory/result.json`."""
    if "run" in row:
        raise ValueError(f"row.run={row['run']!r} must not be given: the directory's name is the run")
    write_json(Path(directory) / "result.json", row)


def read_results(root: Path) -> list[dict[str, Any]]:
    """Rows of the runs in `root`, by name, each with its `run`; ValueError naming a file that is broken."""
    rows = []
    for path in sorted(Path(root).glob("*/result.json")):
        row = read_json(path)
        if not isinstance(row, dict) or "run" in row:
            raise ValueError(f"{path} is not a result row: a JSON object without the key 'run'")
        rows.append({"run": path.parent.name, **row})
    return rows
