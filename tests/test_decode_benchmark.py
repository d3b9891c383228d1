"""The timing of decoding: what is timed, what is counted, and Hugging Face's model against ours."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from flax import nnx

from configs import tiny
from experiments import benchmark_decode
from kvjax import host, peers
from kvjax.accounting import declared_bytes_per_token
from kvjax.attention.latent import Latent
from kvjax.codec_benchmark import CodecBench, largest
from kvjax.codecs.integers import Int
from kvjax.decode_benchmark import Case, DecodeWorkload, random_model, random_prompts, read_bandwidth
from kvjax.generate import generate
from kvjax.recipes import parse

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


def test_codecs_side_by_side_at_the_command_line(tmp_path, prepared, capsys, monkeypatch):
    """Bytes and what fits a memory in closed form: 2 heads of 16 features, slots in chunks of 256."""
    file, weights = tmp_path / "rows.json", sum(a.nbytes for a in jax.tree.leaves(random_model(CONFIG)[1]))
    monkeypatch.setattr(benchmark_decode, "CACHE_MODEL", CONFIG)
    arguments = "--codec k=int8,v=fp8 --codec exact --against exact --batch 2 --filled 17 --memory 3MiB --rounds 2"
    assert benchmark_decode.run([*arguments.split(), "--tokens", "3", "--json", str(file)]) == 0
    exact, coded = json.loads(file.read_text())["rows"]
    assert [exact["codec"], coded["codec"]] == ["exact", "k=int8,v=fp8"]
    # Of a slot: its arrays and its position. Once: the length, and the scale of fp8.
    for row, slot_bytes, unit, once in (
        (exact, 2 * 2 * 16 * 4, 64, 4),
        (coded, 2 * (16 + 2) + 2 * 16, 256, 4 + 4),
    ):
        assert row["cache_bytes_per_token"] == slot_bytes and row["slots"] == unit
        room = 3 * 2**20 - weights - once
        assert row["largest_batch"] == room // (unit * (slot_bytes + 4)) > 10
        assert row["longest_context"] == room // (2 * unit * (slot_bytes + 4)) * unit
        assert row["exact_cache_bytes"] == 2 * unit * 256
        share = row["temporary_bytes"] / row["exact_cache_bytes"]
        assert row["temporary_part_of_exact_cache"] == share > 0 < row["encode_seconds_per_token"]
        ratio = exact["seconds_per_token"]["median"] / row["seconds_per_token"]["median"]
        assert row["ratio_to_exact"] == pytest.approx(ratio)
    assert (exact["calibrated_bytes"], coded["calibrated_bytes"]) == (0, 4)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_codecs_are_calibrated_on_the_prompts():
    """Scales of fp8 for the largest key and value that they leave, a quarter more."""
    bench = CodecBench(Case(CONFIG, 2, 19), 2**30)
    model = nnx.merge(*random_model(CONFIG))
    tokens_BT = random_prompts(bench.case, 257)[:, :-1]
    _, cache = model(tokens_BT, cache=model.init_cache(2, 64, bench.storages(parse("exact"))))
    (storage,) = bench.storages(parse("fp8"))
    for name in "kv":
        amax = np.abs(np.asarray(cache.memory[0][name])).max()
        assert storage.arrays[name].scale == pytest.approx(1.25 * amax / 448, rel=1e-5)
    with pytest.raises(ValueError, match=r"memory=100 bytes must be more than the weights' \d+"):
        CodecBench(Case(CONFIG, 2, 19), 100)


@pytest.mark.parametrize(("room", "n"), [(0, 0), (9, 0), (10, 1), (12, 1), (13, 2), (310, 101), (312, 101)])
def test_the_largest_number_that_fits(room, n):
    assert largest(lambda n: 7 + 3 * n, room) == n


def test_a_codecs_loop_holds_a_chunk_besides_its_arguments():
    """What is counted as temporary is none of the cache."""
    case = Case(CONFIG, 1, 1200, 16)
    workload = DecodeWorkload(case, Int(8), model=random_model(CONFIG))
    assert case.slots(Int(8)) == 1280 and workload.cache_bytes == 1280 * (2 * 2 * (16 + 2))
    assert 256 * 16 < workload.temporary_bytes() < workload.cache_bytes


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
        ("--growth --against hf", "--against goes with the cases or --codec; leave out --growth"),
        ("--growth --codec int8", "leave one out"),
        ("--codec int8 --against hf", "--against hf goes with the cases; leave out --codec"),
        ("--against exact", "--against exact goes with --codec"),
        ("--codec int8 --case w256-b1", "--case goes with the cases; leave out --codec"),
        ("--codec int8 --batches 1", "--batches goes with --growth; leave out --codec"),
        ("--memory 8GiB", "--memory goes with --codec"),
        ("--config tiny", "--config goes with --growth or --codec"),
        ("--codec int8 --config tiny mha", "--config must be one preset with --codec; leave out mha"),
        ("--codec int8 --memory 8G", "--memory='8G' must be a number and one of KB, .*; nearest: 8GiB"),
        ("--codec int8 --filled 1", "--filled=1 must be at least 2"),
        ("--codec int8 --batch 0", "--batch=0 must be at least 1"),
        ("--codec int3", "int3"),
        ("--case w257", "w257"),
    ],
)
def test_wrong_arguments(arguments, message, prepared):
    with pytest.raises(ValueError, match=message):
        benchmark_decode.run(arguments.split())


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
