import json
import math
import signal

import pytest

from experiments import cli, evaluate, train
from kvjax import loop
from kvjax.attention.grouped import Grouped
from kvjax.config import from_dict
from kvjax.metrics import read_metrics


def resolved(*arguments: str):
    return train.arguments(["--config", "tiny", *arguments])[1]


def test_overrides_land_in_the_configuration():
    config = resolved(
        *("--attention.num-kv-heads", "4", "--decoder.width=96", "--optimizer.peak-lr", "1e-3"),
        *(
            "--data.name",
            "tiny_shakespeare",
            "--train.dtype",
            "bfloat16",
            "--decoder.no-tie-embeddings",
            "--seed",
            "5",
        ),
    )
    assert config.attention == Grouped(4, 4, head_dim=16)
    assert (config.decoder.width, config.decoder.depth, config.decoder.tie_embeddings) == (96, 2, False)
    assert (config.optimizer.peak_lr, config.optimizer.warmup_steps) == (1e-3, 4)
    assert (config.data.name, config.data.tokenizer) == ("tiny_shakespeare", "bytes")
    assert (config.train.dtype, config.train.steps, config.seed) == ("bfloat16", 20, 5)


def test_without_overrides_it_is_the_preset():
    assert resolved() == cli.preset("tiny")


def test_dashes_and_underscores_mean_the_same():
    dashes = resolved("--attention.num-kv-heads", "1", "--train.batch-size=4")
    assert dashes == resolved("--attention.num_kv_heads", "1", "--train.batch_size=4")
    assert dashes.attention.num_kv_heads == 1 and dashes.train.batch_size == 4


def test_none_is_a_value():
    split = ["--attention.rank", "None", "--attention.rank-k", "8", "--attention.rank-v", "16"]
    config = train.arguments(["--config", "low_rank", *split])[1]
    assert (config.attention.rank, config.attention.rank_k, config.attention.rank_v) == (None, 8, 16)


def test_names_of_runs(tmp_path):
    directory = lambda *arguments: train.arguments([*arguments])[0].directory
    assert str(directory("--config", "tiny")) == "runs/tiny"
    assert directory("--config", "tiny", "--root", str(tmp_path), "--name", "a.b-1") == tmp_path / "a.b-1"


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (train.run, ["--help"], ["--config NAME", "--root", "--dry-run", "gqa4", "the preset's fields"]),
        (train.run, ["-h"], ["--config NAME"]),
        (train.run, ["--config", "mla", "--help"], ["--attention.rope-dim INT", "(default: 16)", "--seed INT"]),
        (train.run, ["--help", "--config=mla"], ["--attention.rope-dim INT", "--decoder.width"]),
        (evaluate.run, ["--help"], ["--run DIR", "--split", "--cache", "--batch-size", "token by token"]),
    ],
)
def test_help(command, capsys, main, arguments, words):
    assert command(main, arguments) == 0
    out, err = capsys.readouterr()
    assert err == "" and "Traceback" not in out
    for word in words:
        assert word in out


def test_dry_run_writes_nothing(command, capsys, tmp_path):
    arguments = ["--config", "tiny", "--decoder.depth", "1", "--root", tmp_path / "runs", "--dry-run"]
    assert command(train.run, arguments) == 0
    assert "parameters" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_trained_run(trained):
    result = json.loads((trained / "result.json").read_text())
    assert json.loads((trained.parent / "row.json").read_text()) == result
    assert result["config"]["attention"]["num_kv_heads"] == 1 and result["config"]["seed"] == 7
    assert from_dict(result["config"]).train.steps == 6
    assert [row["step"] for row in read_metrics(trained / "metrics.jsonl") if row["kind"] == "validation"] == [
        3,
        6,
    ]


def test_the_run_can_be_asked_for_again_by_its_directory(trained, command, capsys, small_text):
    assert command(train.run, ["--run", trained]) == 0
    out = capsys.readouterr().out
    assert f"{trained} is finished" in out
    result = json.loads((trained / "result.json").read_text())
    assert f"perplexity {result['perplexity']:.2f}, {result['bits_per_byte']:.4f} bits/byte" in out


def test_evaluate_agrees_with_training_and_through_the_cache(trained, command, capsys, tmp_path, small_text):
    target = tmp_path / "new" / "scores.json"
    arguments = ["--run", trained, "--cache", "none", "prefill", "decode", "--batch-size", 4, "--json", target]
    assert command(evaluate.run, arguments) == 0
    written = json.loads(target.read_text())
    result = json.loads((trained / "result.json").read_text())
    assert set(written) == {"model", "data", "context", "step", "dtype", "scores", "environment"}
    assert (written["data"], written["step"], written["dtype"]) == ("sotu validation", 6, "float32")
    for score in written["scores"].values():
        assert score["perplexity"] == pytest.approx(result["perplexity"], rel=1e-4)
        assert score["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-4)
        assert score["tokens"] == result["tokens"]
    out = capsys.readouterr().out
    assert f"perplexity {result['perplexity']:.4f}" in out.split("no cache  ")[1]
    assert "cache, one pass" in out and "cache, token by token" in out


def test_evaluate_the_test_split(trained, command, capsys, small_text):
    assert command(evaluate.run, ["--run", trained, "--split", "test", "--cache", "none", "--batch-size", 2]) == 0
    # One document has no standard error.
    assert "+- nan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (loop.NotFinite("step 3: loss=nan"), 1),
        (loop.Interrupted("SIGTERM: saved step 3", signal.SIGTERM), 143),
        (loop.Interrupted("SIGINT: saved step 3", signal.SIGINT), 130),
    ],
)
def test_exit_status_of_a_stopped_run(command, capsys, monkeypatch, tmp_path, error, status):
    def stop(config, directory):
        raise error

    monkeypatch.setattr(loop, "run", stop)
    assert command(train.run, ["--config", "tiny", "--root", tmp_path]) == status
    assert capsys.readouterr().err == f"stopped: {error}\n"


def test_a_run_without_timed_steps_is_reported(command, capsys, monkeypatch, tmp_path):
    numbers = {"perplexity": math.pi, "bits_per_byte": 1.0, "cache_bytes_per_token": 32.0, "wall_seconds": 2.0}
    monkeypatch.setattr(loop, "run", lambda *_: numbers | {"tokens_per_second": None, "sample": "so"})
    assert command(train.run, ["--config", "tiny", "--root", tmp_path]) == 0
    assert (
        "perplexity 3.14, 1.0000 bits/byte, 32 cache bytes per token, nan tokens/s, 2 s" in capsys.readouterr().out
    )
