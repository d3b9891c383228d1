"""The timing of decoding: what is timed, what is counted, and Hugging Face's model against ours."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from flax import nnx

from configs import tiny
from experiments import benchmark_decode, figures
from kvjax import host, peers
from kvjax.accounting import declared_bytes_per_token
from kvjax.attention.latent import Latent
from kvjax.decode_benchmark import Case, DecodeWorkload, random_prompts, read_bandwidth
from kvjax.generate import generate

CONFIG = dataclasses.replace(tiny.config, decoder=dataclasses.replace(tiny.config.decoder, depth=1))
MLA = dataclasses.replace(CONFIG, attention=Latent(4, rank=16, rope_dim=4, nope_dim=8, value_dim=8))


@pytest.fixture
def prepared(monkeypatch):
    """This process computes already: its devices stay as they are."""
    monkeypatch.setattr(host, "prepare", lambda batch_size=1: None)


def test_every_round_starts_from_the_same_cache():
    workload = DecodeWorkload(Case(CONFIG, 2, 19, 5))
    lengths = []
    for _ in range(3):
        assert workload.seconds() > 0
        lengths.append(int(workload._session.cache.length))
    assert lengths == [32 + 5] * 3


def test_bytes_are_those_of_the_arrays():
    workload = DecodeWorkload(Case(CONFIG, 2, 19, 5))
    assert workload.bytes_per_token == declared_bytes_per_token(CONFIG, 4)
    assert workload.cache_bytes == 2 * 64 * declared_bytes_per_token(CONFIG, 4)
    graphdef, params = nnx.split(CONFIG.build(257))
    assert workload.weight_bytes == sum(a.nbytes for a in jax.tree.leaves(params))
    assert workload.prefill_seconds() > 0 and workload.whole_seconds() > 0
    assert read_bandwidth(1) > 1e8


def test_the_expanded_form_rebuilds_heads():
    """More temporaries, the same tokens."""
    forms = [DecodeWorkload(Case(MLA, 2, 19, 5), expanded=expanded) for expanded in (False, True)]
    made = []
    for workload in forms:
        workload._session.state = jax.tree.map(jax.numpy.copy, workload._state)
        made.append(np.stack(workload._session.generate(5).tokens))
    np.testing.assert_array_equal(*made)
    expand_from = [
        nnx.merge(w._session.graphdef, w._session.params).layers[0].attention.expand_from for w in forms
    ]
    assert expand_from[0] > 1 == expand_from[1]


def test_cases_and_growth_at_the_command_line(tmp_path, prepared, capsys, monkeypatch):
    file = tmp_path / "rows.json"
    monkeypatch.setattr(benchmark_decode, "CASES", {"w256-b1": (CONFIG, 1, 16)})
    small = ["--rounds", "1", "--tokens", "2", "--json", str(file)]
    assert benchmark_decode.run(["--case", "w256-b1", *small]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    seconds = row["seconds_per_token"]["kvjax"]["median"]
    share = (row["weight_bytes"] + row["cache_bytes"]) / seconds / row["read_bandwidth"]["median"]
    assert row["share_of_bandwidth"] == pytest.approx(share) and "ratio_to_hf" not in row
    assert (
        benchmark_decode.run(["--growth", "--config", "tiny", "--lengths", "16,32", "--batches", "1", *small]) == 0
    )
    rows = json.loads(file.read_text())["rows"]
    assert [(row["name"], row["filled"]) for row in rows] == [("tiny", 16), ("tiny", 32)]
    assert all(row["seconds_per_token_without_cache"]["median"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rounds 0", "--rounds=0 must be at least 1"),
        ("--tokens -1", "--tokens=-1 must be at least 1"),
        ("--growth --lengths 5,x", "--lengths '5,x' must be integers"),
        ("--growth --batches 0", "--batches '0' must be integers of at least 1"),
        ("--growth --config nope", "--config"),
        ("--growth --against hf", "leave out --growth"),
        ("--case w257", "w257"),
    ],
)
def test_wrong_arguments(arguments, message, prepared):
    with pytest.raises(ValueError, match=message):
        benchmark_decode.run(arguments.split())


def test_figures_are_drawn_from_the_committed_rows(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    assert figures.run([]) == 0
    names = {f"{name}.{kind}" for name in ("decoding", "decoding_map") for kind in ("svg", "png")}
    assert {path.name for path in tmp_path.iterdir()} == names


needs_torch = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("torch", "transformers")),
    reason="needs the extra peers",
)


@needs_torch
def test_hugging_face_generates_the_same_tokens():
    """Greedy, the same weights, two rows."""
    import torch

    graphdef, params = nnx.split(tiny.config.build(257))
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda a: a + 0.3 * rng.standard_normal(a.shape, np.float32), params)
    prompts_BT = random_prompts(Case(tiny.config, 2, 11), 257)
    model = peers.llama(tiny.config, 257, 32).eval()
    peers.copy_weights(model, nnx.merge(graphdef, params))
    ids_BT = torch.from_numpy(prompts_BT.astype(np.int64))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 15}
    theirs = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)[:, 11:].numpy()
    np.testing.assert_array_equal(np.stack(generate(graphdef, params, list(prompts_BT), 15).tokens), theirs)
    assert len(set(theirs.ravel().tolist())) > 5


@needs_torch
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_a_decoding_worker_answers_and_ends(implementation):
    config = dataclasses.replace(tiny.config, decoder=dataclasses.replace(tiny.config.decoder, depth=1, width=64))
    with peers.Worker(config, batch=2, filled=7, tokens=3, implementation=implementation) as worker:
        assert 0 < worker.seconds(1) < 5
    assert worker._process.returncode == 0
