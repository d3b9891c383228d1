"""A dry run's numbers against formulas, and the memory that rematerialisation must save."""

import dataclasses
import re

import pytest

from configs import gqa4, tiny
from experiments import train
from kvjax import dry_run, host, sharding
from kvjax.attention.grouped import Grouped
from kvjax.config import Config, TrainConfig
from kvjax.data.config import DataConfig
from kvjax.decoder import DecoderConfig


def first_number(line: str) -> int:
    return int(re.findall(r"[\d,]*\d", line)[0].replace(",", ""))


def test_dry_run_prints_known_sizes_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVJAX_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(host, "prepare", lambda batch_size: None)  # this process computes already
    short = ["--data.context", "31", "--train.batch-size", "2"]
    assert train.run(["--config", "gqa4", "--dry-run", *short]) == 0
    model, flops, cache, step, compilation, memory = capsys.readouterr().out.splitlines()
    d, m, heads, kv, h, v, layers = 192, 512, 8, 4, 24, 4096, 4
    assert (gqa4.config.decoder.width, gqa4.config.decoder.depth, gqa4.config.data.vocab_size) == (
        d,
        layers,
        v,
    )
    weights = v * d + d + layers * (2 * d * h * (heads + kv) + 3 * d * m + 2 * d)
    assert first_number(model) == weights
    # Keys and values of every kv head in float32.
    assert first_number(cache) == layers * 2 * kv * h * 4
    forward = 2 * weights + layers * heads * 2 * (2 * h) * 16  # 16 slots on average: (31 + 1) / 2
    assert [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:forward|training)", flops)] == [
        forward,
        3 * forward,
    ]
    assert "2 x 31 tokens in float32 on 2 cpu devices" in step
    arguments, in_place, temporaries = (float(n) for n in re.findall(r"([\d.,]+) MiB", memory))
    # Parameters and two moments in float32; the batch and a few scalars round to nothing.
    assert arguments == pytest.approx(3 * 4 * weights / 2**20, abs=0.11)
    assert in_place == pytest.approx(arguments, abs=0.11)
    # Gradients at the least.
    assert temporaries > 4 * weights / 2**20
    assert re.search(r"\d s to trace, \d+\.\d s to compile", compilation)
    assert list(tmp_path.iterdir()) == []


def test_every_vocabulary_is_known_without_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("KVJAX_DATA", str(tmp_path))
    assert dry_run.vocabulary(DataConfig(tokenizer="bytes")) == 257
    assert dry_run.vocabulary(DataConfig(tokenizer="bpe", vocab_size=2311)) == 2311
    assert list(tmp_path.iterdir()) == []


def test_a_batch_must_divide_over_the_devices():
    config = dataclasses.replace(tiny.config, train=dataclasses.replace(tiny.config.train, batch_size=3))
    with pytest.raises(ValueError, match="accumulate=3 must be a multiple of the 2 devices; nearest: 2 or 4"):
        dry_run.report(config)


def test_scanned_layers_have_a_dry_run():
    config = dataclasses.replace(tiny.config, decoder=dataclasses.replace(tiny.config.decoder, scan=True))
    lines = dry_run.report(config)
    assert first_number(lines[2]) == 2 * (2 * 2 * 16) * 4


def temporaries(depth: int, scan: bool) -> int:
    config = Config(
        Grouped(8, 2, head_dim=2),
        DecoderConfig(width=16, depth=depth, mlp_width=32, scan=scan, remat=True),
        DataConfig(tokenizer="bytes", context=128),
        train=TrainConfig(batch_size=2),
    )
    return dry_run.compile_step(config, 257, sharding.make_mesh(2))[1].temporary_bytes


@pytest.mark.parametrize("scan", [True, False])
def test_remat_keeps_little_more_than_the_residual_stream_of_a_further_layer(scan):
    each = (temporaries(5, scan) - temporaries(2, scan)) / 3
    residual = 128 * 16 * 4  # of the one sequence of a device
    parameters = (16 * 2 * (8 + 2) * 2 + 3 * 16 * 32 + 2 * 16) * 4
    # Its input is kept, and its gradients, updates and new moments are; 18 of its activations are not.
    assert residual <= each <= 2 * residual + 4 * parameters
    assert each < 0.2 * (8 * 128 * 128 * 4)  # scores
