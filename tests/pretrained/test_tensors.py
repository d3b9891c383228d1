import json
import os
import struct
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pretrained.tensors import INDEX, SINGLE, TensorFiles, write_tensors

BF16 = np.dtype(jnp.bfloat16)
WEIGHTS = {
    "b.half": np.array([1.5, -2.0, np.nan], np.float16),  # 6 bytes: what follows it unpadded is not aligned
    "a.brain": np.array([[1.0, -0.0], [3.140625, np.inf]], BF16),
    "c.single": np.arange(30, dtype=np.float32).reshape(2, 3, 5) / 7,
    "d.scalar": np.array(-1e-30, np.float32),
    "e.empty": np.zeros((0, 5), np.float32),
}


def framed(header: bytes | dict, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def save(directory, content: bytes, name=SINGLE):
    (directory / name).write_bytes(content)
    return directory


def equal(left, right) -> bool:
    return (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())


def refused(directory, message: str, file: str = SINGLE, call=TensorFiles.open, arguments=None) -> None:
    """The call raises a ValueError of one short line that starts with the file and holds `message`."""
    with pytest.raises(ValueError) as caught:
        call(*arguments or (directory,))
    text = str(caught.value)
    assert text.startswith(f"{directory / file}: ") and message in text and "\n" not in text and len(text) < 900


def test_bytes_made_by_hand(tmp_path):
    header = (
        b'{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2,1],"data_offsets":[6,14]},'
        b'"h":{"dtype":"F16","shape":[1],"data_offsets":[4,6]},"b":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},'
        b'"mask":{"dtype":"BOOL","shape":[1,1,3],"data_offsets":[14,17]},"q":{"dtype":"F4","shape":[2],"data_offsets":[17,18]}}'
    )
    data = bytes.fromhex("803f 49c0  0038  000020c1 0000003f  010001  2a")
    files = TensorFiles.open(save(tmp_path, len(header).to_bytes(8, "little") + header + data))
    assert files.names == {"w", "h", "b", "mask", "q"} and files.shape("mask") == (1, 1, 3)
    assert equal(files.read("w", (2, 1)), np.array([[-10.0], [0.5]], np.float32))
    assert equal(files.read("h", (1,)), np.array([0.5], np.float16))
    assert equal(files.read("b", (2,)), np.array([1.0, -3.140625], BF16))

    refused(
        tmp_path, "tensor 'mask' is BOOL; only F32, F16, BF16 are read", SINGLE, files.read, ("mask", (1, 1, 3))
    )
    refused(tmp_path, "tensor 'w' has shape [2, 1], must be [1, 2]", SINGLE, files.read, ("w", (1, 2)))
    refused(tmp_path, "tensor 'W' is missing among its 5, such as 'b'", SINGLE, files.shape, ("W",))
    os.truncate(tmp_path / SINGLE, 8 + len(header) + 13)
    refused(tmp_path, "tensor 'w' is cut off", SINGLE, files.read, ("w", (2, 1)))


def test_the_package_reads_what_is_written_and_the_other_way_round(tmp_path):
    numpy_files = pytest.importorskip("safetensors.numpy")
    weights = {**WEIGHTS, "f.turned": WEIGHTS["c.single"].T, "g.jax": jnp.ones((3,), jnp.bfloat16)}
    path = tmp_path / "new" / "model.safetensors"
    write_tensors(path, weights, {"format": "pt", "ä": "\n"})
    with pytest.importorskip("safetensors").safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt", "ä": "\n"}
    theirs, ours = numpy_files.load_file(path), TensorFiles.open(path.parent)
    assert theirs.keys() == ours.names == weights.keys()
    for name, weight in weights.items():
        assert equal(theirs[name], np.asarray(weight)) and equal(ours.read(name, weight.shape), np.asarray(weight))

    content = path.read_bytes()
    text = content[8 : 8 + int.from_bytes(content[:8], "little")]
    spans = {name: fields["data_offsets"] for name, fields in json.loads(text).items() if name in weights}
    assert len(text) % 8 == 0 and all(start % weights[n].dtype.itemsize == 0 for n, (start, _) in spans.items())
    write_tensors(path, dict(reversed(weights.items())), {"ä": "\n", "format": "pt"})
    assert path.read_bytes() == content

    numpy_files.save_file({**WEIGHTS, "ids": np.arange(3)}, path)
    ours = TensorFiles.open(path.parent)
    assert ours.names == {*WEIGHTS, "ids"} and all(equal(ours.read(n, w.shape), w) for n, w in WEIGHTS.items())


def test_what_cannot_be_written_is_named_and_the_old_file_stays(tmp_path):
    save(tmp_path, b"old")
    for name, dtype, metadata, message in (
        ("x", "f8", {}, "tensor 'x' is float64, must be float32, float16 or bfloat16"),
        ("x", ">f4", {}, "tensor 'x' is >f4, must be"),
        ("../x", "f4", {}, "tensor '../x' must have a name"),
        ("__metadata__", "f4", {}, "tensor '__metadata__' must have a name"),
        ("x", "f4", {3: "step"}, "__metadata__ must map strings to strings"),
    ):
        call = tmp_path / SINGLE, {name: np.zeros(2, dtype)}, metadata
        refused(tmp_path, message, SINGLE, write_tensors, call)
    assert (tmp_path / SINGLE).read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


lying = lambda data=8, **fields: framed({"a": entry(**fields)}, bytes(data))

HOSTILE = {
    "has 0 bytes, fewer than the 8": [b""],
    "header has 3 bytes": [struct.pack("<Q", 3) + b"{}"],
    "not valid JSON in UTF-8": [
        *map(framed, (b"{'a': 1}", b'{"\xff": 1}', b"\xef\xbb\xbf{}", '{"a": 1}'.encode("utf-16"))),
        framed(b'{"a": ' + b"9" * 5000 + b"}"),
    ],
    "JSON is nested too deeply": [framed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")],
    "header must be a JSON object, from the first byte on": [framed(b" {}"), framed(b"[]")],
    "' stands twice": [framed(b'{"a.b": 1, "a.b": 1}'), framed(b'{"a": {"dtype": "U8", "dtype": "U8"}}')],
    "__metadata__ must map strings to": [framed({"__metadata__": m}) for m in (None, [], {"a": 3}, {"a": []})],
    "tensor 'a' must be an object of exactly": [
        framed({"a": fields}, bytes(8)) for fields in (1, [], {"dtype": "F32", "shape": [2]}, {**entry(), "x": 1})
    ],
    "tensor 'a' has dtype": [lying(dtype=dtype) for dtype in ("f32", "C128", "", ["F32"], None)],
    "tensor 'a' has shape": [
        *[lying(shape=s) for s in (2, "2", None, [2.0], [True, 2], [-2], [-1, -2], [[2]], [1] * 65, [0, 2**60])],
        lying(shape=[10**4000] * 64),
    ],
    "tensor 'a' has data_offsets": [
        lying(offsets=o) for o in (8, [8], [0, 4, 8], [0.0, 8.0], [False, 8], [8, 0], [-8, 0], [4, 12], [0, 2**80])
    ],
    "tensor 'a' has data_offsets [0, 8], must be two integers, start and end, within the 7": [lying(data=7)],
    "tensor 'a' of shape [": [lying(shape=[3]), lying(shape=[2**59, 1])],
    "tensor 'a' of shape [3] and dtype F4": [lying(n, dtype="F4", shape=[3], offsets=[0, n]) for n in (1, 2)],
    "has 1 bytes after its last tensor": [lying(data=9)],
    "tensor 'a' starts at byte 1 of the data, must at 0": [lying(data=9, offsets=[1, 9])],
    "'b' starts": [framed({"a": entry(), "b": entry(offsets=[i, i + 8])}, bytes(i + 8)) for i in (0, 4, 9)],
    **{
        f"tensor {name!r} must have a name of printable characters": [framed({name: entry()}, bytes(8))]
        for name in ("", "../../x", "/etc/x", "a\\b", "a..b", "a\nb", "a\0", "\x1b[2J", "\ud800", "a\u202eb")
    },
    "tensor 'nnnnnnnn": [framed({"n" * 10_000: 1})],
}


@pytest.mark.parametrize("message", HOSTILE)
def test_a_file_that_lies_is_named(tmp_path, message):
    for content in HOSTILE[message]:
        refused(save(tmp_path, content), message)


MAP = {"x": "one.safetensors", "y": "one.safetensors", "z": "two.safetensors"}


def shards(directory, index: bytes | dict):
    """Two files, every value the number of its tensor's letter, and an index."""
    for names in ("xy", "z"):
        weights = {name: np.full((1, 2), ord(name), np.float32) for name in names}
        write_tensors(directory / MAP[names[0]], weights, {})
    text = index if isinstance(index, bytes) else json.dumps({"weight_map": index}).encode()
    return save(directory, text, INDEX)


def test_shards_are_one(tmp_path):
    """Through symlinks, too: a download cache holds the data elsewhere."""
    shards(tmp_path / "data", MAP)
    (tmp_path / "links").mkdir()
    for path in (tmp_path / "data").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    files = TensorFiles.open(tmp_path / "links")
    assert files.names == {"x", "y", "z"} and files.shape("z") == (1, 2)
    assert all((files.read(name, (1, 2)) == ord(name)).all() for name in "xyz")
    refused(tmp_path / "links", "tensor 'w' is missing among its 3", INDEX, files.shape, ("w",))
    refused(tmp_path / "links", "tensor 'z' has shape [1, 2]", "two.safetensors", files.read, ("z", (2,)))


WRONG_INDEX = {
    "must be an object whose weight_map": [b"{}", b"[]", b'{"weight_map": []}', {}],
    "not valid JSON in UTF-8": [b"", b"{", b"\xff", b'{"weight_map": {"x": "", "x": ""}}'],
    "tensor 'y' is mapped to ": [
        *[MAP | {"y": before + "one.safetensors"} for before in ("/", "../", "./", "a\\", "C:", "~/", "a..", " ")],
        *[MAP | {"y": f} for f in ("a.bin", "a.safetensors\n", ".safetensors", "", 1, "o" * 300 + ".safetensors")],
    ],
    "lists no.safetensors, which is missing": [MAP | {"w": "no.safetensors"}],
    "tensor 'w' is mapped to two.safetensors, which lacks it": [MAP | {"w": "two.safetensors"}],
}


@pytest.mark.parametrize("message", WRONG_INDEX)
def test_an_index_that_is_wrong_is_named(tmp_path, message):
    for index in WRONG_INDEX[message]:
        refused(shards(tmp_path, index), message, INDEX)


def test_shards_that_are_wrong_are_named(tmp_path):
    shards(tmp_path, MAP | {"y": "two.safetensors"})
    refused(tmp_path, f"tensor 'y' is in two.safetensors by {INDEX}", "one.safetensors")
    shards(tmp_path, {"x": MAP["x"], "z": MAP["z"]})
    refused(tmp_path, f"tensor 'y' is not listed in {INDEX}", "one.safetensors")
    shards(tmp_path, MAP)
    save(tmp_path, (tmp_path / "one.safetensors").read_bytes(), "two.safetensors")
    refused(tmp_path, "tensor 'x' is in one.safetensors", "two.safetensors")
    refused(save(tmp_path, framed({})), "does not list the model.safetensors beside it", INDEX)


def test_a_directory_without_weights_says_what_to_do(tmp_path):
    refused(tmp_path / "missing", "is not a directory; give the one that holds", "")
    for name in (SINGLE, INDEX):
        os.mkfifo(tmp_path / name)  # to open it would be to wait
    refused(tmp_path, f"holds neither {SINGLE} nor {INDEX}", "")
    for name in ("pytorch_model.bin", "a.pt", "b.pth", "c.ckpt"):
        save(tmp_path, b"", name)
    refused(tmp_path, "but ['a.pt', 'b.pth', 'c.ckpt', 'pytorch_model.bin']: pickle files are never read", "")


def test_damage_is_refused_or_only_renames(tmp_path):
    """Every truncation, and one bit of the header turned, whatever its place in a byte."""
    header = {"__metadata__": {"A": "B"}, "C": entry(offsets=[6, 14]), "D": entry("BF16", [3], [0, 6])}
    data = bytes(range(1, 15))
    content = framed(json.dumps(header).encode() + b"  ", data)
    for length in range(len(content)):
        refused(save(tmp_path, content[:length]), "")
    os.truncate(save(tmp_path, struct.pack("<Q", 100_000_001)) / SINGLE, 10**9)  # all of it a hole
    refused(tmp_path, "header has 100000001 bytes, must be at most 100000000")
    renamed = set()
    for bit in range(0, 8 * (len(content) - len(data)), 3):  # 3 and 8 have no common factor
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            files = TensorFiles.open(save(tmp_path, flipped))
        except ValueError as error:
            assert str(error).startswith(f"{tmp_path / SINGLE}: ")
            continue
        renamed.add(chr(content[bit // 8]))
        low, high = sorted(files.names, key=files.shape, reverse=True)
        assert files.read(low, (3,)).tobytes() + files.read(high, (2,)).tobytes() == data
    assert renamed == set("ABCD")


def test_memory_is_that_of_one_tensor(tmp_path):
    weights = {f"layer{i}": np.ones((1000 + 50 * i, 1500), np.float16) for i in range(16)}
    tracemalloc.start()
    write_tensors(tmp_path / SINGLE, weights, {})
    files = TensorFiles.open(tmp_path)
    ends = [files.read(name, weight.shape)[-1, -1] for name, weight in weights.items()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ends == [1] * 16 and 1 <= peak / weights["layer15"].nbytes < 1.1  # of 66 MB in all
