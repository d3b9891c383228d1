"""Statistics of a trained run, at the command line."""

import json

import numpy as np
import pytest

from experiments import calibrate
from kvjax.statistics_file import load_statistics


def test_statistics_are_written(trained, tmp_path, command, capsys, small_text):
    """Of the run's train split in its own context; the same for equal seeds."""
    file, found = tmp_path / "row.json", []
    options = ["--run", trained, "--tokens", 61, "--batch-size", 4, "--json", file]
    for out in ("a", "b"):
        assert command(calibrate.run, [*options, "--seed", 5, "--out", tmp_path / out]) == 0
        found.append(load_statistics(tmp_path / out))
    row, shown = json.loads(file.read_text()), capsys.readouterr().out.splitlines()[-1]
    a, b = found
    assert (a.tokens, a.context, a.data, a.model) == (61, 8, "sotu train", str(trained))
    assert a.layers[0].keys() == {"k", "k_before_rope", "v"} and a.layers[0]["v"].output.shape == (1, 4, 4)
    for name, array in a.layers[0].items():
        assert array.first.count + array.rest.count == 61 and array.first.count >= 61 / 8
        np.testing.assert_array_equal(array.rest.outer, b.layers[0][name].rest.outer)
    assert {name: row[name] for name in ("tokens", "context", "data", "seed", "step", "dtype")} == {
        **{"tokens": 61, "context": 8, "data": "sotu train"},
        **{"seed": 5, "step": 6, "dtype": "float32"},
    }
    # Of each of three arrays, two moments of 4 + 16 + 16 numbers, and queries or output of 16.
    assert row["statistics_bytes"] == 8 * 3 * (2 * 36 + 16)
    assert row["written_bytes"] == sum(path.stat().st_size for path in (tmp_path / "b").iterdir())
    assert shown.startswith(f"{tmp_path / 'b'}: 61 tokens of sotu train in windows of 8, ")


def test_a_file_in_shorter_windows(trained, tmp_path, command, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("Fellow citizens, the state of the Union is good. " * 3)
    options = ["--data", text, "--context", 5, "--tokens", 23, "--batch-size", 2]
    assert command(calibrate.run, ["--run", trained, *options, "--out", out]) == 0
    statistics = load_statistics(out)
    assert (statistics.data, statistics.context, statistics.tokens) == ("text.txt", 5, 23)
    assert {array.first.count for array in statistics.layers[0].values()} == {5}


def test_default_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("KVJAX_DATA", str(tmp_path / "data"))
    out = lambda *options: calibrate.arguments([*map(str, options), "--tokens", "9"]).out
    assert out("--run", tmp_path / "run") == tmp_path / "run" / "calibration"
    assert out("--model", "smollm2") == tmp_path / "data" / "calibration" / "smollm2"
    assert out("--model", tmp_path / "other" / "model") == tmp_path / "data" / "calibration" / "model"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tokens 99 --split validation", "--split=validation must not be a split that is evaluated: a codec"),
        ("--tokens 99 --split test", "scores it would score too well; choose train"),
        ("--tokens 9999", "num_tokens=9999 must be at most 268, all that the text has"),
        ("--tokens 7", "num_tokens=7 must be at least one window, context=8"),
        ("--tokens 268 --context 200", "context=200 must be at most 140, the longest of 2 windows of the text"),
        ("--tokens 0", "--tokens=0 must be at least 1"),
        ("--tokens 99 --context 0", "--context=0 must be at least 1"),
        ("--tokens 99 --seed -1", "--seed=-1 must be at least 0"),
        ("--tokens 99 --out OUT", "exists; choose a new directory"),
        ("--tokens 99 --data OUT/row.txt --split train", "--split=train goes with a dataset; "),
        ("--tokens many", "--tokens"),
        ("", "--tokens"),
    ],
)
def test_errors_are_one_line(trained, tmp_path, command, capsys, small_text, options, message):
    (tmp_path / "row.txt").write_text("text")
    arguments = options.replace("OUT", str(tmp_path)).split()
    out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
    assert command(calibrate.run, ["--run", trained, *arguments, *out]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and message in shown and shown.count("\n") == 1
    assert not (tmp_path / "out").exists()
