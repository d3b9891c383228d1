"""Weights changed such that a trained model's cache has what breaks codecs in large models: outlier channels, key
biases, sink tokens. What the model computes stays, up to what each function says; measure it before and after.

D width, E = 2 mlp_width, F mlp width, V vocabulary, N query heads, K kv heads, H head dim, J = H / 2 rotary pairs
(j, j + J), the last of which turns slowest.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.attention.grouped import Grouped
from kvjax.checks import at_least, between, positive
from kvjax.codecs.fit import causal_distances, rope_averaged
from kvjax.codecs.statistics import ArrayStatistics, Statistics
from kvjax.decoder import Decoder, decodable
from kvjax.rope import frequencies

MARK = 0.01
"""What a sink's embedding has in its own channel, in norms of that embedding: the norms hardly notice it."""


def outlier_channels(
    graphdef: nnx.GraphDef[Decoder], params: Any, factor: float = 32.0, pair: int | None = None, channel: int = 0
) -> tuple[nnx.GraphDef[Decoder], Any]:
    """Every kv head's rotary pair `pair` (None: the slowest) of keys and `channel` of values times `factor`.

    What reads them is divided by it: the function is the same, up to rounding if `factor` is no power of two.
    ValueError for other attention than grouped, or for no such pair or channel.
    """
    positive("factor", factor)
    model, config = _grouped(graphdef, params)
    H, J = config.head_dim, config.head_dim // 2
    pair = J - 1 if pair is None else pair
    between("pair", pair, 0, J)
    between("channel", channel, 0, H)
    key, value = np.s_[..., np.array([pair, pair + J])], np.s_[..., channel]
    for block in model.layers:
        attention: Any = block.attention
        if config.qk_norm:
            _scale(attention.k_norm, ("gain_H",), key, factor)
            _scale(attention.q_norm, ("gain_H",), key, 1 / factor)
        else:
            _scale(attention, ("k_DKH", "k_bias_KH"), key, factor)
            _scale(attention, ("q_DNH", "q_bias_NH"), key, 1 / factor)
        _scale(attention, ("v_DKH", "v_bias_KH"), value, factor)
        _scale(attention, ("o_NHD",), np.s_[:, channel], 1 / factor)
    return nnx.split(model)


def key_bias(
    graphdef: nnx.GraphDef[Decoder], params: Any, statistics: Statistics, size: float = 64.0, pairs: int = 1
) -> tuple[nnx.GraphDef[Decoder], Any]:
    """Adds to every kv head's keys, before the rotation, a bias as Qwen2's, in the `pairs` slowest rotary pairs.

    Its norm is `size` times the root mean square of an element of the head's keys. It moves a query's scores
    alike, which no softmax sees, but for how far the pairs turn within a context: its direction is that of the
    least variance of scores over the distances of `statistics.context`, in the mean over queries.
    ValueError for other attention than grouped, for `qk_norm`, and for statistics of other layers.
    """
    at_least("size", size, 0.0)
    model, config = _grouped(graphdef, params, norm="rescales keys, whatever their bias")
    N, K, H, J = config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim // 2
    between("pairs", pairs, 1, J + 1)
    slow = np.concatenate([np.arange(J - pairs, J), np.arange(H - pairs, H)])
    turns = frequencies(config.rope_theta, H, config.rope_scaling)
    biased = dataclasses.replace(config, qkv_bias=True)
    model.attention = biased
    for block, keys in zip(model.layers, _keys(statistics, model, config)):
        attention: Any = block.attention
        assert keys.queries is not None
        spread_KHH = score_variance(keys.queries, turns, causal_distances(statistics.context))
        directions = np.linalg.eigh(spread_KHH[:, slow[:, None], slow])[1][..., 0]
        rms_K = np.sqrt(np.trace(keys.rest.second, axis1=-2, axis2=-1) / H)
        bias_KH = np.zeros((K, H))
        bias_KH[:, slow] = size * rms_K[:, None] * directions
        dtype = attention.k_DKH[...].dtype
        if not attention.config.qkv_bias:
            attention.config = biased
            for name, shape in (("q_bias_NH", (N, H)), ("k_bias_KH", (K, H)), ("v_bias_KH", (K, H))):
                setattr(attention, name, nnx.Param(jnp.zeros(shape, dtype)))
        own_KH = np.asarray(attention.k_bias_KH[...], np.float64)
        _set(attention, "k_bias_KH", ..., own_KH + bias_KH)
    return nnx.split(model)


