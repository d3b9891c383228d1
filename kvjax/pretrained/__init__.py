"""Pretrained models in and out: directories of config.json, safetensors and tokenizer.json, as Hugging Face's."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
from flax import nnx

from kvjax.codecs import Exact
from kvjax.data.tokenizer import HuggingFaceTokenizer
from kvjax.decoder import Decoder
from kvjax.model import Model
from kvjax.pretrained.families import Architecture, architecture, hugging_face
from kvjax.pretrained.fields import Fields
from kvjax.pretrained.smollm2 import smollm2 as fetch_smollm2
from kvjax.pretrained.tensors import TensorFiles, write_tensors
from kvjax.pretrained.weights import named_weights, read_weights
from kvjax.results import plain, read_json, write_bytes, write_json
from kvjax.slots import nbytes
from kvjax.train import compute_dtype

NAMES = {"smollm2": fetch_smollm2}
"""Models that have a name: functions that give their directory."""


def load(name_or_directory: str | Path, dtype: str = "auto") -> Model:
    """A model by name, or from its directory, with parameters in `dtype` (see `train.compute_dtype`).

    Raises ValueError naming file and field or tensor for all that is missing, extra, malformed or unknown.
    """
    nnx.set_graph_mode(False)
    directory = NAMES[name_or_directory]() if name_or_directory in NAMES else Path(name_or_directory)
    config = directory / "config.json"
    if not config.is_file():
        known = ", ".join(NAMES)
        raise ValueError(f"model={str(name_or_directory)!r} must be {known} or a directory with a config.json")
    values = read_json(config)
    try:
        found = architecture(values, str(config))
    except ValueError as error:
        # Rules of our own configurations know neither the file nor its names.
        raise error if str(config) in str(error) else ValueError(f"{config}: {error}") from error
    tokenizer, stop_ids = _tokenizer(directory, found)
    files = TensorFiles.open(directory)
    if found.decoder.depth > len(files.names):
        raise ValueError(
            f"{config}: num_hidden_layers={found.decoder.depth} must be at most the number of tensors, "
            f"{len(files.names)} in {files.where}"
        )
    decoder = nnx.eval_shape(lambda: Decoder(found.decoder, found.attention, found.vocab_size, jax.random.key(0)))
    read_weights(decoder, files, compute_dtype(dtype))
    graphdef, params = nnx.split(decoder)
    return Model(str(name_or_directory), graphdef, params, tokenizer, stop_ids, found.max_len)


def _tokenizer(directory: Path, found: Architecture) -> tuple[HuggingFaceTokenizer, tuple[int, ...]]:
    """The tokenizer, and every token that ends a text: chat models name more in generation_config.json."""
    stop_ids, more = found.stop_ids, directory / "generation_config.json"
    if more.is_file():
        others = Fields(read_json(more), str(more)).ids("eos_token_id", found.vocab_size)
        stop_ids = tuple(dict.fromkeys([*stop_ids, *others]))
    if not stop_ids:
        raise ValueError(f"{directory / 'config.json'}: eos_token_id is missing")
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; only tokenizers in this form are read")
    try:
        tokenizer = HuggingFaceTokenizer(path.read_text("utf-8"), found.begin_id, stop_ids[0], found.vocab_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tokenizer, stop_ids


def save(directory: Path, model: Model, max_len: int, facts: Mapping[str, object]) -> None:
    """Write a model that transformers loads, with a model card of its `facts`; there whole or not at all.

    Grouped attention is written as Llama, Mistral, Qwen2 or Qwen3, MLA as DeepSeek-V3. ValueError where
    `directory` exists, or where transformers has nothing that computes the same.
    """
    decoder = nnx.merge(model.graphdef, model.params)
    if directory.exists():
        raise ValueError(f"{directory} exists; choose a new directory")
    ours = Architecture(
        decoder.config, decoder.attention, decoder.vocab_size, max_len, model.tokenizer.begin_id, model.stop_ids
    )
    dtype = jax.tree.leaves(model.params)[0].dtype
    config = hugging_face(ours, dtype.name)
    cache = jax.eval_shape(lambda: decoder.init_cache(1, 64, Exact()))
    facts = {"cache bytes per token": nbytes(cache.memory) // cache.max_len} | dict(facts)
    card = "".join(f"* {name}: {value}\n" for name, value in plain(facts, "facts").items())
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        made = Path(scratch) / "model"
        write_json(made / "config.json", config)
        write_tensors(made / "model.safetensors", named_weights(decoder), {"format": "pt"})
        write_bytes(made / "tokenizer.json", model.tokenizer.to_hugging_face().encode())
        write_json(made / "tokenizer_config.json", _tokenizer_config(model, max_len))
        write_bytes(made / "README.md", f"# {directory.name}\n\n{card}".encode())
        made.rename(directory)


def _tokenizer_config(model: Model, max_len: int) -> dict[str, object]:
    text = lambda token: model.tokenizer.decode([token])
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text(model.tokenizer.begin_id),
        "eos_token": text(model.tokenizer.end_id),
        "model_max_length": max_len,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # text that looks like a special token stays text, as here
    }


__all__ = ["NAMES", "load", "save"]
