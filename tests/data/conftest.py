import os
from pathlib import Path

import pytest

from kvjax.data import DataConfig
from kvjax.data.text import documents
from kvjax.data.tokenizer import BPETokenizer


@pytest.fixture(scope="session")
def sotu(tmp_path_factory) -> DataConfig:
    """The default dataset, in a data folder that the whole session shares."""
    return DataConfig(data_dir=str(tmp_path_factory.mktemp("kvjax_data")))


@pytest.fixture(scope="session")
def small_bpe(sotu) -> BPETokenizer:
    """512 ids learned from the first 17 documents of the train split."""
    return BPETokenizer.train(documents(sotu, "train")[:17], 512)


@pytest.fixture(scope="session")
def shakespeare_dir() -> str:
    """Folder of tiny_shakespeare's source file, where the machine has one."""
    shared = Path(os.environ.get("KVJAX_TEST_SHARED", Path(__file__).parents[3] / "shared"))
    folder = shared / "data" / "tiny_shakespeare"
    if not (folder / "input.txt").exists():
        pytest.skip("needs data/tiny_shakespeare/input.txt in $KVJAX_TEST_SHARED or ../shared")
    return str(folder)
