"""A decoder's parameters under the names that Hugging Face's files give them.

PyTorch keeps a matrix as [out, in]; ours are [in, out], with heads on axes of their own. D width, R latent
rank, N heads, H no-position dim, V value dim.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.attention.grouped import GroupedAttention
from kvjax.attention.latent import LatentAttention
from kvjax.decoder import Decoder
from kvjax.pretrained.tensors import TensorFiles

Arrays = tuple[np.ndarray, ...]
UNUSED = ("rotary_emb.inv_freq",)
"""Ends of names of tensors that files of older releases hold and no model reads."""


@dataclass(frozen=True)
class Weight:
    """Parameters of one module, and the tensors of a file that hold them."""

    module: nnx.Module
    attributes: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    """Names and shapes of the tensors."""
    inward: Callable[..., Arrays]
    """Parameters from tensors."""
    outward: Callable[..., Arrays]
    """Tensors from parameters."""


def weights(decoder: Decoder) -> Iterator[Weight]:
    """All parameters of an unscanned decoder (its arrays may be mere shapes), the largest first."""
    yield _same(decoder, "embedding_VD", "model.embed_tokens.weight")
    if not decoder.config.tie_embeddings:
        yield _same(decoder, "unembedding_VD", "lm_head.weight")
    for i, block in enumerate(decoder.layers):
        at = f"model.layers.{i}"
        yield _linear(block.mlp, "gate_up_DE", f"{at}.mlp.gate_proj.weight", f"{at}.mlp.up_proj.weight")
        yield _linear(block.mlp, "down_FD", f"{at}.mlp.down_proj.weight")
        if isinstance(block.attention, GroupedAttention):
            yield from _grouped(block.attention, f"{at}.self_attn")
        else:
            assert isinstance(block.attention, LatentAttention)
            yield from _latent(block.attention, f"{at}.self_attn")
        yield _same(block.attention_norm, "gain_H", f"{at}.input_layernorm.weight")
        yield _same(block.mlp_norm, "gain_H", f"{at}.post_attention_layernorm.weight")
    yield _same(decoder.norm, "gain_H", "model.norm.weight")


def _grouped(attention, at):
    for letter, name in (("q", "q_DNH"), ("k", "k_DKH"), ("v", "v_DKH")):
        yield _linear(attention, name, f"{at}.{letter}_proj.weight")
    yield _linear(attention, "o_NHD", f"{at}.o_proj.weight", inputs=2)
    if attention.config.qkv_bias:
        for letter, name in (("q", "q_bias_NH"), ("k", "k_bias_KH"), ("v", "v_bias_KH")):
            yield _same(attention, name, f"{at}.{letter}_proj.bias", flat=True)
    if attention.config.output_bias:
        yield _same(attention, "o_bias_D", f"{at}.o_proj.bias")
    if attention.config.qk_norm:
        yield _same(attention.q_norm, "gain_H", f"{at}.q_norm.weight")
        yield _same(attention.k_norm, "gain_H", f"{at}.k_norm.weight")


def _latent(attention, at):
    if attention.config.query_rank is None:
        yield _linear(attention, "q_DNE", f"{at}.q_proj.weight")
    else:
        yield _linear(attention, "q_down_DQ", f"{at}.q_a_proj.weight")
        yield _same(attention.q_norm, "gain_H", f"{at}.q_a_layernorm.weight")
        yield _linear(attention, "q_up_QNE", f"{at}.q_b_proj.weight")
    yield _linear(attention, "kv_down_DC", f"{at}.kv_a_proj_with_mqa.weight")
    yield _same(attention.kv_norm, "gain_H", f"{at}.kv_a_layernorm.weight")
    yield _up(attention, f"{at}.kv_b_proj.weight")
    yield _linear(attention, "o_NVD", f"{at}.o_proj.weight", inputs=2)


def _same(module, attribute, name, flat=False):
    ours = getattr(module, attribute).shape
    theirs = (math.prod(ours),) if flat else ours
    reshape = lambda shape: lambda a: (a.reshape(shape),)
    return Weight(module, (attribute,), {name: theirs}, reshape(ours), reshape(theirs))


def _linear(module, attribute, *names, inputs=1):
    """One matrix, or several over the same input, side by side in ours; its first axes are the input's."""
    ours = getattr(module, attribute).shape
    rows = math.prod(ours[:inputs])
    columns = math.prod(ours[inputs:]) // len(names)

    def outward(a):
        return tuple(part.T for part in np.split(a.reshape(rows, -1), len(names), axis=1))

    inward = lambda *parts: (np.concatenate([part.T for part in parts], axis=1).reshape(ours),)
    return Weight(module, (attribute,), {name: (columns, rows) for name in names}, inward, outward)


def _up(attention, name):
    """Keys' and values' up-projections, which DeepSeek keeps as one, head by head."""
    R, N, H = attention.k_up_RNH.shape
    V = attention.v_up_RNV.shape[-1]

    def inward(a):
        up_RNW = a.reshape(N, H + V, R).transpose(2, 0, 1)
        return up_RNW[..., :H], up_RNW[..., H:]

    def outward(k_RNH, v_RNV):
        return (np.concatenate([k_RNH, v_RNV], axis=-1).reshape(R, -1).T,)

    return Weight(attention, ("k_up_RNH", "v_up_RNV"), {name: (N * (H + V), R)}, inward, outward)


def read_weights(decoder: Decoder, files: TensorFiles, dtype: jnp.dtype) -> None:
    """Give a decoder of shapes its parameters, one tensor at a time.

    ValueError for a tensor that is missing, has another shape, is not finite, or belongs to nothing.
    """
    todo = list(weights(decoder))
    expected = {name for weight in todo for name in weight.shapes}
    missing, extra = sorted(expected - files.names), files.names - expected
    if missing:
        raise ValueError(f"{files.where}: tensor {missing[0]!r} is missing{_more(missing)}")
    tied = decoder.config.tie_embeddings and "lm_head.weight" in extra
    extra = sorted(name for name in extra if not name.endswith(UNUSED) and not (tied and name == "lm_head.weight"))
    if extra:
        raise ValueError(f"{files.where}: tensor {extra[0]!r} belongs to nothing in the model{_more(extra)}")
    for weight in todo:
        parts = [_finite(files, name, shape) for name, shape in weight.shapes.items()]
        for attribute, value in zip(weight.attributes, weight.inward(*parts)):
            setattr(weight.module, attribute, nnx.Param(jnp.asarray(np.ascontiguousarray(value, dtype))))
        if tied and "model.embed_tokens.weight" in weight.shapes:
            head = files.read("lm_head.weight", weight.shapes["model.embed_tokens.weight"])
            if not np.array_equal(head, parts[0]):
                raise ValueError(
                    f"{files.where}: tensor 'lm_head.weight' differs from 'model.embed_tokens.weight', though "
                    "tie_word_embeddings is true"
                )


def _finite(files, name, shape):
    value = files.read(name, shape)
    if not np.isfinite(value).all():
        raise ValueError(f"{files.where}: tensor {name!r} holds values that are not finite")
    return value


def _more(names):
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def named_weights(decoder: Decoder) -> dict[str, np.ndarray]:
    """All parameters as tensors under Hugging Face's names, in their own dtype."""
    tensors = {}
    for weight in weights(decoder):
        arrays = [np.asarray(jax.device_get(getattr(weight.module, name)[...])) for name in weight.attributes]
        tensors |= zip(weight.shapes, weight.outward(*arrays))
    return tensors
