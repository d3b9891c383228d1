"""Closed formulas of attention variants, in plain integers: parameters and cached elements.

They say what a shape costs without a model, for published shapes and for two variants that kvjax does not
implement (GTA and GLA, arXiv 2505.21487); the tests hold them to the arrays of those that it does.
Names as in configurations: `width` of the residual stream, `rank` of latents, features a head otherwise.
"""

from typing import NamedTuple


class Layer(NamedTuple):
    """What one layer's attention takes."""

    parameters: int
    cache_elements: int
    """That one token leaves."""


def grouped(
    width: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    output_bias: bool = False,
) -> Layer:
    """MHA (as many kv heads as heads), GQA, MQA (one); Qwen3's norms, Qwen2's and Llama's biases."""
    parameters = 2 * width * head_dim * (num_heads + num_kv_heads)
    parameters += 2 * head_dim * qk_norm + head_dim * (num_heads + 2 * num_kv_heads) * qkv_bias
    return Layer(parameters + width * output_bias, 2 * num_kv_heads * head_dim)


def low_rank(width: int, num_heads: int, head_dim: int, rank: int) -> Layer:
    """Keys and values from one latent."""
    heads = num_heads * head_dim
    return Layer(2 * width * heads + width * rank + 2 * rank * heads, rank)


def low_rank_split(width: int, num_heads: int, head_dim: int, rank_k: int, rank_v: int) -> Layer:
    """Keys from one latent, values from another."""
    heads = num_heads * head_dim
    return Layer(2 * width * heads + (width + heads) * (rank_k + rank_v), rank_k + rank_v)


def mla(
    width: int,
    num_heads: int,
    rank: int,
    rope_dim: int,
    nope_dim: int,
    value_dim: int,
    query_rank: int | None = None,
    *,
    bias: bool = False,
) -> Layer:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one normed latent and one rotary key.

    `query_rank` None is a full query projection. `bias`: on every projection into or out of a latent, which
    are all but the output's (and the full query's).
    """
    return gla(width, num_heads, 1, rank, rope_dim, nope_dim, value_dim, query_rank, bias=bias)


def gla(
    width: int,
    num_heads: int,
    num_latents: int,
    rank: int,
    rope_dim: int,
    nope_dim: int,
    value_dim: int,
    query_rank: int | None = None,
    *,
    bias: bool = False,
) -> Layer:
    """Grouped latent attention (arXiv 2505.21487): `num_latents` latents of `rank`, each of its own heads.

    One rotary key is shared by all; `mla` is one latent. `bias` as there.
    """
    if num_heads % num_latents:
        raise ValueError(f"num_heads={num_heads} must be a multiple of num_latents={num_latents}")
    queries, rebuilt = num_heads * (nope_dim + rope_dim), num_heads * (nope_dim + value_dim)
    cached = num_latents * rank + rope_dim
    parameters = width * cached + rank * rebuilt + num_heads * value_dim * width + num_latents * rank
    parameters += (cached + rebuilt) * bias
    if query_rank is None:
        return Layer(parameters + width * queries, cached)
    parameters += width * query_rank + query_rank * queries + query_rank + (query_rank + queries) * bias
    return Layer(parameters, cached)


def gta(width: int, num_heads: int, num_kv_heads: int, head_dim: int) -> Layer:
    """Grouped-tied attention (arXiv 2505.21487): values whose first half is their key's, with one rotary half."""
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
    if head_dim % 4:
        raise ValueError(f"head_dim={head_dim} must be a multiple of 4: half of it turns in pairs")
    cached = num_kv_heads * head_dim + head_dim // 2
    return Layer(2 * width * num_heads * head_dim + width * cached, cached)


def model(layer: Layer, width: int, depth: int, mlp_width: int, vocab_size: int, *, tied: bool) -> int:
    """Parameters of a decoder: embedding (twice if not tied), attention, gated MLPs, and gains of norms."""
    embeddings = (1 if tied else 2) * vocab_size * width
    return embeddings + depth * (layer.parameters + 3 * width * mlp_width + 2 * width) + width
