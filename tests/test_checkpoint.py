import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

from kvjax.checkpoint import Checkpoints, digest

ROOT = Path(__file__).resolve().parent.parent


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(7, 11, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(11, 11, rngs=rngs) for _ in range(2)])


def train_state(seed: int) -> dict:
    """A state as training has it, its moments no longer zero."""
    params = nnx.split(Net(nnx.Rngs(seed)))[1]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    with jax.numpy_dtype_promotion("standard"):  # optax raises a Python float to an integer power
        updates, moments = optimizer.update(params, optimizer.init(params), params)
    return {
        "params": optax.apply_updates(params, updates),
        "optimizer": moments,
        "key": jax.random.split(jax.random.key(seed), 3),
        "step": jnp.int32(seed),
        "scale": jnp.linspace(-3, 3, 13, dtype=jnp.bfloat16),
        "embedding": jax.random.normal(jax.random.key(seed), (307, 101)),
        "unused": jnp.zeros((0, 5)),
        "counts": np.arange(17, dtype=np.int64) * seed,
        "epoch": seed,
        "best": 0.1 * seed,
        "done": seed > 1,
    }


def abstract(state):
    def leaf(value):
        if isinstance(value, jax.Array):
            return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)
        return value

    return jax.tree.map(leaf, state)


def save_steps(directory: Path, steps: list[int], keep: int = 2) -> None:
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, {"w": jnp.full((5, 7), step, jnp.float32)}, {"step": step})