def score_variance(second_q: np.ndarray, turns: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """M `[..., H, H]` such that b M b^T is the variance over distances of scores against a constant key b.

    In the mean over queries of second moment `second_q`, unrotated; arguments are those of `rope_averaged`.
    """
    phases = np.exp(1j * np.outer(np.arange(len(weights)), turns.astype(np.float64)))
    mean = weights @ phases
    cos, sin = np.diag(mean.real), np.diag(mean.imag)
    turn = np.block([[cos, -sin], [sin, cos]])
    return rope_averaged(second_q, turns, weights) - turn @ second_q @ turn.T


def sink_token(
    graphdef: nnx.GraphDef[Decoder], params: Any, statistics: Statistics, token: int, size: float = 32.0
) -> tuple[nnx.GraphDef[Decoder], Any]:
    """Makes the key of `token` at position 0 an outlier: `size` times the root mean square norm of keys, as in
    `statistics`; where the token stands elsewhere, its keys are outliers of about that size.

    Two things are given up for it, and nothing else changes: the residual stream's least used channel becomes
    the token's mark, 0 for all other tokens, whose keys stay as they are; and no query reads the slowest rotary
    pair any more, where the outlier lies.
    ValueError for other attention than grouped, for `qk_norm`, and for statistics of other layers.
    """
    at_least("size", size, 1.0)
    model, config = _grouped(graphdef, params, norm="gives all keys about the same norm")
    between("token", token, 0, model.vocab_size)
    H, J = config.head_dim, config.head_dim // 2
    keys = _keys(statistics, model, config)
    c, pair = _least_used(model), np.array([J - 1, H - 1])
    _scale(model, ("embedding_VD",), np.s_[:, c], 0.0)
    _scale(model.norm, ("gain_H",), c, 0.0)
    for block in model.layers:
        _scale(block.attention, ("q_DNH", "k_DKH", "v_DKH", "o_bias_D"), c, 0.0)
        _scale(block.attention, ("o_NHD",), np.s_[..., c], 0.0)
        _scale(block.attention, ("q_DNH", "q_bias_NH"), np.s_[..., pair], 0.0)
        _scale(block.mlp, ("gate_up_DE",), c, 0.0)
        _scale(block.mlp, ("down_FD",), np.s_[:, c], 0.0)
        _set(block.attention_norm, "gain_H", c, 1.0)
    mark = MARK * np.linalg.norm(np.asarray(model.embedding_VD[token], np.float64))
    _set(model, "embedding_VD", (token, c), mark)
    found = jax.device_get(_alone(*nnx.split(model), token, c))
    for block, array, (seen, key_KH) in zip(model.layers, keys, found):
        norm_K = size * np.sqrt(np.trace(array.rest.second, axis1=-2, axis2=-1))
        key_KH = key_KH.astype(np.float64)
        others_K = (key_KH**2).sum(-1) - key_KH[:, J - 1] ** 2
        if not (norm_K**2 > others_K).all():
            least = size * float(np.sqrt(others_K / norm_K**2).max())
            raise ValueError(f"size={size} must be above {least:.3g}: this token's keys are as large already")
        row_K = (np.sqrt(norm_K**2 - others_K) - key_KH[:, J - 1]) / float(seen)
        _set(block.attention, "k_DKH", np.s_[c, :, J - 1], row_K)
    return nnx.split(model)


@functools.partial(jax.jit, static_argnums=0)
def _alone(graphdef, params, token, c):
    """Of every layer, for a text of one token: channel `c` as attention reads it, and the keys `KH`."""
    model = nnx.merge(graphdef, params)
    x_BTD, positions_BT = model.embedding_VD[...][token][None, None], jnp.zeros((1, 1), jnp.int32)
    found = []
    for block in model.layers:
        normed_BTD = block.attention_norm(x_BTD)
        arrays, _ = block.attention.observe(normed_BTD, positions_BT)
        found.append((normed_BTD[0, 0, c], arrays["k_before_rope"][0, :, 0]))
        x_BTD, _ = block(x_BTD, positions_BT)
    return found


def _least_used(model: Decoder) -> int:
    """The channel of the residual stream with the least product of what is written to it and read from it."""
    energy = lambda weight, axes: (np.asarray(weight[...], np.float64) ** 2).sum(axes)
    written_D = energy(model.embedding_VD, 0) / model.vocab_size
    read_D = np.zeros_like(written_D)
    for block in model.layers:
        attention: Any = block.attention
        written_D += energy(attention.o_NHD, (0, 1)) + energy(block.mlp.down_FD, 0)
        weights = (attention.q_DNH, attention.k_DKH, attention.v_DKH)
        read_D += energy(block.attention_norm.gain_H, ()) * sum(energy(weight, (1, 2)) for weight in weights)
        read_D += energy(block.mlp_norm.gain_H, ()) * energy(block.mlp.gate_up_DE, 1)
    return int((written_D * read_D).argmin())


def _scale(module: Any, names: tuple[str, ...], index: Any, factor: float) -> None:
    """Multiplies a part of those parameters that the module has."""
    for name in (name for name in names if hasattr(module, name)):
        _set(module, name, index, np.asarray(getattr(module, name)[...])[index] * factor)


def _set(module: Any, name: str, index: Any, value: Any) -> None:
    """A new parameter in place of one that differs in a part."""
    whole = np.array(getattr(module, name)[...])
    whole[index] = value
    setattr(module, name, nnx.Param(jnp.asarray(whole)))


def _grouped(graphdef, params, norm: str | None = None) -> tuple[Decoder, Grouped]:
    """A model whose parameters are to be replaced, as they are shared with `params`; `norm`: why not `qk_norm`."""
    model = nnx.merge(*decodable(graphdef, params))
    config = model.attention
    if not isinstance(config, Grouped):
        raise ValueError(f"attention={type(config).__name__} must be Grouped, which caches keys and values")
    if config.qk_norm and norm is not None:
        raise ValueError(f"attention.qk_norm=True must be False: it {norm}")
    return model, config


def _keys(statistics: Statistics, model: Decoder, config: Grouped) -> list[ArrayStatistics]:
    """Those of every layer's keys before the rotation."""
    K, H = config.num_kv_heads, config.head_dim
    arrays = [layer["k_before_rope"] for layer in statistics.layers if "k_before_rope" in layer]
    if [array.rest.total.shape for array in arrays] != [(K, H)] * len(model.layers):
        raise ValueError(f"statistics must have keys before RoPE of {len(model.layers)} layers, {K} heads of {H}")
    return arrays
