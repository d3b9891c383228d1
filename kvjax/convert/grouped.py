"""Fewer key and value heads, or more.

D width, N query heads, K kv heads, G = N // K, H head dim, J kv heads wanted, P = K // J heads that become one.
"""

from typing import Any

import numpy as np
from flax import nnx

from kvjax.attention.grouped import Grouped
from kvjax.convert.surgery import Split, Weights, replace_attention, weights_of
from kvjax.decoder import Decoder

POOLING = ("mean", "first", "random")
KV_NAMES = ("k_DKH", "v_DKH", "k_bias_KH", "v_bias_KH")


def to_grouped(
    graphdef: nnx.GraphDef[Decoder],
    params: Any,
    config: Grouped,
    method: str,
    *,
    similar: bool = False,
    seed: int = 0,
) -> Split:
    """The model with `config.num_kv_heads` kv heads, all else of `config` being the source's.

    To fewer: the "mean" of P neighbouring heads' projections, the "first" of them, or a "random" one, drawn by
    `seed` for every group of every layer (the three of Ainslie et al. 2023, arXiv 2305.13245, figure 4). Exact
    where the heads of a group are equal. `similar` first brings heads of similar weights together, queries and
    output going along, which by itself changes nothing. To more: "repeat", which is exact.
    ValueError for numbers of heads of which neither is a multiple of the other, and for another method.
    """
    J = config.num_kv_heads

    def make(layer: int, old: Any, new: Any) -> Weights:
        K, weights = old.config.num_kv_heads, weights_of(old)
        _require_method(method, K, J, similar)
        if method == "repeat":
            return weights | {n: np.repeat(weights[n], J // K, axis=-2) for n in KV_NAMES if n in weights}
        if similar:
            weights = _reordered(weights, _by_similarity(weights, K // J))
        chosen_J = np.zeros(J, int)
        if method == "random":
            chosen_J = np.random.default_rng((seed, layer)).integers(K // J, size=J)

        def pool(a):
            parts = a.reshape(*a.shape[:-2], J, K // J, a.shape[-1])
            return parts.mean(-2) if method == "mean" else parts[..., np.arange(J), chosen_J, :]

        return weights | {name: pool(weights[name]) for name in KV_NAMES if name in weights}

    return replace_attention(graphdef, params, config, make)


def _require_method(method: str, K: int, J: int, similar: bool) -> None:
    if K % J and J % K:
        near = min((j for j in range(1, K + 1) if K % j == 0), key=lambda j: abs(j - J))
        raise ValueError(
            f"attention.num_kv_heads={J} must divide the source's {K}, or be a multiple of it: {near}"
        )
    methods = POOLING if K >= J else ("repeat",)
    if method not in methods:
        raise ValueError(f"method={method!r} must be one of {', '.join(methods)} to make {J} of {K} kv heads")
    if similar and method == "repeat":
        raise ValueError("similar=True goes with fewer kv heads, not with repeated ones")


def _by_similarity(weights: Weights, size: int) -> list[int]:
    """An order of kv heads in groups of `size`: the first that is left, then those most like it.

    Likeness is the cosine between the projections of keys, plus that of values.
    """
    likeness = np.zeros((weights["k_DKH"].shape[1],) * 2)
    for a_DKH in (weights["k_DKH"], weights["v_DKH"]):
        rows = np.swapaxes(a_DKH, 0, 1).reshape(a_DKH.shape[1], -1)
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
        likeness += rows @ rows.T
    left, order = list(range(len(likeness))), []
    while left:
        group = sorted(left, key=lambda j: (j != left[0], -likeness[left[0], j]))[:size]
        order += group
        left = [j for j in left if j not in group]
    return order


def _reordered(weights: Weights, order: list[int]) -> Weights:
    """The same layer with its kv heads in another order, the query heads that read them going along."""
    K = len(order)

    def reorder(name, a):
        if name not in (*KV_NAMES, "q_DNH", "q_bias_NH", "o_NHD"):
            return a
        axis = 0 if name == "o_NHD" else a.ndim - 2
        parts = a.reshape(*a.shape[:axis], K, -1, *a.shape[axis + 1 :])
        return parts.take(order, axis).reshape(a.shape)

    return {name: reorder(name, a) for name, a in weights.items()}
