"""Checkpoints: arrays stored by orbax, and a SHA-256 of each that shows whether it is what was saved.

A checkpoint is one directory `<step>/`, renamed into place when it is whole. It holds the leaves as arrays
named by their path in the tree, and a JSON record: shape, dtype and SHA-256 of each leaf, and the caller's
metadata. Orbax writes it, and any orbax program can open it. Reading goes straight to tensorstore, in which
orbax keeps arrays: orbax's loader casts to the dtype asked for, and after an error leaves tasks behind that
fail later.
"""

import hashlib
import json
import logging
import operator
import re
import shutil
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.dtypes import prng_key
from orbax.checkpoint import v1 as ocp

from kvjax.checks import at_least
from kvjax.results import plain, read_json

# What orbax logs as an error it also raises.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in Path(record.pathname).parts)

Leaves = dict[str, Any]


class _DamageError(Exception):
    """A checkpoint that cannot be read, or does not hold what its record says."""


def digest(state: Any) -> str:
    """SHA-256 in hex over path, dtype, shape and bytes of every leaf; the order of dict keys is free."""
    leaves = _leaves(state)
    return _sha256_of_json(_manifest(leaves, _host_copies(leaves)))


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them kept.

    Reading changes nothing on disk; writing needs to be alone in the directory (`results.RunLock`). `damaged`
    has one line for each checkpoint that the last `restore` or `metadata` had to pass over; the next `save`
    moves those aside as `damaged-<step>`.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        at_least("keep", keep, 1)
        self.directory = Path(directory).absolute()
        self.keep = keep
        self.damaged: list[str] = []
        self._damaged_steps: list[int] = []
        self._pending: ocp.AsyncResponse[None] | None = None
        registry = ocp.handlers.local_registry()
        registry.add(ocp.handlers.JsonHandler, checkpointable_name="record")
        self._context = ocp.Context()
        self._context.checkpointables.registry = registry
        self._context.memory.deepcopy_host_arrays = False  # `save` hands over copies of its own
        # Trained float32 compresses by 8 % and takes twice as long to write.
        self._context.array.saving.use_compression = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits until the last save is on disk, raising its error, and deletes all but `keep` checkpoints."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.result()
        for step in self.steps()[: -self.keep]:
            # Renamed first: a deletion that is cut short must not leave a damaged step behind.
            self._path(step).rename(self.directory / f"{step}.deleting")
            shutil.rmtree(self.directory / f"{step}.deleting")

    def steps(self) -> list[int]:
        """Steps that have a finished directory, sound or damaged, oldest first."""
        if not self.directory.exists():
            return []
        names = (path.name for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Copies `state` now and writes it in the background, with `metadata` (JSON) in the same checkpoint.

        The arrays of `state` may be donated or overwritten as soon as this returns. Raises ValueError for a
        step not above every stored one and for metadata that JSON cannot hold; the error of a failed save
        comes out of the next call.
        """
        self.close()
        step = operator.index(step)
        at_least("step", step, 0)
        leaves = _leaves(state)
        if not any(np.size(leaf) for leaf in leaves.values()):
            raise ValueError("state holds no array to save")
        metadata = plain(metadata, "metadata")
        self._clear_the_way()
        newest = max(self.steps(), default=-1)
        if step <= newest:
            raise ValueError(f"step={step} must be above {newest}, the newest step in {self.directory}")
        arrays = _host_copies(leaves)
        body = {"step": step, "leaves": _manifest(leaves, arrays), "metadata": metadata}
        stored = {
            # Orbax refuses arrays without elements; the record alone describes those.
            "state": {name: array for name, array in arrays.items() if array.size},
            "record": {"sha256": _sha256_of_json(body), **body},
        }
        with self._context:
            self._pending = ocp.save_checkpointables_async(str(self._path(step)), stored)

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Newest sound checkpoint as (step, state, metadata); None where there is no checkpoint at all.

        `like` is the expected tree: arrays, `jax.ShapeDtypeStruct`s, typed PRNG keys, Python numbers. JAX
        leaves go to its shardings where it names them. Every leaf is checked against its SHA-256. Raises
        ValueError if the newest readable checkpoint has other leaves, shapes or dtypes, or all are damaged.
        """
        self._start_reading()
        targets = _leaves(like)
        for step in reversed(self.steps()):
            try:
                record = self._record(step)
                _check_fit(record["leaves"], targets, self._path(step))
                arrays = self._arrays(step, record["leaves"], targets)
            except _DamageError as error:
                self._pass_over(step, error)
                continue
            leaves = [_place(arrays[name], target) for name, target in targets.items()]
            return step, jax.tree.unflatten(jax.tree.structure(like), leaves), record["metadata"]
        return self._nothing_sound()

    def metadata(self) -> dict[str, Any] | None:
        """Metadata of the newest checkpoint with a sound record, its arrays unread; None if there is none."""
        self._start_reading()
        for step in reversed(self.steps()):
            try:
                return self._record(step)["metadata"]
            except _DamageError as error:
                self._pass_over(step, error)
        return self._nothing_sound()

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _start_reading(self) -> None:
        self.close()
        self.damaged = []
        self._damaged_steps = []

    def _pass_over(self, step: int, error: _DamageError) -> None:
        self.damaged.append(f"checkpoint {self._path(step)} is damaged: {error}")
        self._damaged_steps.append(step)

    def _nothing_sound(self) -> None:
        if self.damaged:
            raise ValueError("no sound checkpoint is left: " + "; ".join(self.damaged))

    def _clear_the_way(self) -> None:
        """Removes what killed processes left unfinished, and moves known damaged steps aside."""
        if not self.directory.exists():
            return
        for pattern in ("*.orbax-checkpoint-tmp", "*.deleting"):
            for path in self.directory.glob(pattern):
                shutil.rmtree(path)
        for step in self._damaged_steps:
            aside = self.directory / f"damaged-{step}"
            while aside.exists():
                aside = aside.with_name(f"{aside.name}+")
            self._path(step).rename(aside)
        self._damaged_steps = []

    def _record(self, step: int) -> dict[str, Any]:
        path = self._path(step) / "record" / "data.json"
        try:
            record = read_json(path)
        except (OSError, ValueError) as error:
            raise _DamageError(f"record cannot be read ({error})") from error
        if not isinstance(record, dict) or set(record) != {"sha256", "step", "leaves", "metadata"}:
            raise _DamageError("record does not have the four entries of a record")
        body = {key: record[key] for key in ("step", "leaves", "metadata")}
        if record["sha256"] != _sha256_of_json(body):
            raise _DamageError("record does not match its SHA-256")
        if record["step"] != step:
            raise _DamageError(f"record is that of step {record['step']}")
        return record

    def _arrays(self, step: int, manifest: Leaves, targets: Leaves) -> dict[str, np.ndarray]:
        empty = {name: _empty_host_array(target) for name, target in targets.items()}
        # A context of its own: another would answer from the cache for a file that has changed since.
        context = ts.Context({"cache_pool": {"total_bytes_limit": 100_000_000}})
        folder = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{self._path(step)}/state/"}}
        opening, reading = {}, {}
        for name in (name for name, array in empty.items() if array.size):
            spec = {"driver": "zarr3", "kvstore": {**folder, "path": f"{name}/"}}
            opening[name] = ts.open(spec, read=True, context=context)
        for name, opened in opening.items():
            store = _result(name, opened)
            if (store.dtype.numpy_dtype, store.shape) != (empty[name].dtype, empty[name].shape):
                raise _DamageError(f"leaf {name} is stored as {store.dtype.name}{list(store.shape)}")
            reading[name] = store.read()
        arrays = {**empty, **{name: _result(name, read) for name, read in reading.items()}}
        for name, array in arrays.items():
            if _sha256(array) != manifest[name]["sha256"]:
                raise _DamageError(f"leaf {name} does not match its SHA-256")
        return arrays


def _result(name: str, future: Any) -> Any:
    try:
        return future.result()
    # Tensorstore reports a damaged file with whatever exception is nearest.
    except Exception as error:
        raise _DamageError(f"leaf {name} cannot be read ({str(error).split(' [')[0]})") from error


def _leaves(tree: Any) -> Leaves:
    """Leaves by dotted path, in the tree's own order."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "state"
        if name in leaves:
            raise ValueError(f"two leaves are named {name}")
        if type(leaf) not in (bool, int, float) and not _is(leaf, np.number, np.bool_, prng_key):
            raise ValueError(f"leaf {name} is {_describe(_type_of(leaf))}, neither number, array nor PRNG key")
        leaves[name] = leaf
    return leaves


def _is(leaf: Any, *kinds: Any) -> bool:
    return hasattr(leaf, "dtype") and any(jnp.issubdtype(leaf.dtype, kind) for kind in kinds)


def _type_of(leaf: Any) -> tuple[str, list[int]]:
    if hasattr(leaf, "dtype"):
        return str(leaf.dtype), list(leaf.shape)
    return type(leaf).__name__, []


def _host_copies(leaves: Leaves) -> dict[str, np.ndarray]:
    """Each leaf as a NumPy array of its own: what `device_get` returns on CPU may be a view of the buffer."""
    raw = {name: jax.random.key_data(leaf) if _is(leaf, prng_key) else leaf for name, leaf in leaves.items()}
    return {name: np.array(leaf) for name, leaf in jax.device_get(raw).items()}


def _empty_host_array(target: Any) -> np.ndarray:
    """Shape and dtype of the NumPy array that stores `target`, without its memory."""
    if not hasattr(target, "dtype"):
        return np.asarray(target)
    if _is(target, prng_key):
        target = jax.eval_shape(jax.random.key_data, target)
    return np.broadcast_to(np.zeros((), target.dtype), target.shape)


def _place(array: np.ndarray, target: Any) -> Any:
    """`array` as the kind of leaf that `target` is."""
    if not hasattr(target, "dtype"):
        return array.item()
    if isinstance(target, np.ndarray | np.generic):
        return array if isinstance(target, np.ndarray) else array[()]
    # An array that was never committed to a device must not come back committed.
    sharding = None if isinstance(target, jax.Array) and not target.committed else target.sharding
    if _is(target, prng_key):
        key_dtype: Any = target.dtype
        return jax.device_put(jax.random.wrap_key_data(jnp.asarray(array), dtype=key_dtype), sharding)
    placed = jax.device_put(array, sharding)
    assert placed.dtype == target.dtype
    return placed


def _manifest(leaves: Leaves, arrays: dict[str, np.ndarray]) -> Leaves:
    manifest = {}
    for name, leaf in leaves.items():
        dtype, shape = _type_of(leaf)
        manifest[name] = {"dtype": dtype, "shape": shape, "sha256": _sha256(arrays[name])}
    return manifest


def _check_fit(manifest: Leaves, targets: Leaves, path: Path) -> None:
    """Raises ValueError naming the first leaf that differs: orbax would cast it, or hide the reason."""
    stored = {name: (leaf["dtype"], leaf["shape"]) for name, leaf in manifest.items()}
    expected = {name: _type_of(target) for name, target in targets.items()}
    for name in expected | stored:
        there, here = stored.get(name), expected.get(name)
        if there != here:
            raise ValueError(
                f"checkpoint {path} is of another model: leaf {name} is {_describe(there)} there, "
                f"{_describe(here)} here"
            )


def _describe(leaf: tuple[str, list[int]] | None) -> str:
    return "missing" if leaf is None else f"{leaf[0]}{leaf[1]}"


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
