"""Members of one program against runs of their own: `train.make_step` and `loop.run` are the reference.

B batch, M members, T tokens.
"""

import dataclasses
import functools
import json
import math
import os
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from kvjax import accounting, ensemble, loop, sharding, train
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.config import Config, OptimizerConfig, TrainConfig
from kvjax.data import Corpus, DataConfig, TrainBatches
from kvjax.decoder import DecoderConfig
from kvjax.ensemble import Batches, Members, init_states, make_step, run_together
from kvjax.metrics import read_metrics
from kvjax.runs import load_run

VOCAB, STEPS = 257, 5  # the vocabulary of bytes
GQA = Config(
    Grouped(2, 1, head_dim=4),
    DecoderConfig(width=10, depth=1, mlp_width=13, output_scale=1.0, dropout=0.2),
    DataConfig(tokenizer="bytes", context=11),
    OptimizerConfig(peak_lr=0.03, warmup_steps=2, clip_norm=0.5),
    TrainConfig(
        steps=STEPS,
        batch_size=4,
        accumulate=2,
        eval_every=3,
        eval_batch_size=4,
        checkpoint_every=2,
        log_every=2,
        sample_tokens=5,
    ),
)
MLA = dataclasses.replace(
    GQA,
    attention=Latent(2, rank=7, rope_dim=4, nope_dim=3, value_dim=5),
    decoder=dataclasses.replace(GQA.decoder, dropout=0.0),
    train=dataclasses.replace(GQA.train, accumulate=1),
)
# Two programs round in different places, and Adam moves a parameter whose gradient is near 0 by a part of the
# rate that hangs on the gradient's last bits: after five steps at rates near 0.01, by a thousandth of the rate.
LOSS, PARAMS = dict(rel=1e-6), dict(rtol=1e-5, atol=1e-5)


def of_rate(config: Config, seed: int, **optimizer) -> Config:
    return dataclasses.replace(config, seed=seed, optimizer=dataclasses.replace(config.optimizer, **optimizer))


def corpus(config, tokenizer, split) -> Corpus:
    texts = {"train": [b"queries read it, " * 9], "validation": [b"one latent a token", b"heads that share"]}[
        split
    ]
    parts = [np.append(tokenizer.end_id, tokenizer.encode(text)).astype(np.int32) for text in texts]
    starts = np.cumsum([0, *map(len, parts)]).astype(np.int64)
    return Corpus(np.concatenate(parts), starts, np.array([len(text) for text in texts], np.int64))


@pytest.fixture(scope="module")
def quick(quick_jit):
    """Function to turn a `make_step` into one whose programs are compiled quickly, each once."""
    return lambda make: functools.cache(lambda *given: quick_jit(make(*given).__wrapped__, donate_argnums=0))


