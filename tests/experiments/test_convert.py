"""Conversions of a trained run, at the command line."""

import json
import math
import shutil

import numpy as np
import pytest
from flax import nnx

import kvjax.runs
from experiments import convert, evaluate, train
from kvjax import loop
from kvjax.runs import load_config, load_run
from kvjax.train import graphdef_of

MLA = ["--attention.rank", 3, "--attention.rope-dim", 4]


def model_of(directory):
    run = load_run(directory)
    return nnx.merge(graphdef_of(run.config, run.tokenizer.vocab_size), run.params)


def score(command, directory, file):
    assert command(evaluate.run, ["--run", directory, "--batch-size", 4, "--json", file]) == 0
    return json.loads(file.read_text())["scores"]


def test_what_is_written_is_a_run(trained, tmp_path, command, capsys, small_text):
    """One kv head repeated for both queries: the source's scores, cacheless and through the cache; then trained."""
    out, file = tmp_path / "mha", tmp_path / "row.json"
    options = ["--run", trained, "--to", "tiny", "--method", "repeat", "--attention.num-kv-heads", 2]
    assert (
        command(convert.run, [*options, "--steps", 5, "--train.checkpoint-every=2", "--out", out, "--json", file])
        == 0
    )
    shown, row = capsys.readouterr().out.splitlines(), json.loads(file.read_text())
    assert row == json.loads((out / "conversion.json").read_text())
    assert (row["source"]["run"], row["source"]["step"], row["method"]) == (str(trained), 6, "repeat")
    assert row["scores"]["converted"]["cache_bytes_per_token"] == 2 * 2 * 4 * 4 and shown[-1].startswith(
        f"{out}: "
    )
    before, after = score(command, trained, tmp_path / "a.json"), score(command, out, tmp_path / "b.json")
    for way in ("none", "decode"):
        assert math.isclose(after[way]["bits_per_byte"], before[way]["bits_per_byte"], rel_tol=1e-5)
    for name, scores in (("source", before), ("converted", after)):
        assert math.isclose(row["scores"][name]["bits_per_byte"], scores["none"]["bits_per_byte"], rel_tol=1e-5)
    config = load_config(out)
    assert (config.seed, config.train.steps, config.train.checkpoint_every, config.attention.num_kv_heads) == (
        8,
        5,
        2,
        2,
    )
    first = np.asarray(model_of(out).layers[0].attention.q_DNH[...])
    assert command(train.run, ["--run", out]) == 0
    assert "resumed at step 0" in capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {1, 2, 3, 4, 5} and load_run(out).step == 5
    trained_on = np.asarray(model_of(out).layers[0].attention.q_DNH[...])
    assert 0 < np.abs(trained_on - first).max() < 0.1  # it went on from what was written
    assert json.loads((out / "result.json").read_text())["training_tokens"] == 5 * 4 * 8
    shutil.rmtree(out / "checkpoints")
    (out / "result.json").unlink()
    assert command(train.run, ["--run", out]) == 2  # and not from random weights
    assert "holds converted weights, and no sound checkpoint" in capsys.readouterr().err
    assert not (out / "result.json").exists()


@pytest.mark.parametrize(
    ("to", "method", "options"),
    [
        ("low_rank", "svd", ["--attention.rank", "None", "--attention.rank-k", 4, "--attention.rank-v", 4]),
        ("mla", "svd", [*MLA, "--attention.rank", 4, "--balance"]),
        ("mla", "whitened", [*MLA, "--attention.rank", 4, "--tokens", 64, "--attention.latent-norm"]),
    ],
)
def test_latents_of_one_kv_head(trained, tmp_path, command, small_text, to, method, options):
    """With room for its keys and values nothing is lost, but by a norm that the source does not have."""
    arguments = ["--run", trained, "--to", to, "--method", method, "--out", tmp_path / "made", "--fraction", 0.5]
    assert command(convert.run, [*arguments, *options]) == 0
    row, config = json.loads((tmp_path / "made" / "conversion.json").read_text()), load_config(tmp_path / "made")
    source, converted = (row["scores"][name]["bits_per_byte"] for name in ("source", "converted"))
    exact = math.isclose(source, converted, rel_tol=1e-5)
    assert exact == (method == "svd") and config.train.steps == 3
    assert row["tokens"] == (64 if method == "whitened" else None)
    assert row["scores"]["converted"]["cache_bytes_per_token"] == 4 * 8


