"""Keys and values through latents, by singular values of their projections or of what these make of text.

D width, N query heads, K kv heads, H head dim, R rank, F = K * H key features, E value features.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from kvjax.attention.low_rank import LowRank
from kvjax.convert.surgery import Split, Weights, replace_attention, weights_of
from kvjax.decoder import Decoder

DAMPING = 1e-6
"""Of the mean eigenvalue of E[x^T x], added to all: what the text hardly has is not lost for nothing."""


def to_low_rank(
    graphdef: nnx.GraphDef[Decoder],
    params: Any,
    config: LowRank,
    moments: Sequence[np.ndarray] | None = None,
    *,
    balance: bool = False,
) -> Split:
    """The model with keys and values from latents, joint or split, all else of `config` being the source's.

    The best factors of [W_K|W_V], or of W_K and W_V apart, by plain SVD; with `moments`, E[x^T x] of each
    layer's input (`input_moments`), the best ones for that text (SVD-LLM, arXiv 2403.07378; the joint latent,
    expanded and rotated on read, is Palu's, arXiv 2407.21118). Exact where the rank is that of the projections.
    `balance` weighs keys and values alike in a joint latent (see `factor_pair`).
    """
    if config.position != "rope":
        raise ValueError(f"attention.position={config.position!r} must be 'rope': the source's keys are rotated")
    if balance and config.rank is None:
        raise ValueError("balance=True goes with a joint latent; split ones are fitted apart")

    def make(layer: int, old: Any, new: Any) -> Weights:
        weights, root = weights_of(old), None if moments is None else root_of(moments[layer])
        k_DF, v_DE = (weights[name].reshape(len(weights[name]), -1) for name in ("k_DKH", "v_DKH"))
        kept = {name: weights[name] for name in ("q_DNH", "o_NHD")}
        if config.rank is not None:
            down, up_k, up_v = factor_pair(k_DF, v_DE, config.rank, root, balance)
            latents = {"down_DR": down}
        else:
            assert config.rank_k is not None and config.rank_v is not None
            down_k, up_k, _ = factor(k_DF, config.rank_k, root, "attention.rank_k")
            down_v, up_v, _ = factor(v_DE, config.rank_v, root, "attention.rank_v")
            latents = {"down_k_DR": down_k, "down_v_DR": down_v}
        by_head = lambda up: repeat_heads(up.reshape(len(up), -1, config.head_dim), config.num_heads)
        return kept | latents | {"up_k_RNH": by_head(up_k), "up_v_RNH": by_head(up_v)}

    return replace_attention(graphdef, params, config, make)


def factor(
    w_DF: np.ndarray, rank: int, root_DD: np.ndarray | None = None, field: str = "attention.rank"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`down` `[D, R]` and `up` `[R, F]` whose product is nearest to `w`, and all singular values.

    Nearest in |w - down up|_F, or with a root L in |L^T (w - down up)|_F, the error of the results x w of inputs
    with sum x^T x = L L^T. That is the projection of w to the top right singular vectors of L^T w, and leaves
    sum_(i > R) s_i^2 (Eckart & Young 1936). The parts of a latent feature in `down` and `up` are equally long.
    """
    most = min(w_DF.shape)
    if not 1 <= rank <= most:
        raise ValueError(f"{field}={rank} must be at least 1 and at most {most}, the rank of the projections")
    weighted = w_DF if root_DD is None else root_DD.T @ w_DF
    _, singular, turn = np.linalg.svd(weighted, full_matrices=False)
    down, up = w_DF @ turn[:rank].T, turn[:rank]
    length = np.linalg.norm(down, axis=0)
    part = np.sqrt(np.where(length > 0, length, 1.0))
    return down / part, up * part[:, None], singular


def factor_pair(
    k_DF: np.ndarray, v_DE: np.ndarray, rank: int, root_DD: np.ndarray | None, balance: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`down` `[D, R]`, `up_k` `[R, F]` and `up_v` `[R, E]` of the best joint latent.

    `balance` scales the keys to the values' norm for the fit, and back in `up_k`: else the larger, mostly the
    keys, take the latent (BKV of TransMLA, arXiv 2502.07864).
    """
    k, v = (np.linalg.norm(w if root_DD is None else root_DD.T @ w) for w in (k_DF, v_DE))
    ratio = v / k if balance and k > 1e-9 * v else 1.0  # keys that are nothing but rounding stay so
    down, up, _ = factor(np.concatenate([ratio * k_DF, v_DE], axis=1), rank, root_DD)
    up_k, up_v = np.split(up, [k_DF.shape[1]], axis=1)
    return down, up_k / ratio, up_v


def root_of(moment_DD: np.ndarray) -> np.ndarray:
    """L with L L^T = E[x^T x], damped (Cholesky)."""
    mean = np.trace(moment_DD) / len(moment_DD)
    return np.linalg.cholesky(moment_DD + DAMPING * mean * np.eye(len(moment_DD)))


def repeat_heads(up_RKH: np.ndarray, num_heads: int) -> np.ndarray:
    """Up-projections `[R, N, H]`: every kv head's for each query head that reads it."""
    return np.repeat(up_RKH, num_heads // up_RKH.shape[1], axis=1)