@pytest.fixture(scope="module", autouse=True)
def world(quick, quick_jit):
    """Little text, no search for the machine's peak, and quick compilation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "load_corpus", corpus)
        patch.setattr(ensemble, "TrainBatches", StoppedBatches)
        normal, quick_normal = jax.random.normal, quick_jit(jax.random.normal, static_argnums=(1, 2))
        draw = lambda key, *given: (normal if isinstance(key, jax.core.Tracer) else quick_normal)(key, *given)
        patch.setattr(jax.random, "normal", draw)
        patch.setattr(accounting, "matmul_peak", lambda dtype: 1e9)
        patch.setattr(loop, "make_step", quick(train.make_step))
        patch.setattr(loop, "make_scorer", functools.cache(loop.make_scorer))
        patch.setattr(ensemble, "make_step", quick(make_step))
        yield


class StoppedBatches(TrainBatches):
    stop_at: int | None = None

    def __getitem__(self, step):
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(step)


def batches(seed: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, VOCAB, (STEPS, 4, 12)).astype(np.int32)
    return [{"tokens_BT": row[:, :-1], "targets_BT": row[:, 1:]} for row in rows]


def steps_of(step, state, batches, mesh):
    """States before each step and after the last, on the host, and the metrics of each."""
    state, states, rows = sharding.replicate(state, mesh), [], []
    for i in range(STEPS):
        states.append(jax.tree.map(np.array, state))
        state, row = step(state, sharding.split(batches[i], mesh))
        rows.append(jax.tree.map(np.array, row))
    return [*states, jax.tree.map(np.array, state)], rows


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


@pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa, dropout, two parts", "mla"])
def test_members_have_the_numbers_of_their_own_runs(config):
    """Beside a member that diverges, which is frozen where it was."""
    members = Members(config, (3, 5, 7), (0.03, 0.01, 1e30))
    mesh, own = sharding.make_mesh(2), of_rate(config, 5, peak_lr=0.01)
    of_members = Batches([batches(seed) for seed in members.seeds])
    step, alone = ensemble.make_step(members, VOCAB, mesh), loop.make_step(own, VOCAB, mesh)
    states, rows = steps_of(step, init_states(members, VOCAB), of_members, mesh)
    expected_states, expected_rows = steps_of(alone, train.init_state(own, VOCAB), batches(5), mesh)
    assert_same_bits(jax.tree.map(lambda a: a[1], states[0]), expected_states[0])
    for row, expected in zip(rows, expected_rows):
        assert row["lr"][1] == expected["lr"]
        assert row["loss"][1] == pytest.approx(expected["loss"], **LOSS)
        assert row["grad_norm"][1] == pytest.approx(expected["grad_norm"], rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(states[-1]), jax.tree.leaves(expected_states[-1])):
        np.testing.assert_allclose(ours[1], theirs, **PARAMS)
    assert len({float(loss) for loss in rows[-1]["loss"]}) == 3
    # The first step has rate 0, the second 5e29.
    assert states[2].finite.all() and states[-1].finite.tolist() == [True, True, False]
    assert_same_bits(*(jax.tree.map(lambda a: a[2], (s.params, s.opt_state)) for s in (states[2], states[-1])))


def test_states_are_donated():
    members = Members(MLA, (0, 1), (0.03, 0.03))
    states = jax.eval_shape(lambda: init_states(members, VOCAB))
    tokens = jax.ShapeDtypeStruct((4, 2, 11), np.int32)
    lowered = make_step(members, VOCAB, sharding.make_mesh(4)).lower(
        states, {"tokens_BT": tokens, "targets_BT": tokens}
    )
    (given, batch), _ = lowered.args_info
    assert all(leaf.donated for leaf in jax.tree.leaves(given))
    assert not any(leaf.donated for leaf in jax.tree.leaves(batch))


CONFIGS = [of_rate(GQA, 3), of_rate(GQA, 5, peak_lr=0.01), of_rate(GQA, 7, peak_lr=1e30)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The second as a run of its own."""
    directory = tmp_path_factory.mktemp("alone") / "run1"
    loop.run(CONFIGS[1], directory)
    return directory


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> tuple[list[Path], list]:
    """All three as one program; the last diverges."""
    root = tmp_path_factory.mktemp("together")
    directories = [root / f"run{i}" for i in range(3)]
    return directories, run_together(CONFIGS, directories)


def files(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def result(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())


CLOCKS = {"tokens_per_second", "share_of_matmul_peak", "wall_seconds", "environment", "together"}


def test_a_group_writes_what_its_runs_write(alone, together):
    directory, row, expected = together[0][1], together[1][1], result(alone)
    assert files(directory) == files(together[0][0]) == files(alone)
    for name in ("config.json", "tokenizer.json"):
        assert (directory / name).read_bytes() == (alone / name).read_bytes()
    assert row == result(directory)
    assert set(row) == {*expected, "together"} and row["together"] == 3
    rounded = {"perplexity", "perplexity_se", "bits_per_byte", "bits_per_byte_se"}
    for name in expected.keys() - CLOCKS - {"digest", "sample"}:
        assert row[name] == (pytest.approx(expected[name], rel=1e-5) if name in rounded else expected[name])
    lines, theirs = (read_metrics(path / "metrics.jsonl") for path in (directory, alone))
    for line, other in zip(lines, theirs, strict=True):
        assert line.pop("kind") == other.pop("kind")
        assert line == pytest.approx(other, rel=1e-5)
    ours, theirs = load_run(directory), load_run(alone)
    assert (ours.config, ours.step) == (theirs.config, theirs.step)
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params)):
        np.testing.assert_allclose(a, b, **PARAMS)