def restore(directory: Path):
    with Checkpoints(directory) as checkpoints:
        found = checkpoints.restore({"w": jax.ShapeDtypeStruct((5, 7), jnp.float32)})
        return found, checkpoints.damaged


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def flip_everywhere(directory: Path) -> None:
    for path in files(directory):
        flip(path, path.stat().st_size // 2, 3)


@pytest.mark.parametrize("kind", ["abstract", "concrete"])
def test_a_training_state_comes_back_bit_for_bit(tmp_path, kind):
    state = train_state(2)
    metadata = {"config": {"depth": 2, "lr": 1e-3, "names": ["ä", "b"]}, "next_index": 2**40, "note": None}
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        checkpoints.save(2, state, metadata)
    like = abstract(train_state(3)) if kind == "abstract" else train_state(3)
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        found = checkpoints.restore(like)
        assert checkpoints.metadata() == metadata
    assert found is not None
    step, restored, restored_metadata = found
    assert (step, restored_metadata) == (2, metadata)
    assert digest(restored) == digest(state) != digest(train_state(3))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert type(restored["optimizer"][1][0]) is optax.ScaleByAdamState
    assert (restored["epoch"], restored["best"], restored["done"]) == (2, 0.2, True)
    assert type(restored["done"]) is bool and type(restored["counts"]) is np.ndarray
    assert restored["unused"].shape == (0, 5)
    expected = jax.random.normal(state["key"][1], (3,))
    np.testing.assert_array_equal(jax.random.normal(restored["key"][1], (3,)), expected)
    np.testing.assert_array_equal(
        np.asarray(restored["scale"]).view(np.uint16), np.asarray(state["scale"]).view(np.uint16)
    )


def test_restored_arrays_go_where_like_says(tmp_path):
    save_steps(tmp_path, [1])
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    like = {"w": jax.ShapeDtypeStruct((5, 7), jnp.float32, sharding=sharding)}
    found = Checkpoints(tmp_path).restore(like)
    assert found is not None and found[1]["w"].sharding == sharding
    found = Checkpoints(tmp_path).restore({"w": jnp.zeros((5, 7))})
    assert found is not None and not found[1]["w"].committed


def test_digest_is_the_documented_one():
    state = {"b": np.float32([1, 2]), "a": {"n": 3}}
    manifest = {
        "a.n": {"dtype": "int", "sha256": hashlib.sha256(bytes([3] + [0] * 7)).hexdigest(), "shape": []},
        "b": {
            "dtype": "float32",
            "sha256": hashlib.sha256(bytes.fromhex("0000803f00000040")).hexdigest(),
            "shape": [2],
        },
    }
    assert digest(state) == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def test_digest_sees_path_dtype_shape_and_each_bit_and_not_the_order_of_keys():
    base = {"a": np.float32([0, 1]), "b": jax.random.key(5)}
    assert digest(base) == digest(dict(reversed(base.items())))
    assert digest(base) == digest({**base, "a": jnp.float32([0, 1])})
    others = [
        {"c": base["a"], "b": base["b"]},
        {**base, "a": np.float32([-0.0, 1])},
        {**base, "a": np.float32([[0, 1]])},
        {**base, "a": base["a"].view(np.int32)},
        {**base, "b": jax.random.key(6)},
        {**base, "b": jax.random.key_data(base["b"])},
    ]
    assert len({digest(state) for state in [base, *others]}) == 7


def test_save_keeps_the_values_of_its_call_although_they_are_donated(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    host = np.random.default_rng(0).standard_normal((4, 300_000), np.float32)
    state = {f"layer{i}": jnp.array(row) for i, row in enumerate(host)}
    overwritten = np.ones(300_000, np.float32)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {**state, "host": overwritten}, {})
        donated = state
        for _ in range(3):
            state = step(state)
        overwritten[:] = 9
        jax.block_until_ready(state)
        assert all(leaf.is_deleted() for leaf in donated.values())
    found = Checkpoints(tmp_path).restore({**state, "host": overwritten})
    assert found is not None
    for i, row in enumerate(host):
        np.testing.assert_array_equal(found[1][f"layer{i}"], row)
    np.testing.assert_array_equal(found[1]["host"], np.ones(300_000, np.float32))
    expected = digest(found[1])
    again = Checkpoints(tmp_path).restore({**state, "host": overwritten})
    step({name: leaf for name, leaf in found[1].items() if name != "host"})
    assert again is not None and digest(again[1]) == expected


def test_every_flipped_bit_is_found_or_harmless(tmp_path):
    kept = tmp_path / "kept"
    digests = {}
    with Checkpoints(kept) as checkpoints:
        for step in (1, 2):
            state = train_state(step)
            digests[step] = digest(state)
            checkpoints.save(step, state, {"step": step})
    like = abstract(train_state(1))
    rng = np.random.default_rng(0)
    found_in = {True: 0, False: 0}
    for file in files(kept / "2"):
        is_data = file.parent.name == "d"
        for _ in range(6 if is_data else 2):
            broken = tmp_path / "broken"
            shutil.copytree(kept, broken)
            flip(broken / file.relative_to(kept), rng.integers(file.stat().st_size), rng.integers(8))
            with Checkpoints(broken) as checkpoints:
                found = checkpoints.restore(like)
            assert found is not None
            step, state, metadata = found
            assert (digest(state), metadata) == (digests[step], {"step": step}), file
            assert len(checkpoints.damaged) == (step == 1)
            assert all(f"{broken}/2 is damaged: " in line for line in checkpoints.damaged)
            found_in[is_data] += step == 1
            shutil.rmtree(broken)
    assert found_in[True] >= 6 and found_in[False] >= 4


def test_a_missing_file_is_found_or_harmless(tmp_path):
    save_steps(tmp_path / "kept", [1, 2])
    for file in files(tmp_path / "kept" / "2"):
        shutil.copytree(tmp_path / "kept", tmp_path / "broken")
        (tmp_path / "broken" / file.relative_to(tmp_path / "kept")).unlink()
        found, damaged = restore(tmp_path / "broken")
        assert found is not None
        np.testing.assert_array_equal(found[1]["w"], np.full((5, 7), found[0]))
        assert len(damaged) == (found[0] == 1)
        shutil.rmtree(tmp_path / "broken")


def test_a_changed_leaf_is_named(tmp_path):
    """A whole and readable checkpoint, but with the arrays of another under its record."""
    save_steps(tmp_path / "a", [1, 2])
    save_steps(tmp_path / "b", [3])
    shutil.rmtree(tmp_path / "a" / "2" / "state")
    shutil.copytree(tmp_path / "b" / "3" / "state", tmp_path / "a" / "2" / "state")
    found, damaged = restore(tmp_path / "a")
    assert found is not None and found[0] == 1
    assert damaged == [f"checkpoint {tmp_path}/a/2 is damaged: leaf w does not match its SHA-256"]


@pytest.mark.parametrize(
    ("values", "stored"),
    [(np.full((7, 5), 2.0, np.float32), "float32[7, 5]"), (np.ones((5, 7)), "float64[5, 7]")],
)
def test_stored_arrays_are_not_cast_or_reshaped(tmp_path, values, stored):
    save_steps(tmp_path / "a", [1, 2])
    with Checkpoints(tmp_path / "b") as checkpoints:
        checkpoints.save(2, {"w": values}, {})
    shutil.rmtree(tmp_path / "a" / "2" / "state")
    shutil.copytree(tmp_path / "b" / "2" / "state", tmp_path / "a" / "2" / "state")
    found, damaged = restore(tmp_path / "a")
    assert found is not None and found[0] == 1
    assert damaged == [f"checkpoint {tmp_path}/a/2 is damaged: leaf w is stored as {stored}"]


def test_a_record_that_is_still_json_is_checked_too(tmp_path):
    save_steps(tmp_path, [1, 2])
    path = tmp_path / "2" / "record" / "data.json"
    text = path.read_text()
    for old, new, message in [
        ('"metadata": {"step": 2}', '"metadata": {"step": 3}', "record does not match its SHA-256"),
        ('"sha256": ', '"sha255": ', "record does not have the four entries of a record"),
        (text, "[]", "record does not have the four entries of a record"),
    ]:
        assert old in text
        path.write_text(text.replace(old, new, 1))
        found, damaged = restore(tmp_path)
        assert found is not None and found[0] == 1
        assert damaged == [f"checkpoint {tmp_path}/2 is damaged: {message}"]
        assert Checkpoints(tmp_path).metadata() == {"step": 1}


def test_after_falling_back_saving_goes_on_and_keeps_the_damaged_step_aside(tmp_path):
    for round_number, aside in enumerate(["damaged-5", "damaged-5+"]):
        save_steps(tmp_path, [5] if round_number else [3, 5])
        flip_everywhere(tmp_path / "5")
        before = {path.name for path in tmp_path.iterdir()}
        with Checkpoints(tmp_path) as checkpoints:
            found = checkpoints.restore({"w": jnp.zeros((5, 7))})
            assert found is not None and found[0] == 3 + round_number
            assert {path.name for path in tmp_path.iterdir()} == before
            checkpoints.save(4, found[1], found[2]) if round_number == 0 else checkpoints.save(6, found[1], {})
        assert aside in {path.name for path in tmp_path.iterdir()}
    found, damaged = restore(tmp_path)
    assert found is not None and (found[0], damaged) == (6, [])
    assert {path.name for path in tmp_path.iterdir()} == {"4", "6", "damaged-5", "damaged-5+"}


def test_if_all_are_damaged_all_are_named(tmp_path):
    save_steps(tmp_path, [1, 2])
    for step in (1, 2):
        flip_everywhere(tmp_path / str(step))
    with pytest.raises(ValueError, match=r"no sound checkpoint is left: .*/2 is damaged: .*/1 is damaged: "):
        restore(tmp_path)
    with pytest.raises(ValueError, match="no sound checkpoint is left"):
        Checkpoints(tmp_path).metadata()


def test_without_checkpoints_there_is_nothing_and_nothing_is_written(tmp_path):
    for directory in (tmp_path / "absent", tmp_path):
        assert restore(directory) == (None, [])
        assert Checkpoints(directory).metadata() is None
    assert list(tmp_path.iterdir()) == []


def test_strays_and_leftovers_are_no_checkpoints(tmp_path):
    save_steps(tmp_path, [1])
    (tmp_path / "3").mkdir()
    (tmp_path / "4.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (tmp_path / "0.deleting").mkdir()
    (tmp_path / "007").mkdir()
    (tmp_path / "8").write_text("a file")
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore({"w": jnp.zeros((5, 7))})
        assert found is not None and found[0] == 1
        assert [line.split(":")[0] for line in checkpoints.damaged] == [f"checkpoint {tmp_path}/3 is damaged"]
        checkpoints.save(2, found[1], found[2])
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "damaged-3", "007", "8"}


def test_a_renamed_step_is_damaged(tmp_path):
    save_steps(tmp_path, [1, 2])
    (tmp_path / "2").rename(tmp_path / "12")
    found, damaged = restore(tmp_path)
    assert found is not None and found[0] == 1
    assert damaged == [f"checkpoint {tmp_path}/12 is damaged: record is that of step 2"]


def test_steps_only_go_up(tmp_path):
    save_steps(tmp_path, [4])
    for step in (3, 4):
        with pytest.raises(ValueError, match=rf"step={step} must be above 4, the newest step in {tmp_path}"):
            save_steps(tmp_path, [step])
    with pytest.raises(ValueError, match="step=-1 must be at least 0"):
        save_steps(tmp_path / "other", [-1])


def test_the_newest_are_kept(tmp_path):
    save_steps(tmp_path, [0, 1, 2, 10], keep=3)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "10"}
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize(
    ("like", "difference"),
    [
        ({"w": np.zeros((5, 11), np.float32)}, r"leaf w is float32\[5, 7\] there, float32\[5, 11\] here"),
        ({"w": np.zeros((5, 7), np.float16)}, r"leaf w is float32\[5, 7\] there, float16\[5, 7\] here"),
        ({"w": 1.5}, r"leaf w is float32\[5, 7\] there, float\[\] here"),
        ({"w": np.zeros((5, 7), np.float32), "v": 1}, r"leaf v is missing there, int\[\] here"),
        ({"v": {}}, r"leaf w is float32\[5, 7\] there, missing here"),
    ],
)
def test_another_models_checkpoint_is_refused_by_the_first_leaf_that_differs(tmp_path, like, difference):
    save_steps(tmp_path, [1, 2])
    with pytest.raises(ValueError, match=rf"^checkpoint {tmp_path}/2 is of another model: {difference}$"):
        Checkpoints(tmp_path).restore(like)