def test_the_schedule_shrinks_with_the_steps(trained):
    """Warm-up in proportion, intervals no longer than the training; the optimizer otherwise as it was."""
    arguments = ["--run", trained, "--to", "tiny", "--method", "mean", "--out", "new"]
    of = lambda *options: convert.arguments([*map(str, arguments), *options])[1:]
    source, made = of("--steps", "2", "--optimizer.peak-lr", "1e-3", "--attention.num-kv-heads", "1")
    assert (source.train.steps, source.optimizer.warmup_steps, made.optimizer.warmup_steps) == (6, 4, 1)
    assert (made.train.eval_every, made.train.checkpoint_every, made.train.steps) == (2, 2, 2)
    assert (made.optimizer.peak_lr, made.optimizer.beta2) == (1e-3, source.optimizer.beta2)
    short = of("--steps", "1", "--attention.num-kv-heads", "1")[1].optimizer
    assert short.warmup_steps == 0 and short.peak_lr == pytest.approx(source.optimizer.peak_lr / 5)
    assert (made.decoder, made.data, made.seed) == (source.decoder, source.data, source.seed + 1)


def test_a_lost_step_0_is_not_trained_from_random_weights(
    trained, tmp_path, command, capsys, small_text, monkeypatch
):
    """A crash before the configuration is written leaves no run."""
    out = tmp_path / "made"

    def crash(path, value, write=convert.results.write_json):
        if path.name == "config.json":
            raise OSError("disk full")
        write(path, value)

    monkeypatch.setattr(kvjax.runs.results, "write_json", crash)
    arguments = ["--run", trained, "--to", "tiny", "--method", "mean", "--attention.num-kv-heads", 1, "--out", out]
    assert command(convert.run, [*arguments, "--steps", 2]) == 2
    monkeypatch.undo()
    monkeypatch.setattr(loop, "load_corpus", None)
    assert command(train.run, ["--run", out]) == 2
    assert "must be the directory of a run: it has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--to gqa9 --method mean", "--config='gqa9' is unknown; did you mean 'gqa4'?"),
        ("--to mla --method mean --steps 2", "--method='mean' must be one of svd, whitened with --to mla"),
        ("--to tiny --method svd --steps 2", "--method='svd' must be one of repeat with --to tiny"),
        (
            "--to mqa --method repeat --steps 2",
            "--method='repeat' must be one of mean, first, random with --to mqa",
        ),
        ("--to mqa --method mean --balance --steps 2", "--balance goes with svd and whitened"),
        ("--to mla --method svd --similar --steps 2", "--similar goes with mean, first and random"),
        ("--to mla --method svd --tokens 9 --steps 2", "--tokens=9 goes with --method whitened"),
        ("--to mla --method svd --fraction 0.01", "--fraction=0.01 of 6 steps must be at least 1 step"),
        ("--to mla --method svd --fraction inf", "--fraction=inf must be a finite number above 0"),
        ("--to mla --method svd --fraction 1 --steps 2", "not allowed with"),
        ("--to mla --method svd --steps 0", "--steps=0 must be at least 1"),
        (
            "--to mla --method svd --steps 2 --attention.rnk 3",
            "--attention.rnk is unknown; did you mean --attention.rank?",
        ),
        ("--to mla --method svd --steps 2", "attention.rank=64 must be at least 1 and at most 8, the rank of"),
        (
            "--to mla --method svd --steps 2 --attention.nope-dim 3",
            "attention.nope_dim=3 must be 4, as in the source",
        ),
        (
            "--to mla --method svd --steps 2 --decoder.depth 3",
            "--decoder.depth must be left out: a conversion keeps",
        ),
        ("--to mqa --method mean --out FULL", "exists and is not empty; choose a new directory"),
        ("--to mqa --method mean --run FULL", "must be the directory of a run: it has no config.json"),
        ("--to mqa", "--method"),
    ],
)
def test_errors_are_one_line(trained, tmp_path, command, capsys, small_text, options, message):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("text")
    arguments = options.replace("FULL", str(full)).split()
    for name, value in (("--run", trained), ("--out", tmp_path / "out")):
        arguments += [] if name in arguments else [name, value]
    assert command(convert.run, arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and message in shown and shown.count("\n") == 1, shown
    assert not (tmp_path / "out").exists() and [path.name for path in full.iterdir()] == ["file"]
