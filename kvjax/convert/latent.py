"""Grouped attention as multi-head latent attention.

D width, N query heads, K kv heads, H head dim, J = H / 2 rotary pairs of a head, P rotary dim of the shared key,
A its blocks, M = P / 2A its frequencies, R latent rank, n source pairs of a frequency. Pairs are complex numbers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from kvjax.attention.latent import Latent
from kvjax.convert.low_rank import factor_pair, repeat_heads, root_of
from kvjax.convert.surgery import Split, Weights, replace_attention, weights_of
from kvjax.decoder import Decoder
from kvjax.rope import frequencies


def to_latent(
    graphdef: nnx.GraphDef[Decoder],
    params: Any,
    config: Latent,
    moments: Sequence[np.ndarray] | None = None,
    *,
    balance: bool = False,
) -> Split:
    """The model with a latent and one rotary key for all heads, as TransMLA makes them (arXiv 2502.07864).

    Its RoRoPE and FreqFold: keys of all heads that turn at the same frequency may be mixed before the rotation,
    queries going along; each source pair counts to the nearest frequency of the shared key, which takes the
    principal component of that frequency (one for each of `rope_blocks`). What is left of the keys loses its
    rotation, and goes with the values through the latent, by SVD as in `to_low_rank`: plain, or with `moments`
    of the inputs for text. Components here are complex, TransMLA's real. What is not the cache's is the
    source's; the softmax scale goes into the queries.

    Exact for MQA with a whole rotary key, and for GQA with `rope_blocks=K`, `rope_dim=K * H`, which saves nothing,
    if the rank is the values' (all frequencies, of every head, keep their rotation); and where nothing turns.
    With `latent_norm` also the root mean square of latents is taken for constant, as found on average.
    """
    if config.query_rank is not None:
        raise ValueError(f"attention.query_rank={config.query_rank} must be None: the source's queries have none")
    scaling = config.rope_scaling
    stretch = 1.0 if scaling is None or scaling.magnitude is None else scaling.magnitude**2

    def make(layer: int, old: Any, new: Any) -> Weights:
        weights, H = weights_of(old), old.config.head_dim
        D, N = weights["q_DNH"].shape[:2]
        root = None if moments is None else root_of(moments[layer])
        k_rope, q_rope, k_rest = _shared_rotation(weights["q_DNH"], weights["k_DKH"], config, root)
        v_DE = weights["v_DKH"].reshape(D, -1)
        down, up_k, up_v = factor_pair(k_rest.reshape(D, -1), v_DE, config.rank, root, balance)
        by_head = lambda up: repeat_heads(up.reshape(len(up), -1, H), N)
        q_DNE = np.concatenate([weights["q_DNH"] * stretch, q_rope], axis=-1) * (old.scale / new.scale)
        made = {"q_DNE": q_DNE, "kv_down_DC": np.concatenate([down, k_rope], axis=1)}
        made |= {"k_up_RNH": by_head(up_k), "v_up_RNV": by_head(up_v), "o_NVD": weights["o_NHD"]}
        if config.latent_norm:
            energy = down if root is None else root.T @ down  # inputs taken for white without a text
            made["kv_norm.gain_H"] = np.full(config.rank, np.linalg.norm(energy) / np.sqrt(config.rank))
        return made

    return replace_attention(graphdef, params, config, make)


def _shared_rotation(q_DNH, k_DKH, config: Latent, root_DD):
    """The shared rotary key `[D, P]`, each head's query of it `[D, N, P]`, and what is left of keys `[D, K, H]`.

    With complex k and q of the pairs of one frequency, and v a unit vector over them, the logit Re(k^* q) is
    Re((k v)^* (q v)) and the rest; a rotation multiplies k and q by phases, and so commutes with v.
    """
    (D, N, H), K = q_DNH.shape, k_DKH.shape[1]
    paired = lambda a: a[..., : H // 2] + 1j * a[..., H // 2 :]
    q_DNJ, k_DKJ = paired(q_DNH), paired(k_DKH)
    A, theta, scaling = config.rope_blocks, config.rope_theta, config.rope_scaling
    log_turns = lambda features: np.log(frequencies(theta, features, scaling).astype(np.float64))
    ours, theirs = log_turns(config.rope_dim // A), log_turns(H)
    nearest_J = np.abs(theirs[:, None] - ours).argmin(1)
    k_rope_DAM = np.zeros((D, A, len(ours)), complex)
    q_rope_DNAM = np.zeros((D, N, A, len(ours)), complex)
    for m in np.unique(nearest_J):
        pairs = np.flatnonzero(nearest_J == m)
        part = k_DKJ[:, :, pairs].reshape(D, -1)
        turn = np.linalg.svd(part if root_DD is None else root_DD.T @ part, full_matrices=False)[2][:A]
        shared = part @ turn.conj().T
        k_rope_DAM[:, : len(turn), m] = shared
        k_DKJ[:, :, pairs] -= (shared @ turn).reshape(D, K, -1)
        turn_ANn = repeat_heads(turn.conj().reshape(len(turn), K, -1), N)
        q_rope_DNAM[:, :, : len(turn), m] = np.einsum("DNn,ANn->DNA", q_DNJ[:, :, pairs], turn_ANn)
    laid = lambda a: _laid_out(a, config.rope_interleaved)
    return laid(k_rope_DAM), laid(q_rope_DNAM), np.concatenate([k_DKJ.real, k_DKJ.imag], axis=-1)


def _laid_out(pairs, interleaved: bool) -> np.ndarray:
    """Features `[..., P]` of complex `[..., A, M]`."""
    axis = -1 if interleaved else -2
    return np.stack([pairs.real, pairs.imag], axis).reshape(*pairs.shape[:-2], -1)