def test_what_cannot_be_stored_is_refused_by_name_before_anything_is_written(tmp_path):
    good = {"w": np.ones(3)}
    refused = [
        ({"a": {"name": "text"}}, {}, r"leaf a.name is str\[\], neither number, array nor PRNG key"),
        ({"a": np.array(["text"])}, {}, r"leaf a is <U4\[1\], neither number, array nor PRNG key"),
        ({"a.b": 1, "a": {"b": 2}}, {}, "two leaves are named a.b"),
        ({"empty": np.zeros((0, 3))}, {}, "state holds no array to save"),
        (good, {"lr": [1.0, float("nan")]}, r"metadata.lr\[1\]=nan must be finite"),
        (good, {"config": {3: 4}}, "metadata.config has the key 3: JSON keys must be strings"),
    ]
    with Checkpoints(tmp_path / "c") as checkpoints:
        for state, metadata, message in refused:
            with pytest.raises(ValueError, match=message):
                checkpoints.save(1, state, metadata)
    assert not (tmp_path / "c").exists()


def test_metadata_does_not_read_arrays(tmp_path):
    save_steps(tmp_path, [1, 2])
    for file in files(tmp_path / "2" / "state"):
        file.unlink()
    assert Checkpoints(tmp_path).metadata() == {"step": 2}


