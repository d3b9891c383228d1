"""Hugging Face's `config.json` as configurations of this project, and back.

Families: Llama, Mistral, Qwen2, Qwen3, and DeepSeek-V2 and V3 with dense layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvjax.attention.base import AttentionConfig
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.checks import one_of
from kvjax.decoder import DecoderConfig
from kvjax.layers import RMS_EPS
from kvjax.pretrained.fields import Fields
from kvjax.rope import RopeScaling

GROUPED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
LATENT = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
MODEL_TYPES = dict(zip(GROUPED + LATENT, ("llama", "mistral", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3")))


@dataclass(frozen=True)
class Architecture:
    """What a `config.json` says of a model."""

    decoder: DecoderConfig
    attention: AttentionConfig
    vocab_size: int
    max_len: int
    """Positions that the model was made for (`max_position_embeddings`)."""
    begin_id: int | None
    """Token before every text (`bos_token_id`), if there is one."""
    stop_ids: tuple[int, ...]
    """Tokens that end a text (`eos_token_id`)."""


def architecture(values: Any, where: str) -> Architecture:
    """The model that a `config.json` describes; ValueError where this project has no such thing."""
    fields = Fields(values, where)
    names = fields.get("architectures", list)
    if len(names) != 1 or not isinstance(names[0], str):
        raise ValueError(f"{where}: architectures={names!r} must name one class")
    one_of(f"{where}: architectures", names[0], GROUPED + LATENT)
    attention = _latent(fields, names[0]) if names[0] in LATENT else _grouped(fields, names[0])
    fields.require("hidden_act", "silu", "silu")
    vocab_size = fields.positive("vocab_size")
    return Architecture(
        DecoderConfig(
            width=fields.get("hidden_size", int),
            depth=fields.positive("num_hidden_layers"),
            mlp_width=fields.get("intermediate_size", int),
            tie_embeddings=fields.get("tie_word_embeddings", bool, default=False),
            norm_eps=fields.get("rms_norm_eps", float, default=1e-6),
        ),
        attention,
        vocab_size,
        fields.positive("max_position_embeddings"),
        next(iter(fields.ids("bos_token_id", vocab_size)), None),
        fields.ids("eos_token_id", vocab_size),
    )


def _grouped(fields, name):
    qwen2, qwen3, mistral = (name.startswith(family) for family in ("Qwen2", "Qwen3", "Mistral"))
    heads = fields.positive("num_attention_heads")
    kv_heads = fields.get("num_key_value_heads", int, None, default=None)
    head_dim = fields.get("head_dim", int, None, default=128 if qwen3 else None)
    if head_dim is None:
        width = fields.get("hidden_size", int)
        if width % heads:
            raise ValueError(
                f"{fields.where}: hidden_size={width} must be a multiple of num_attention_heads={heads}"
            )
        head_dim = width // heads
    bias = False if qwen2 or mistral else fields.get("attention_bias", bool, default=False)
    fields.require("mlp_bias", False, False)
    theta, scaling, _ = _rope(fields)
    return Grouped(
        heads,
        heads if kv_heads is None else kv_heads,
        head_dim,
        theta,
        qk_norm=qwen3,
        qkv_bias=qwen2 or bias,
        output_bias=bias,
        norm_eps=fields.get("rms_norm_eps", float, default=1e-6) if qwen3 else RMS_EPS,
        rope_scaling=scaling,
        window=_window(fields, mistral, qwen2 or qwen3),
    )


def _window(fields, mistral, optional):
    """Mistral has a window where it names one, Qwen only where it says so, and then from a layer on."""
    kinds = fields.get("layer_types", list, None, default=None)
    window = fields.get("sliding_window", int, None, default=4096) if mistral or optional else None
    if optional and not fields.get("use_sliding_window", bool, default=False):
        window = None
    if kinds is None and optional and window is not None:
        first = fields.get("max_window_layers", int, default=28)
        kinds = ["sliding_attention" if i >= first else "" for i in range(fields.get("num_hidden_layers", int))]
    expected = "full_attention" if window is None else "sliding_attention"
    for i, kind in enumerate(kinds or ()):
        if kind != expected:
            raise ValueError(
                f"{fields.where}: layer {i} has another attention than sliding_window={window} gives the rest; "
                "only one kind for all layers is supported"
            )
    return window


def _latent(fields, name):
    depth = fields.get("num_hidden_layers", int)
    dense = fields.get("first_k_dense_replace", int, default=3 if name.startswith("DeepseekV3") else 0)
    if dense < depth:
        raise ValueError(
            f"{fields.where}: layer {dense} is a mixture of experts (first_k_dense_replace={dense} of {depth} "
            f"layers, n_routed_experts={fields.values.get('n_routed_experts')}); only dense layers are supported"
        )
    fields.require("attention_bias", False, False)
    theta, scaling, logit_factor = _rope(fields)
    nope, rope = fields.get("qk_nope_head_dim", int), fields.get("qk_rope_head_dim", int)
    return Latent(
        fields.get("num_attention_heads", int),
        rank=fields.get("kv_lora_rank", int),
        rope_dim=rope,
        nope_dim=nope,
        value_dim=fields.get("v_head_dim", int),
        query_rank=fields.get("q_lora_rank", int, None, default=1536) or None,  # DeepSeek's own code writes 0
        rope_theta=theta,
        # V2 always turns neighbours, V3 where it says so.
        rope_interleaved=name.startswith("DeepseekV2") or fields.get("rope_interleave", bool, default=True),
        rope_scaling=scaling,
        logit_scale=None if logit_factor == 1.0 else (nope + rope) ** -0.5 * logit_factor,
    )


def _rope(fields):
    """Base, scaling, and the factor on MLA's logits that YaRN's `mscale_all_dim` asks for."""
    # transformers 5 writes `rope_parameters`; before, the base stood beside `rope_scaling`.
    old = fields.get("rope_scaling", dict, None, default=None)
    given = fields.get("rope_parameters", dict, None, default=None) if old is None else old
    inner = Fields(given or {}, f"{fields.where}: rope_parameters")
    theta = inner.get("rope_theta", float, default=fields.get("rope_theta", float, default=10_000.0))
    for place in (fields, inner):
        place.require("partial_rotary_factor", 1.0, 1.0)
    kind = inner.get("rope_type", str, default=inner.get("type", str, default="default"))
    if kind == "default":
        if any(isinstance(value, Mapping) for value in inner.values.values()):
            raise ValueError(f"{inner.where} differ from layer to layer; only one rule for all is supported")
        return float(theta), None, 1.0
    one_of(f"{inner.where}: rope_type", kind, ("default", "linear", "llama3", "yarn"))
    if kind == "linear":
        return float(theta), RopeScaling("linear", inner.get("factor", float)), 1.0
    max_len = fields.get("max_position_embeddings", int)
    original = inner.positive("original_max_position_embeddings", default=max_len)
    if kind == "llama3":
        low, high = (inner.get(name, float) for name in ("low_freq_factor", "high_freq_factor"))
        factor = inner.get("factor", float)
        return float(theta), RopeScaling("llama3", factor, original, low, high), 1.0
    factor = inner.get("factor", float, None)
    factor = max_len / original if factor is None else factor
    mscale, all_dim = (inner.get(name, float, None, default=None) for name in ("mscale", "mscale_all_dim"))
    grow = lambda mscale: 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
    magnitude = inner.get("attention_factor", float, None, default=None)
    if magnitude is None:
        magnitude = grow(mscale) / grow(all_dim) if mscale and all_dim else grow(1.0)
    scaling = RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=inner.get("beta_fast", float, None, default=None) or 32.0,
        beta_slow=inner.get("beta_slow", float, None, default=None) or 1.0,
        truncate=inner.get("truncate", bool, default=True),
        magnitude=magnitude,
    )
    return float(theta), scaling, grow(all_dim) ** 2 if all_dim else 1.0


def hugging_face(model: Architecture, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of a model, for the family that computes the same; ValueError if there is none.

    Its `dtype` is that of the files.
    """
    decoder, attention = model.decoder, model.attention
    if isinstance(attention, Latent):
        name, own = "DeepseekV3ForCausalLM", _write_latent(decoder, attention)
    elif isinstance(attention, Grouped):
        name, own = _write_grouped(decoder, attention)
    else:
        kind = type(attention).__name__
        raise ValueError(f"attention={kind} has no counterpart in transformers; only Grouped and Latent have")
    if attention.num_sinks is not None:
        raise ValueError(f"attention.num_sinks={attention.num_sinks} has no counterpart in transformers")
    return {
        "architectures": [name],
        "model_type": MODEL_TYPES[name],
        "vocab_size": model.vocab_size,
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp_width,
        "num_hidden_layers": decoder.depth,
        "num_attention_heads": attention.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_len,
        "rms_norm_eps": decoder.norm_eps,
        "tie_word_embeddings": decoder.tie_embeddings,
        "rope_parameters": _write_rope(attention),
        "bos_token_id": model.begin_id,
        "eos_token_id": list(model.stop_ids) if len(model.stop_ids) > 1 else next(iter(model.stop_ids), None),
        "dtype": dtype,
        **own,
    }


