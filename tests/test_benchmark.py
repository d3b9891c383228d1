"""Timing helpers against hand-worked numbers, and PyTorch's model against ours."""

import dataclasses
import importlib.util
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from configs import tiny
from experiments import benchmark_train
from kvjax import benchmark, host, peers
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.benchmark import Spread
from kvjax.config import Config, OptimizerConfig, TrainConfig
from kvjax.data.config import DataConfig
from kvjax.decoder import DecoderConfig
from kvjax.losses import cross_entropy

CONFIG = Config(
    Grouped(6, 2, head_dim=4, rope_theta=101.0),
    DecoderConfig(width=30, depth=2, mlp_width=31, output_scale=1.0),
    DataConfig(tokenizer="bytes", context=13),
    OptimizerConfig(warmup_steps=1),
    TrainConfig(batch_size=2, steps=7),
)


def changed(part: str, **fields) -> Config:
    return dataclasses.replace(CONFIG, **{part: dataclasses.replace(getattr(CONFIG, part), **fields)})


@pytest.fixture
def prepared(monkeypatch):
    """This process computes already: its devices stay as they are."""
    monkeypatch.setattr(host, "prepare", lambda batch_size: None)


def test_spread_and_turns():
    assert Spread.of([5.0, 1.0, 2.0]) == Spread(2.0, 1.0, 5.0)
    assert Spread.of([4.0, 1.0]) == Spread(2.5, 1.0, 4.0)
    calls = []
    sides = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "ab"}
    assert benchmark.alternate(sides, 3) == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0, 6.0]}
    assert calls == list("ababab")


def test_random_batches():
    batches = benchmark.random_batches(CONFIG, 257)
    ids = np.stack([batch[name] for batch in batches for name in ("tokens_BT", "targets_BT")])
    assert ids.shape == (2 * len(batches), 2, 13) and ids.dtype == np.int32
    assert ids.min() >= 0 and 240 < ids.max() <= 256
    assert len(np.unique(ids, axis=0)) == len(ids)


def test_batch_sizes_keep_the_tokens_of_a_step():
    config = changed("train", batch_size=12)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, context=10))
    assert benchmark.batch_sizes(config, [10, 20, 60, 120]) == [12, 6, 2, 1]
    message = r"train.batch_size \* data.context=120 must be a multiple of --context-sweep=50; nearest .*: [46]0"
    with pytest.raises(ValueError, match=message):
        benchmark.batch_sizes(config, [10, 50])
    with pytest.raises(ValueError, match="--context-sweep=0 must be at least 1"):
        benchmark.batch_sizes(config, [0])


def test_a_workload_takes_real_steps():
    workload = benchmark.TrainingWorkload(CONFIG)
    before = jax.device_get(workload._state.params)
    assert workload.seconds(3) > 0
    after = jax.device_get(workload._state)
    assert after.step == 3 and after.finite
    assert all(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after.params)))
    assert workload.tokens_per_step == 26
    weights = 257 * 30 + 30 + 2 * (2 * 30 * 4 * (6 + 2) + 3 * 30 * 31 + 2 * 30)
    assert workload.flops_per_token == 3 * (2 * weights + 2 * 6 * 2 * (2 * 4) * 7)
    assert workload.cost.temporary_bytes > 4 * weights


@pytest.mark.parametrize(
    "attention, scale, shapes",
    [
        (Grouped(6, 2, head_dim=4), 0.5, [(2, 2, 3, 13, 4), (2, 2, 13, 4), (2, 2, 13, 4), (2, 2, 3, 13, 4)]),
        (
            Latent(6, rank=13, rope_dim=4, nope_dim=5, value_dim=7),
            1 / 3,
            [(2, 6, 1, 13, 9), (2, 6, 13, 9), (2, 6, 13, 7), (2, 6, 1, 13, 7)],
        ),
    ],
)
def test_timed_attention_has_the_heads_of_its_variant(attention, scale, shapes):
    config = dataclasses.replace(CONFIG, attention=attention)
    found_scale, found = benchmark._heads(config)
    assert found_scale == pytest.approx(scale)
    assert list(found.values()) == shapes
    assert benchmark.attention_timer(config)() > 0


def test_command_prints_and_writes_consistent_numbers(tmp_path, prepared, capsys):
    file = tmp_path / "row.json"
    small = ["--decoder.depth", "1", "--data.context", "13"]
    options = ["--rounds", "2", "--round-steps", "1", "--json", str(file)]
    assert benchmark_train.run(["--config", "tiny", *options, *small]) == 0
    row = json.loads(file.read_text())
    assert row["tokens_per_step"] == 8 * 13
    assert row["config"]["decoder"]["depth"] == 1
    rates, peaks = row["rounds"]["kvjax"], row["rounds"]["peak"]
    assert len(rates) == len(peaks) == 2 and min(rates + peaks) > 0
    share = sum(rates) * row["training_flops_per_token"] / sum(peaks)
    assert row["share_of_matmul_peak"] == pytest.approx(share)
    assert row["tokens_per_second"] == {"median": sum(rates) / 2, "min": min(rates), "max": max(rates)}
    assert row["trace_seconds"] > 0 and row["compile_seconds"] > 0
    assert row["peak_resident_bytes"] > row["argument_bytes"] > 0
    assert "compilation: " in capsys.readouterr().out