def test_the_time_of_a_group_is_shared(together):
    first, second = together[1][:2]
    assert first["tokens_per_second"] == second["tokens_per_second"] > 0
    assert first["wall_seconds"] == second["wall_seconds"] > 0
    share = first["tokens_per_second"] * first["training_flops_per_token"] / 1e9
    assert first["share_of_matmul_peak"] == pytest.approx(share)


def test_a_member_that_is_not_finite_ends_alone(together):
    directory, error = together[0][2], together[1][2]
    assert isinstance(error, loop.NotFinite)
    message = (
        r"step 3: loss=\S+, grad_norm=nan on batch 2 of seed 7; no update was made, the last checkpoint is kept"
    )
    assert re.fullmatch(message, str(error))
    assert set(files(together[0][0])) - set(files(directory)) == {"result.json", "samples.txt"}
    assert load_run(directory).step == 2
    last = read_metrics(directory / "metrics.jsonl")[-1]
    assert last["step"] == 3 and math.isnan(last["grad_norm"])


def test_finished_runs_are_not_trained_again(together, monkeypatch, capsys):
    directories, rows = together
    monkeypatch.setattr(ensemble, "Trainer", None)
    assert run_together(CONFIGS[:2], directories[:2]) == rows[:2]
    assert capsys.readouterr().out.count("is finished") == 2


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> list[Path]:
    """The group, stopped after two of its five steps."""
    root = tmp_path_factory.mktemp("stopped")
    directories = [root / f"run{i}" for i in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoppedBatches, "stop_at", 1)
        with pytest.raises(loop.Interrupted, match="SIGTERM: saved step 2; the same command goes on from there"):
            run_together(CONFIGS, directories)
    return directories


def test_a_group_goes_on_with_what_stands_at_one_step(stopped, tmp_path, monkeypatch):
    assert [load_run(directory).step for directory in stopped] == [2, 2, 2]
    groups = []
    train = lambda self, first: groups.append((first, [one.directory for one in self.members]))
    monkeypatch.setattr(ensemble.Group, "train", train)
    run_together([*CONFIGS, of_rate(GQA, 8)], [*stopped, tmp_path / "new"])
    assert groups == [(0, [tmp_path / "new"]), (2, stopped)]


def test_a_stopped_group_goes_on_bit_for_bit(stopped, together):
    rows = run_together(CONFIGS, stopped)
    for directory, row, whole, expected in zip(stopped[:2], rows, together[0], together[1]):
        assert {k: v for k, v in row.items() if k not in CLOCKS} == {
            k: v for k, v in expected.items() if k not in CLOCKS
        }
        for name in ("metrics.jsonl", "samples.txt"):
            assert (directory / name).read_bytes() == (whole / name).read_bytes()
    assert str(rows[2]) == str(together[1][2])


def test_what_is_no_group_is_refused(tmp_path):
    wider = dataclasses.replace(GQA, decoder=dataclasses.replace(GQA.decoder, width=12))
    message = (
        "decoder.width=12 of member 1 must be 10, as of member 0: members differ in seed and optimizer.peak_lr"
    )
    with pytest.raises(ValueError, match=message):
        run_together([GQA, wider], [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match=r"optimizer\.beta1=0.5 of member 1 must be 0.9"):
        Members.of([GQA, of_rate(GQA, 1, beta1=0.5)])
    with pytest.raises(ValueError, match=r"seed=0 with optimizer\.peak_lr=0\.03 must be one member"):
        run_together([GQA, GQA], [tmp_path / "a", tmp_path / "b"])
    for directories in ([tmp_path / "a"], [tmp_path / "a"] * 2):
        with pytest.raises(ValueError, match="2 configurations must have as many, different directories"):
            run_together([GQA, of_rate(GQA, 1)], directories)
    with pytest.raises(ValueError, match="seeds and peak_lrs must be as many, at least 1, not 2 and 1"):
        Members(GQA, (0, 1), (0.1,))
    assert list(tmp_path.iterdir()) == []
