"""The data folder, and files in it that several processes may write at once."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def data_folder() -> Path:
    """$KVJAX_DATA, or ~/.cache/kvjax where that is unset (it may not exist yet)."""
    if "KVJAX_DATA" in os.environ:
        return Path(os.environ["KVJAX_DATA"]).expanduser()
    return Path.home() / ".cache" / "kvjax"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock file `path`; it is released when its process dies, and never removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 hex of a sequence of byte strings, which tells apart where one ends and the next starts."""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def file_name(name: str) -> str:
    """Name of a dataset (`family/config:1.0.0`) in characters fit for a file name."""
    return "".join(c if c.isalnum() or c in "_.-" else "-" for c in name)