def test_a_failed_write_is_raised_and_leaves_the_older_checkpoint(tmp_path, caplog):
    save_steps(tmp_path, [1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(Exception, match="File too large"):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            checkpoints.save(2, {"w": np.random.default_rng(0).standard_normal(1_000_000)}, {})
            checkpoints.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = checkpoints.restore({"w": jnp.zeros((5, 7))})
    assert found is not None and (found[0], checkpoints.damaged) == (1, [])
    checkpoints.save(2, found[1], {})
    checkpoints.close()
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}
    assert caplog.messages == []


def test_orbax_alone_reads_the_same(tmp_path):
    save_steps(tmp_path, [2])
    stored = ocp.load_checkpointables(str(tmp_path / "2"))
    np.testing.assert_array_equal(stored["state"]["w"], np.full((5, 7), 2, np.float32))
    assert stored["record"]["metadata"] == {"step": 2}


@pytest.mark.parametrize("name", ["a/b", "a b", "ä", "%41", "#?&", "a.b.0", "_"])
def test_any_name_of_a_leaf_or_directory_will_do(tmp_path, name):
    directory = tmp_path / f"50% of #1? {name}"
    state = {"x": {name: np.arange(3)}, name: [np.float32(1.5)]}
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, state, {})
    found = Checkpoints(directory).restore(jax.tree.map(np.zeros_like, state))
    assert found is not None and digest(found[1]) == digest(state)


