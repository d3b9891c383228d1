"""The commands that take a codec: rows and their store, text through it, and what is refused."""

import json

import pytest

from experiments import calibrate, compress, generate
from kvjax import codec_rows, host, results
from kvjax import compress as module

CODECS = ["exact", "int8", "k=pca2+fp16,v=nvfp4,sinks=1"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing is timed, and this process's devices stay as they are."""
    monkeypatch.setattr(codec_rows, "step_seconds", lambda *arguments: 0.25)
    monkeypatch.setattr(codec_rows, "encode_seconds", lambda *arguments: 0.125)
    monkeypatch.setattr(host, "prepare", lambda batch_size=1: None)


@pytest.fixture
def options(trained, tmp_path, command, small_text):
    """Arguments of a run with its statistics and an empty store."""
    out = tmp_path / "statistics"
    assert command(calibrate.run, ["--run", trained, "--tokens", 64, "--batch-size", 4, "--out", out]) == 0
    return ["--run", trained, "--calibration", out, "--batch-size", 2, "--store", tmp_path / "store"]


def rows_of(command, options, codecs, tmp_path):
    file = tmp_path / "rows.json"
    named = [part for codec in codecs for part in ("--codec", codec)]
    assert command(compress.run, [*options, *named, "--json", file]) == 0
    return json.loads(file.read_text())["rows"]


def test_a_row_a_codec(options, command, tmp_path, capsys):
    """One head of 4 in one layer: 2 x 4 float32; 8 bits and a float16 scale each; and so on, for 256 slots."""
    exact, int8, mixed = rows_of(command, options, CODECS, tmp_path)
    assert exact["perplexity"] == pytest.approx(exact["perplexity_exact"], rel=1e-5)
    assert exact["kl_nats_per_token"] < 1e-6 and exact["top1_agreement"] == 1.0
    assert [row["cache_bytes"]["per_token"] for row in (exact, int8)] == [32.0, 12.0]
    assert mixed["cache_bytes"]["encoded_per_token"] == 2 * 2 + 4 / 2 + 1
    assert mixed["cache_bytes"]["per_token"] == 7 + 32 / 256
    assert mixed["cache_bytes"]["calibrated_per_model"] == 4 * (4 * 2 * 2 + 4) + 4
    assert mixed["kl_nats_per_token"] > int8["kl_nats_per_token"] > 0
    assert mixed["calibration"]["tokens"] == 64 and mixed["tokens"] == 45
    assert mixed["layers_seconds_per_step"] == 0.25 and mixed["encode_seconds_per_step"] == 0.125
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[-3:]] == ["*", "*", "*"]
    assert table[-1].startswith("* k=pca2+fp16,v=nvfp4,sinks=1")


def test_no_row_is_computed_twice(options, command, tmp_path, monkeypatch):
    first = rows_of(command, options, CODECS[:2], tmp_path)
    scored = []
    compare = module.Comparer.compare
    monkeypatch.setattr(
        module.Comparer, "compare", lambda self, *a, **k: scored.append(a[0]) or compare(self, *a, **k)
    )
    again = rows_of(command, options, [CODECS[1], "int4", CODECS[0]], tmp_path)
    assert len(scored) == 1 and [row["codec"] for row in again] == ["int8", "int4", "exact"]
    assert again[0] == first[1] and again[2] == first[0]
    monkeypatch.setattr(module, "Comparer", None)  # a finished list opens no text
    assert rows_of(command, options, CODECS[:2], tmp_path) == first
    assert len(results.read_results(tmp_path / "store")) == 3


def test_formats_are_mixed_within_a_budget(options, command, tmp_path):
    """4 float32 an array: 8 bits with a scale are 6 bytes, 4 bits 4, 2 bits 3; 12 bytes allow for the best twice."""
    texts = [f"mix:int8|int4|int2@{budget}" for budget in ("12", "11", "75%", "40%")]
    rows = rows_of(command, options, texts, tmp_path)
    assert [row["cache_bytes"]["per_token"] for row in rows] == [12.0, 10.0, 12.0, 6.0]
    losses = [row["kl_nats_per_token"] for row in rows]
    assert losses[0] == losses[2] < losses[1] < losses[3]
    int2, *_ = rows_of(command, options, ["int2"], tmp_path)
    assert losses[3] == int2["kl_nats_per_token"]


def test_ranks_by_sensitivity_within_a_budget(options, command, tmp_path):
    texts = [f"k=pca+bf16,v=pca+bf16,budget=75%,allocate={how}" for how in ("uniform", "sensitivity")]
    for row in rows_of(command, options, texts, tmp_path):
        assert row["cache_bytes"]["per_token"] == 12.0


def test_another_text_is_another_row(options, command, tmp_path):
    (whole,) = rows_of(command, options, ["int8"], tmp_path)
    (part,) = rows_of(command, [*options, "--tokens", 20], ["int8"], tmp_path)
    assert part["tokens"] == 20 and part["perplexity"] != whole["perplexity"]


def test_text_through_a_codec(options, trained, tmp_path, capsys):
    file, calibration = tmp_path / "row.json", [str(part) for part in options[:4]]
    made = {}
    for codec in ("exact", "int2", "k=pca2+fp16,v=nvfp4,sinks=1,keys=before_rope"):
        arguments = [*calibration, "--codec", codec, "--tokens", "24", "--temperature", "0", "--json", str(file)]
        assert generate.run(arguments) == 0
        made[codec] = json.loads(file.read_text())
    assert generate.run(["--run", str(trained), "--tokens", "24", "--temperature", "0", "--json", str(file)]) == 0
    assert made["exact"]["text"] == json.loads(file.read_text())["text"]
    sizes = [row["cache_bytes_per_token"] for row in made.values()]
    assert sizes[1:] == [2 * (4 / 4 + 2), 7 + 32 / 256]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--codec", "int9"], "int9"),
        (["--codec", "latent=int8"], "latent"),
        (["--codec", "pca5"], "rank=5 must be"),
        (["--codec", "int8", "--split", "train"], "--split: invalid choice: 'train'"),
        (["--codec", "int8", "--tokens", "1"], "num_tokens=1 must be at least 2, one a document"),
        (["--codec", "int8", "--context", "0"], "--context=0 must be at least 1"),
        (
            ["--codec", "fp8", "--calibration", "nowhere"],
            "--calibration=nowhere is missing; experiments.calibrate",
        ),
        (["--codec", "pca2", "--context", "16"], "context"),
        (["--codec", "mix:int8|int4"], "must end with a budget, as mix:int8|int4@30%"),
        (["--codec", "mix:int8|k=int4@30%"], "must mix codecs for every array and no options"),
        (["--codec", "mix:int8|int4@3"], "budget=3 must be at least 8 bytes"),
        (["--codec", "mix:int8@x"], "budget 'x' must be a whole number of bytes, or percent"),
        ([], "the following arguments are required: --codec"),
    ],
)
def test_impossible_codecs_and_texts(options, command, capsys, tmp_path, arguments, message):
    assert command(compress.run, [*options, *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
    assert not list(tmp_path.glob("store/*/result.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--codec", "int8", "--no-cache"], "--codec stores a cache; leave out --no-cache"),
        (["--calibration", "nowhere"], "--calibration=nowhere goes with a --codec"),
        (["--codec", "nvfp4"], "experiments.calibrate"),
    ],
)
def test_impossible_text_through_a_codec(trained, command, capsys, arguments, message):
    assert command(generate.run, ["--run", trained, *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
