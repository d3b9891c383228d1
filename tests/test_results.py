import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from kvjax import results
from kvjax.results import RunLock, environment, git_revision, read_json, read_results, run_name, write_json

ROOT = Path(__file__).resolve().parent.parent


def test_json_is_what_another_reader_expects(tmp_path):
    value = {"z": 0.1 + 0.2, "a": [1, None, True, (2, -0.0)], "text": 'ä"\n', "big": 2**80, "empty": {}}
    write_json(tmp_path / "new" / "x.json", value)
    text = (tmp_path / "new" / "x.json").read_text()
    assert json.loads(text) == {**value, "a": [1, None, True, [2, -0.0]]} == read_json(tmp_path / "new" / "x.json")
    assert text.splitlines()[:2] == ["{", '  "z": 0.30000000000000004,'] and text.endswith("}\n")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"eval": {"loss": [1.0, float("nan")]}}, r"^result.eval.loss\[1\]=nan must be finite"),
        ({"ppl": float("inf")}, "^result.ppl=inf must be finite"),
        ({"a": {1: 2}}, "^result.a has the key 1: JSON keys must be strings"),
        ({"a": {1, 2}}, "^result.a is a set: JSON holds only"),
        ({"a": jax.numpy.float32(1)}, "^result.a is a .*: JSON holds only"),
    ],
)
def test_what_json_cannot_hold_is_named_and_the_old_file_stays(tmp_path, value, message):
    write_json(tmp_path / "result.json", {"old": 1})
    with pytest.raises(ValueError, match=message):
        write_json(tmp_path / "result.json", value)
    assert read_json(tmp_path / "result.json") == {"old": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_replacement_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"old": 1})

    def refuse(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        write_json(tmp_path / "x.json", {"new": 1})
    assert read_json(tmp_path / "x.json") == {"old": 1}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b'{"a": NaN}', b'{"a": -Infinity}', b'"\xff"'])
def test_broken_json_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/x.json is not valid JSON: "):
        read_json(tmp_path / "x.json")


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path):
    """A child writes ever longer files without end; each is whole whenever it is read, and after the kill."""
    code = (
        "import sys; from pathlib import Path; from kvjax.results import write_json\n"
        "for n in range(10**9): write_json(Path(sys.argv[1]), {'n': n, 'items': [n] * (5000 + n)})"
    )
    path = tmp_path / "x.json"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
    seen = []
    try:
        while len(set(seen)) < 20:
            if path.exists():
                value = read_json(path)
                assert value["items"] == [value["n"]] * (5000 + value["n"])
                seen.append(value["n"])
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    value = read_json(path)
    assert value["items"] == [value["n"]] * (5000 + value["n"]) and value["n"] >= seen[-1]


@pytest.mark.parametrize("name", ["gqa4", "mla-r128_2.5", "A", "x" * 100])
def test_names_of_runs(name):
    assert run_name(name) == name


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("", "name='' must not be empty"),
        ("x" * 101, "must be at most 100 characters long, not 101"),
        ("a/b", "name='a/b' must hold only letters, digits, '.', '_' and '-'; try 'a-b'"),
        ("a\\b", "try 'a-b'"),
        ("../up", "try 'up'"),
        ("..", "try 'run'"),
        ("a..b", "try 'a.b'"),
        (".hidden", "must not start with '.' or '-', nor hold '..'; try 'hidden'"),
        ("-flag", "try 'flag'"),
        ("naïve", "try 'na-ve'"),
        ("line\n", "try 'line'"),
    ],
)
def test_names_that_are_no_directory_are_refused(name, rule):
    with pytest.raises(ValueError) as error:
        run_name(name)
    assert str(error.value).startswith(f"name={name[:120]!r} ") and rule in str(error.value)


HOLDER = (
    "import sys, time; from kvjax.results import RunLock\n"
    "with RunLock(sys.argv[1]): print('locked', flush=True); time.sleep(60)"
)


def test_a_run_has_one_writer_until_it_is_killed(tmp_path):
    directory = tmp_path / "gqa4"
    command = [sys.executable, "-c", HOLDER, str(directory)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(ValueError) as error, RunLock(directory):
            pass
        assert str(error.value) == (
            f"run {directory} is being written by process {holder.pid} on host {os.uname().nodename}; "
            "wait for it or choose another --name"
        )
        holder.send_signal(signal.SIGKILL)
    with RunLock(directory):
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert second.returncode != 0 and f"is being written by process {os.getpid()} on" in second.stderr
        with pytest.raises(ValueError, match="is being written by"), RunLock(directory):
            pass
    with RunLock(directory), RunLock(tmp_path / "other"):
        pass


def test_environment_names_versions_and_devices_but_no_host():
    found = environment()
    assert found["jax"] == jax.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (found["backend"], found["device_count"]) == (jax.default_backend(), jax.device_count())
    assert found["cpu_cores"] >= 1 and found["cpu_model"]
    assert found == json.loads(json.dumps(found))
    assert os.uname().nodename not in json.dumps(found)


def git(directory: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True).stdout.strip()


def test_the_revision_is_that_of_the_checkout_that_tracks_the_code(tmp_path, monkeypatch):
    source = tmp_path / "code" / "results.py"
    source.parent.mkdir()
    source.write_text("")
    monkeypatch.setattr(results, "__file__", str(source))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_revision() is None
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "first")
    assert git_revision() is None
    git(tmp_path, "add", "code")
    git(tmp_path, "commit", "-m", "second")
    revision = git(tmp_path, "rev-parse", "HEAD")
    assert git_revision() == {"revision": revision, "dirty": False}
    source.write_text("changed")
    assert git_revision() == {"revision": revision, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None


def test_rows_come_back_by_name_with_their_run(tmp_path):
    for name, loss in (("b", 2.0), ("a", 1.0)):
        results.write_result(tmp_path / name, {"loss": loss})
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "a" / ".result.json.1.tmp").write_text("{")
    assert read_results(tmp_path) == [{"run": "a", "loss": 1.0}, {"run": "b", "loss": 2.0}]
    assert read_results(tmp_path / "absent") == []
    with pytest.raises(ValueError, match=r"row\.run='a' must not be given"):
        results.write_result(tmp_path / "a", {"run": "a"})


@pytest.mark.parametrize("content", ['{"loss": ', "[1]", '{"run": "a"}'])
def test_a_broken_row_is_named(tmp_path, content):
    results.write_result(tmp_path / "a", {"loss": 1.0})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "result.json").write_text(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/b/result.json is not "):
        read_results(tmp_path)


def test_a_lock_is_not_handed_down_to_a_child_process(tmp_path):
    with RunLock(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with RunLock(tmp_path):
            time.sleep(0)
    finally:
        child.kill()
        child.wait()