@pytest.mark.parametrize(
    "dtype",
    ["bool", "int4", "uint8", "float16", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu", "float4_e2m1fn"],
)
def test_narrow_dtypes(tmp_path, dtype):
    state = {"x": np.array([[0.5, 1, 1], [1, 1, 0.5]]).astype(jnp.dtype(dtype))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    found = Checkpoints(tmp_path).restore({"x": jax.ShapeDtypeStruct((2, 3), jnp.dtype(dtype))})
    assert found is not None and found[1]["x"].dtype == dtype and digest(found[1]) == digest(state)


def test_no_word_and_no_thread_is_left(tmp_path, capfd, caplog):
    threads = set(threading.enumerate())
    save_steps(tmp_path, [1, 2, 3])
    flip_everywhere(tmp_path / "3")
    (tmp_path / "7").mkdir()
    assert len(restore(tmp_path)[1]) == 2
    assert (capfd.readouterr(), caplog.messages) == (("", ""), [])
    absl.logging.error("only orbax is silenced")
    assert caplog.messages == ["only orbax is silenced"]
    assert set(threading.enumerate()) == threads


WRITER = """
import sys
import numpy as np
from kvjax.checkpoint import Checkpoints
step = int(sys.argv[2])
with Checkpoints(sys.argv[1]) as checkpoints:
    while True:
        step += 1
        leaves = {f"w{i}": np.full(400_000, step * 10 + i, np.float32) for i in range(5)}
        checkpoints.save(step, leaves, {"step": step})
        print(checkpoints.steps()[-1:], flush=True)
"""


def test_a_killed_save_never_harms_the_last_finished_one(tmp_path):
    rng = np.random.default_rng(int.from_bytes(os.urandom(4)))
    like = {f"w{i}": np.zeros(400_000, np.float32) for i in range(5)}
    last = 0
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(last)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            finished = [process.stdout.readline() for _ in range(3)]
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
            finished += process.stdout.readlines()
        with Checkpoints(tmp_path) as checkpoints:
            found = checkpoints.restore(like)
            assert found is not None and checkpoints.damaged == []
        step, state, metadata = found
        whole = [json.loads(line)[0] for line in finished if line.endswith("]\n") and line != "[]\n"]
        assert step >= max(whole) > last and metadata == {"step": step}
        for i in range(5):
            np.testing.assert_array_equal(state[f"w{i}"], np.full(400_000, step * 10 + i, np.float32))
        last = step
