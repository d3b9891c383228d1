"""Text, tokens and batches."""

from kvjax.data.batches import Corpus, TrainBatches, eval_batches, load_corpus
from kvjax.data.config import DataConfig
from kvjax.data.text import documents
from kvjax.data.tokenizer import Tokenizer, from_json, load_tokenizer

__all__ = [
    "Corpus",
    "DataConfig",
    "Tokenizer",
    "TrainBatches",
    "documents",
    "eval_batches",
    "from_json",
    "load_corpus",
    "load_tokenizer",
]
