"""Weights on disk: safetensors files, read one tensor at a time and not trusted.

The format (https://github.com/huggingface/safetensors#format): 8 bytes that are the length of the header,
little-endian; the header, a JSON object of a dtype, a shape and a span of bytes for each name, padded with
spaces; then the tensors' bytes, without gaps.

Not the `safetensors` package, for two reasons. Memory: a plain read into a fresh array is all that a tensor
takes, where a mapped file stays resident beside the copies made from it. Trust: a file that contradicts
itself or the format in any way is refused with an error that names the file and the tensor, where the package
takes the last of two equal names and ignores fields that it does not know.
"""

import json
import math
import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from kvjax.files import atomic_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_HEADER = 100_000_000
"""Bytes of the longest header that the format allows."""

_FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}
_BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_short = reprlib.Repr()  # A hostile file must not fill the terminal with its names.
_short.maxstring = 200


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: `num_bytes` from `start` of the file `path`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class TensorFiles:
    """The tensors of a directory by name: `model.safetensors`, or the files that its index lists."""

    def __init__(self, path: Path, entries: Mapping[str, _Entry]):
        self._path, self._entries = path, entries

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Reads and checks every header, no data; ValueError naming the file, and the tensor, that is wrong."""
        single, index = directory / SINGLE, directory / INDEX
        # is_file: opening a pipe would wait for its writer.
        if index.is_file():
            return cls(index, _sharded(index))
        if single.is_file():
            return cls(single, _read_header(single))
        if not directory.is_dir():
            raise ValueError(f"{directory}: is not a directory; give the one that holds {SINGLE}")
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"{directory}: holds neither {SINGLE} nor {INDEX}, but {_short.repr(pickles)}: pickle files are "
                "never read, since they can run code; if you trust them, convert them to safetensors, as "
                "transformers does by from_pretrained, then save_pretrained"
            )
        raise ValueError(f"{directory}: holds neither {SINGLE} nor {INDEX}")

    @property
    def where(self) -> Path:
        """The file, or the index, that was opened."""
        return self._path

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors, those of dtypes that `read` refuses included."""
        return frozenset(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; ValueError if there is none of this name."""
        return self._entry(name).shape

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A fresh array in the file's dtype: float32, float16 or bfloat16.

        Raises ValueError naming file and tensor if it is missing, of another dtype or not of `shape`.
        """
        entry = self._entry(name)
        where = f"{entry.path}: tensor {_short.repr(name)}"
        if entry.dtype not in _FLOATS:
            raise ValueError(f"{where} is {entry.dtype}; only {', '.join(_FLOATS)} are read")
        if entry.shape != tuple(shape):
            raise ValueError(f"{where} has shape {list(entry.shape)}, must be {list(shape)}")
        data = np.fromfile(entry.path, np.uint8, count=entry.num_bytes, offset=entry.start)
        if data.size != entry.num_bytes:
            raise ValueError(f"{where} is cut off: the file became shorter after its header was read")
        return data.view(_FLOATS[entry.dtype]).reshape(entry.shape)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            some = f", such as {_short.repr(min(self._entries))}" if self._entries else ""
            raise ValueError(
                f"{self._path}: tensor {_short.repr(name)} is missing among its {len(self._entries)}{some}"
            )
        return self._entries[name]


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Replaces `path` in one step by a safetensors file of float32, float16 and bfloat16 arrays, JAX's too.

    Wide dtypes come first, then names in order, so that every tensor is aligned and equal input gives equal
    bytes. At most one tensor is copied at a time, but JAX keeps the host copy of an array on a GPU for as long
    as the array lives. Raises ValueError naming the tensor that the format, or `TensorFiles`, does not take.
    """
    dtypes = {dtype: name for name, dtype in _FLOATS.items()}
    for name, array in tensors.items():
        if array.dtype not in dtypes:
            raise ValueError(
                f"{path}: tensor {_short.repr(name)} is {array.dtype}, must be float32, float16 or bfloat16"
            )
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, end = {}, 0
    for name in names:
        start, end = end, end + tensors[name].size * tensors[name].dtype.itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": dtypes[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    _entries(path, header, dict(metadata), 0, end)
    header = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def _sharded(index: Path) -> dict[str, _Entry]:
    """Tensors of all files of an index, which must say of each tensor what the files say."""
    with open(index, "rb") as file:
        fields = _json(index, file.read(MAX_HEADER + 1))
    if not isinstance(fields, dict) or not isinstance(fields.get("weight_map"), dict) or not fields["weight_map"]:
        raise ValueError(f"{index}: must be an object whose weight_map maps tensors to files")
    weight_map = fields["weight_map"]
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,200}\.safetensors", shard)
        if not plain or ".." in shard:
            raise ValueError(
                f"{index}: tensor {_short.repr(name)} is mapped to {_short.repr(shard)}, must be the plain name "
                "of a file beside the index that ends in .safetensors"
            )
    if index.with_name(SINGLE).exists() and SINGLE not in weight_map.values():
        raise ValueError(f"{index}: does not list the {SINGLE} beside it; remove the one that is not the model")
    entries = {}
    for shard in sorted(set(weight_map.values())):
        path = index.with_name(shard)
        if not path.is_file():
            raise ValueError(f"{index}: lists {shard}, which is missing; was the download interrupted?")
        found = _read_header(path)
        for name in found:
            if name not in weight_map:
                raise ValueError(f"{path}: tensor {_short.repr(name)} is not listed in {index.name}")
            if weight_map[name] != shard:
                raise ValueError(f"{path}: tensor {_short.repr(name)} is in {weight_map[name]} by {index.name}")
        entries.update(found)
    for name, shard in weight_map.items():
        if name not in entries:
            raise ValueError(f"{index}: tensor {_short.repr(name)} is mapped to {shard}, which lacks it")
    return entries


def _read_header(path: Path) -> dict[str, _Entry]:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise ValueError(f"{path}: has {size} bytes, fewer than the 8 of the header's length")
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER, size - 8):
            raise ValueError(
                f"{path}: its header has {length} bytes, must be at most {MAX_HEADER} and within the file's {size}"
            )
        text = file.read(length)
    header = _json(path, text)
    if not isinstance(header, dict) or text[:1] != b"{":
        raise ValueError(f"{path}: its header must be a JSON object, from the first byte on")
    metadata = header.pop("__metadata__", {})  # The one optional field of the format.
    return _entries(path, header, metadata, 8 + length, size)


def _json(path: Path, text: bytes) -> Any:
    if len(text) > MAX_HEADER:
        raise ValueError(f"{path}: has more than {MAX_HEADER} bytes")
    try:
        return json.loads(text.decode(), object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError(f"{path}: its JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON in UTF-8: {error}") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{_short.repr(name)} stands twice in one object")
        fields[name] = value
    return fields


def _entries(path: Path, header: dict[str, Any], metadata: Any, start: int, end: int) -> dict[str, _Entry]:
    """Places of the tensors of a header, whose data fill the bytes from `start` to `end`, else ValueError."""
    if not isinstance(metadata, dict) or not all(isinstance(s, str) for pair in metadata.items() for s in pair):
        raise ValueError(f"{path}: __metadata__ must map strings to strings")
    entries = {name: _checked(path, name, fields, start, end) for name, fields in header.items()}
    filled = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if entry.start != filled:
            raise ValueError(
                f"{path}: tensor {_short.repr(name)} starts at byte {entry.start - start} of the data, must at "
                f"{filled - start}, where the one before it ends"
            )
        filled += entry.num_bytes
    if filled != end:
        raise ValueError(f"{path}: has {end - filled} bytes after its last tensor, must have none")
    return entries


def _checked(path: Path, name: str, fields: Any, start: int, end: int) -> _Entry:
    where = f"{path}: tensor {_short.repr(name)}"
    # No name becomes a path here; one that looks like it was made to harm somebody.
    if not name or not name.isprintable() or re.search(r"[/\\]|\.\.", name) or name == "__metadata__":
        raise ValueError(f"{where} must have a name of printable characters without '/', '\\' and '..'")
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} must be an object of exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{where} has dtype {_short.repr(dtype)}, must be one of {', '.join(_BITS)}")
    # NumPy's limits, which a dimension of 0 would hide from the check of the size.
    if not _naturals(shape) or len(shape) > 64 or math.prod(dim or 1 for dim in shape) >= 2**60:
        raise ValueError(
            f"{where} has shape {_short.repr(shape)}, must be at most 64 integers, none negative, "
            "of a product below 2**60"
        )
    if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= end - start:
        raise ValueError(
            f"{where} has data_offsets {_short.repr(offsets)}, must be two integers, start and "
            f"end, within the {end - start} bytes of data; is the file cut off?"
        )
    num_bytes = offsets[1] - offsets[0]
    if 8 * num_bytes != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"{where} of shape {shape} and dtype {dtype} has data_offsets of {num_bytes} bytes")
    return _Entry(path, dtype, tuple(shape), start + offsets[0], num_bytes)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)  # no bools