def test_context_sweep(tmp_path, prepared, capsys):
    file = tmp_path / "row.json"
    small = ["--decoder.depth", "1", "--data.context", "16"]
    options = ["--rounds", "1", "--round-steps", "1", "--json", str(file), "--context-sweep", "16,32"]
    assert benchmark_train.run(["--config", "tiny", *options, *small]) == 0
    contexts = json.loads(file.read_text())["contexts"]
    assert [(c["context"], c["batch_size"]) for c in contexts] == [(16, 8), (32, 4)]
    assert all(c[part]["median"] > 0 for c in contexts for part in ("step", "attention"))
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds", "0"], "--rounds=0 must be at least 1"),
        (["--round-steps", "-1"], "--round-steps=-1 must be at least 1"),
        (["--context-sweep", "32,x"], "--context-sweep '32,x' must be integers"),
        (["--context-sweep", "32", "--against", "torch"], "leave out --context-sweep"),
        (["--against", "tensorflow"], "tensorflow"),
        (["--decoder.dept", "3"], "decoder.depth"),
    ],
)
def test_wrong_arguments(arguments, message, prepared):
    with pytest.raises(ValueError, match=message):
        benchmark_train.run(["--config", "tiny", *arguments])


@pytest.mark.parametrize(
    "config, message",
    [
        (dataclasses.replace(CONFIG, attention=Latent(6)), "compares Grouped attention .* not Latent"),
        (changed("attention", qk_norm=True), "attention.qk_norm=True must be False"),
        (changed("attention", qkv_bias=True), "attention.qkv_bias=True must be False"),
        (changed("decoder", dropout=0.1), "decoder.dropout=0.1 must be 0.0"),
        (changed("decoder", remat=True), "decoder.remat=True must be False"),
        (changed("decoder", width=23), "decoder.width=23 must be a multiple of attention.num_heads=6"),
        (changed("train", accumulate=2), "train.accumulate=2 must be 1"),
        (changed("train", dtype="bfloat16"), "train.dtype=bfloat16 must be float32"),
    ],
)
def test_what_torch_cannot_be_compared_with(config, message):
    with pytest.raises(ValueError, match=message):
        peers.Worker(config)


def test_a_missing_peer_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs torch: pip install -e '\.\[peers\]'"):
        peers.Worker(CONFIG)


needs_torch = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("torch", "transformers")),
    reason="needs the extra peers",
)


@needs_torch
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        changed("decoder", tie_embeddings=False),
        changed("attention", num_kv_heads=6),
        changed("attention", num_kv_heads=1),
    ],
    ids=["gqa", "untied", "mha", "mqa"],
)
def test_torch_trains_the_same_model(config):
    import torch

    rng = np.random.default_rng(5)
    graphdef, params = nnx.split(config.build(29))
    # Far from the initial weights, whose loss is log V whatever the layers do.
    params = jax.tree.map(lambda a: a + 0.3 * rng.standard_normal(a.shape, np.float32), params)
    tokens_BT, targets_BT = (rng.integers(0, 29, (3, 13), dtype=np.int32) for _ in range(2))

    def ours(params):
        model = nnx.merge(graphdef, params)
        return cross_entropy(model.hidden(tokens_BT)[0], model.unembedding(), targets_BT)

    expected, gradients = jax.jit(jax.value_and_grad(ours))(params)
    assert abs(float(expected) - math.log(29)) > 0.5
    model = peers.llama(config, 29)
    peers.copy_weights(model, nnx.merge(graphdef, params))
    loss = peers.loss(model, torch.from_numpy(tokens_BT).long(), torch.from_numpy(targets_BT).long())
    assert loss.item() == pytest.approx(float(expected), abs=1e-4)
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert norm == pytest.approx(math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradients))), rel=1e-4)


@needs_torch
def test_a_torch_worker_answers_and_ends():
    config = dataclasses.replace(tiny.config, decoder=DecoderConfig(width=64, depth=1, mlp_width=128))
    with peers.Worker(config) as worker:
        assert worker.description["parameters"] == 257 * 64 + 64 + 2 * 64 * 16 * (4 + 2) + 3 * 64 * 128 + 2 * 64
        assert worker.seconds(2) > 0
        assert worker.peak_resident_bytes > 2**20
    assert worker._process.returncode == 0