def _write_grouped(decoder, attention):
    own = {"num_key_value_heads": attention.num_kv_heads, "head_dim": attention.head_dim}
    bias = attention.qkv_bias, attention.output_bias
    if attention.qk_norm and attention.norm_eps != decoder.norm_eps:
        raise ValueError(f"attention.norm_eps={attention.norm_eps} must equal decoder.norm_eps={decoder.norm_eps}")
    if attention.window is not None:
        if attention.qk_norm or any(bias):
            raise ValueError(f"attention.window={attention.window} with a bias or qk_norm has no counterpart")
        return "MistralForCausalLM", own | {"sliding_window": attention.window}
    if bias == (True, False) and not attention.qk_norm:
        return "Qwen2ForCausalLM", own | {"use_sliding_window": False}
    if bias[0] != bias[1]:
        raise ValueError(f"attention.qkv_bias={bias[0]} must equal attention.output_bias={bias[1]}")
    if attention.qk_norm:
        return "Qwen3ForCausalLM", own | {"attention_bias": bias[0], "use_sliding_window": False}
    if decoder.width % attention.num_heads == 0:
        return "LlamaForCausalLM", own | {"attention_bias": bias[0], "mlp_bias": False}
    # transformers refuses such a Llama though it needs no such width; Mistral without a window is the same.
    if bias[0]:
        raise ValueError(f"decoder.width={decoder.width} with biases must be a multiple of {attention.num_heads}")
    return "MistralForCausalLM", own | {"sliding_window": None}


