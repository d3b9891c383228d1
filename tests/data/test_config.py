import subprocess
import sys
from pathlib import Path

import pytest

from kvjax.data import DataConfig
from kvjax.data.store import digest, file_name
from kvjax.files import atomic_file


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "data.name='' must name a dataset, for example 'sotu'"),
        ({"tokenizer": "bp"}, "data.tokenizer='bp' must be one of 'bpe', 'bytes'"),
        ({"vocab_size": 257}, "data.vocab_size=257 must lie in 258..65536 for the 'bpe' tokenizer"),
        ({"vocab_size": 65537}, "data.vocab_size=65537 must lie in 258..65536 for the 'bpe' tokenizer"),
        ({"context": 0}, "data.context=0 must be at least 1"),
    ],
)
def test_impossible_fields(fields, message):
    with pytest.raises(ValueError) as error:
        DataConfig(**fields)
    assert str(error.value) == message


def test_limits_are_allowed():
    DataConfig(vocab_size=258, context=1)
    DataConfig(vocab_size=65536)
    DataConfig(tokenizer="bytes", vocab_size=1)


def test_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("KVJAX_DATA", raising=False)
    assert DataConfig().folder() == Path("/home/ada/.cache/kvjax")
    assert DataConfig(data_dir="~/d").folder() == Path("/home/ada/d")
    monkeypatch.setenv("KVJAX_DATA", "/scratch/kv")
    assert DataConfig().folder() == Path("/scratch/kv")
    assert DataConfig(data_dir="/elsewhere").folder() == Path("/elsewhere")


def test_import_is_light():
    heavy = "{'tensorflow_datasets', 'tensorflow', 'tokenizers', 'pandas', 'sotu', 'jax'}"
    code = f"import sys, kvjax.data; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "file"
    with atomic_file(path) as file:
        file.write(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_digest_sees_where_documents_end():
    assert digest([b"ab", b"c"]) != digest([b"a", b"bc"]) != digest([b"abc"])
    assert digest([b"a", b"b"]) != digest([b"b", b"a"])


def test_file_name():
    assert file_name("glue/cola:1.0.0") == "glue-cola-1.0.0"
