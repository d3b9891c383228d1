"""Calibration's statistics on disk: a directory of `statistics.json` and a safetensors file.

The arrays are float64, which the safetensors reader does not take: each is stored as the two float32 arrays
whose sum it is, to a relative 2^-48.

K kv heads, F features of a token.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.checks import at_least
from kvjax.codecs.statistics import ArrayStatistics, Moments, Statistics
from kvjax.pretrained.fields import Fields
from kvjax.pretrained.tensors import SINGLE, TensorFiles, write_tensors
from kvjax.results import read_json, write_json

RECORD = "statistics.json"


def save_statistics(statistics: Statistics, directory: Path) -> None:
    """Writes a new directory, whole or not at all; ValueError if it exists or a value is not finite."""
    if directory.exists():
        raise ValueError(f"{directory} exists; choose a new directory")
    tensors, layers = {}, []
    for number, layer in enumerate(statistics.layers):
        layers.append({})
        for name, array in layer.items():
            *lead, features = array.rest.total.shape
            amax = {"first": array.first.amax, "rest": array.rest.amax}
            counts = {"first": array.first.count, "rest": array.rest.count}
            record: dict[str, Any] = {"heads": lead[0] if lead else None, "features": features}
            record |= {"counts": counts, "amax": amax}
            record |= {"queries": array.queries is not None, "output": array.output is not None}
            layers[-1][name] = record
            for key, value in _values(array).items():
                tensors[f"layers.{number}.{name}.{key}"] = _split(value, f"layers.{number}.{name}.{key}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        made = Path(scratch) / "statistics"
        write_tensors(made / SINGLE, tensors, {})
        facts = {name: getattr(statistics, name) for name in ("model", "data", "tokens", "context")}
        write_json(made / RECORD, {**facts, "sha256": _digest(made), "layers": layers})
        made.rename(directory)


def load_statistics(directory: Path) -> Statistics:
    """What `save_statistics` wrote; ValueError naming file and field for all that is missing or damaged."""
    directory = Path(directory)
    for path in (directory / RECORD, directory / SINGLE):
        if not path.is_file():
            raise ValueError(f"{path} is missing; give the directory of a calibration")
    where = str(directory / RECORD)
    record = Fields(read_json(directory / RECORD), where)
    files = TensorFiles.open(directory)
    if record.get("sha256", str) != _digest(directory):
        raise ValueError(f"{directory / SINGLE} is not what was saved: its SHA-256 differs from {RECORD}'s")
    layers = []
    for number, layer in enumerate(record.get("layers", list)):
        arrays = Fields(layer, f"{where}: layers[{number}]").values
        read = {}
        for name, values in arrays.items():
            fields = Fields(values, f"{where}: layers[{number}].{name}")
            read[name] = _array(fields, files, f"layers.{number}.{name}")
        layers.append(read)
    used = {
        f"layers.{n}.{name}.{key}"
        for n, layer in enumerate(layers)
        for name in layer
        for key in _values(layer[name])
    }
    for name in sorted(files.names - used):
        raise ValueError(f"{files.where}: tensor {name!r} is none that {RECORD} has")
    tokens, context = record.positive("tokens"), record.positive("context")
    return Statistics(tuple(layers), tokens, context, record.get("model", str), record.get("data", str))


def _values(array: ArrayStatistics) -> dict[str, np.ndarray]:
    values = {"queries": array.queries, "output": array.output}
    for part in ("first", "rest"):
        moments = getattr(array, part)
        values |= {f"{part}.{name}": getattr(moments, name) for name in ("total", "outer", "cross")}
    return {key: value for key, value in values.items() if value is not None}


def _array(fields: Fields, files: TensorFiles, prefix: str) -> ArrayStatistics:
    heads, features = fields.get("heads", int, None), fields.positive("features")
    if heads is not None:
        at_least(f"{fields.where}: heads", heads, 1)
    lead = () if heads is None else (heads,)
    square = (*lead, features, features)

    def read(key: str, shape: tuple[int, ...]) -> np.ndarray:
        return _joined(files, f"{prefix}.{key}", shape)

    def moments(part: str) -> Moments:
        count = Fields(fields.get("counts", dict), f"{fields.where}.counts").get(part, int)
        amax = Fields(fields.get("amax", dict), f"{fields.where}.amax").get(part, float)
        at_least(f"{fields.where}.counts: {part}", count, 0)
        at_least(f"{fields.where}.amax: {part}", amax, 0.0)
        cross = None if heads is None else read(f"{part}.cross", (heads * features, heads * features))
        total, outer = read(f"{part}.total", (*lead, features)), read(f"{part}.outer", square)
        return Moments(count, total, outer, cross, float(amax))

    optional = lambda name: read(name, square) if fields.get(name, bool) else None
    return ArrayStatistics(moments("first"), moments("rest"), optional("queries"), optional("output"))


def _split(value: np.ndarray, name: str) -> np.ndarray:
    """`[2, ...]` float32 of sum `value`."""
    value = np.asarray(value, np.float64)
    if not (np.abs(value) < np.finfo(np.float32).max).all():
        raise ValueError(f"{name} must be finite, and within the range of float32")
    high = value.astype(np.float32)
    return np.stack([high, (value - high).astype(np.float32)])


def _joined(files: TensorFiles, name: str, shape: tuple[int, ...]) -> np.ndarray:
    value = files.read(name, (2, *shape)).astype(np.float64).sum(axis=0)
    if not np.isfinite(value).all():
        raise ValueError(f"{files.where}: tensor {name!r} must be finite")
    return value


def _digest(directory: Path) -> str:
    with open(directory / SINGLE, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