def _write_latent(decoder, attention):
    if attention.window is not None:
        raise ValueError(f"attention.window={attention.window} of Latent has no counterpart in transformers")
    if not attention.latent_norm or attention.rope_blocks > 1:
        own = f"latent_norm={attention.latent_norm}, rope_blocks={attention.rope_blocks}"
        raise ValueError(f"attention.{own} must be True and 1: transformers has no others")
    return {
        "num_key_value_heads": attention.num_heads,
        "kv_lora_rank": attention.rank,
        "q_lora_rank": attention.query_rank,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope_dim,
        "v_head_dim": attention.value_dim,
        "rope_interleave": attention.rope_interleaved,
        "attention_bias": False,
        "first_k_dense_replace": decoder.depth,
        "num_nextn_predict_layers": 0,
    }


def _write_rope(attention):
    rope, scaling = {"rope_theta": attention.rope_theta, "rope_type": "default"}, attention.rope_scaling
    if isinstance(attention, Latent) and attention.logit_scale is not None:
        plain = (attention.nope_dim + attention.rope_dim) ** -0.5
        if scaling is None or scaling.kind != "yarn" or scaling.factor == 1.0:
            raise ValueError(f"attention.logit_scale={attention.logit_scale} must be {plain} without YaRN")
        growth = math.sqrt(attention.logit_scale / plain) - 1.0
        rope |= {"mscale_all_dim": growth / (0.1 * math.log(scaling.factor))}
    if scaling is None:
        return rope
    rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        rope |= {"original_max_position_embeddings": scaling.original_len}
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        rope |= {"attention_factor": scaling.magnitude, "truncate": scaling.truncate}
    return rope
