"""Softmax attention over explicit heads: the fused reading of long sequences.

B batch, N query heads, K kv heads, G query heads a kv head, T queries, S slots, H key dim, V value dim,
M any features, X = B * K rows, Q = G * (queries of a block), E slots a block sees.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -1e30
BLOCK = 64  # queries a block: its scores stay in a core's L2 cache
MAX_BLOCKS = 8  # blocks are unrolled; longer sequences get larger ones


class Band(NamedTuple):
    """What a query at position t sees: positions s <= t with t - s < window, and s < num_sinks."""

    window: int | None = None
    num_sinks: int = 0

    def sees(self, t: jax.Array, s: jax.Array) -> jax.Array:
        """The mask, by broadcasting; a slot at position -1 is empty."""
        seen = (s >= 0) & (s <= t)
        if self.window is None:
            return seen
        return seen & ((t - s < self.window) | (s < self.num_sinks))

    def num_seen(self, t: int) -> int:
        """Positions that a query at position t sees."""
        if self.window is None or t < self.window:
            return t + 1
        return self.window + min(self.num_sinks, t + 1 - self.window)


CAUSAL = Band()


def causal_attention(
    q_BKGTH: jax.Array, k_BKTH: jax.Array, v_BKTV: jax.Array, scale: float, band: Band = CAUSAL
) -> jax.Array:
    """Causal softmax(scale q k^T) v of whole sequences from position 0 on, as heads `o_BKGTV`.

    Blocks of queries read the growing prefix of the keys, and the backward pass recomputes the
    probabilities from each query's log-sum-exp (FlashAttention, Dao et al. 2022), so nothing of
    T x T size is kept. The G query heads of a kv head are rows of one product: K and V are never
    repeated. CPU walks one (batch, kv head) at a time, in cache; other devices take all at once.
    """
    B, K, G, T, H = q_BKGTH.shape
    rows = (a.reshape(B * K, *a.shape[2:]) for a in (q_BKGTH, k_BKTH, v_BKTV))
    return _causal(*rows, scale, band).reshape(B, K, G, T, v_BKTV.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _causal(q_XGTH, k_XTH, v_XTV, scale, band):
    return _causal_forward(q_XGTH, k_XTH, v_XTV, scale, band)[0]


def _causal_forward(q_XGTH, k_XTH, v_XTV, scale, band):
    o_XGTV, lse_XGT = _over_rows(functools.partial(_row_forward, scale=scale, band=band), q_XGTH, k_XTH, v_XTV)
    return o_XGTV, (q_XGTH, k_XTH, v_XTV, o_XGTV, lse_XGT)


def _causal_backward(scale, band, residuals, do_XGTV):
    return _over_rows(functools.partial(_row_backward, scale=scale, band=band), *residuals, do_XGTV)


_causal.defvjp(_causal_forward, _causal_backward)


def scores(q_BNTM: jax.Array, memory: jax.Array) -> jax.Array:
    """Inner products `BNTS` with a memory `BKSM` (query head n reads kv head n // G), or with one `BSM`."""
    if memory.ndim == 3:
        # The memory stands left: on the right XLA:CPU transposes a copy of it, at every token.
        return jnp.moveaxis(jnp.einsum("BSM,BNTM->BSNT", memory, q_BNTM), 1, -1)
    B, N, T, M = q_BNTM.shape
    q_BKGTM = q_BNTM.reshape(B, memory.shape[1], -1, T, M)
    if T == 1:
        logits_BKGTS = lax.platform_dependent(q_BKGTM, memory, cpu=_scores_by_query, default=_scores)
    else:
        logits_BKGTS = _scores(q_BKGTM, memory)
    return logits_BKGTS.reshape(B, N, T, -1)


def _scores(q_BKGTM, k_BKSM):
    return jnp.einsum("BKGTM,BKSM->BKGTS", q_BKGTM, k_BKSM)


def _scores_by_query(q_BKGTM, k_BKSM):
    """One matrix-vector product a query head: XLA:CPU's product with a few rows takes twice as long."""
    G = q_BKGTM.shape[2]
    logits = [jnp.einsum("BKM,BKSM->BKS", q_BKGTM[:, :, g, 0], k_BKSM) for g in range(G)]
    return jnp.stack(logits, axis=2)[:, :, :, None]


def weighted(probs_BNTS: jax.Array, memory: jax.Array) -> jax.Array:
    """Weighted sums `BNTM` of a memory `BKSM`, its heads read as in `scores`, or `BSM`."""
    if memory.ndim == 3:
        return jnp.einsum("BNTS,BSM->BNTM", probs_BNTS, memory)
    B, N, T, S = probs_BNTS.shape
    probs_BKGTS = probs_BNTS.reshape(B, memory.shape[1], -1, T, S)
    return jnp.einsum("BKGTS,BKSM->BKGTM", probs_BKGTS, memory).reshape(B, N, T, -1)


def _over_rows(f, *rows):
    mapped = lambda *rows: lax.map(lambda row: f(*row), rows)
    return lax.platform_dependent(*rows, cpu=mapped, default=jax.vmap(f))


def _blocks(num_queries: int) -> list[tuple[int, int]]:
    size = max(BLOCK, -(-num_queries // MAX_BLOCKS))
    return [(start, min(start + size, num_queries)) for start in range(0, num_queries, size)]


def _block_logits(q_GTH, k_TH, start, stop, scale, band):
    q_QH = q_GTH[:, start:stop].reshape(-1, q_GTH.shape[-1])
    logits_QE = jnp.einsum("QH,EH->QE", q_QH, k_TH[:stop], preferred_element_type=jnp.float32) * scale
    seen_CE = band.sees((start + jnp.arange(stop - start))[:, None], jnp.arange(stop)[None])
    return jnp.where(seen_CE[None], logits_QE.reshape(-1, stop - start, stop), MASKED)


def _row_forward(q_GTH, k_TH, v_TV, scale, band):
    outs, lses = [], []
    for start, stop in _blocks(q_GTH.shape[1]):
        logits_GCE = _block_logits(q_GTH, k_TH, start, stop, scale, band)
        top_GC1 = logits_GCE.max(-1, keepdims=True)
        weights_GCE = jnp.exp(logits_GCE - top_GC1)
        total_GC1 = weights_GCE.sum(-1, keepdims=True)
        weights_QE = weights_GCE.reshape(-1, stop).astype(v_TV.dtype)
        o_QV = jnp.einsum("QE,EV->QV", weights_QE, v_TV[:stop], preferred_element_type=jnp.float32)
        outs.append((o_QV.reshape(-1, stop - start, v_TV.shape[-1]) / total_GC1).astype(v_TV.dtype))
        lses.append((top_GC1 + jnp.log(total_GC1))[..., 0])
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)


def _row_backward(q_GTH, k_TH, v_TV, o_GTV, lse_GT, do_GTV, scale, band):
    dtype, f32 = q_GTH.dtype, jnp.float32
    delta_GT = (o_GTV.astype(f32) * do_GTV.astype(f32)).sum(-1)
    dk_TH, dv_TV = jnp.zeros(k_TH.shape, f32), jnp.zeros(v_TV.shape, f32)
    dqs = []
    for start, stop in _blocks(q_GTH.shape[1]):
        logits_GCE = _block_logits(q_GTH, k_TH, start, stop, scale, band)
        probs_GCE = jnp.exp(logits_GCE - lse_GT[:, start:stop, None])
        do_QV = do_GTV[:, start:stop].reshape(-1, do_GTV.shape[-1])
        dprobs_QE = jnp.einsum("QV,EV->QE", do_QV, v_TV[:stop], preferred_element_type=f32)
        dlogits_GCE = probs_GCE * (dprobs_QE.reshape(probs_GCE.shape) - delta_GT[:, start:stop, None])
        dlogits_QE = (dlogits_GCE * scale).reshape(-1, stop).astype(dtype)
        probs_QE = probs_GCE.reshape(-1, stop).astype(dtype)
        q_QH = q_GTH[:, start:stop].reshape(-1, q_GTH.shape[-1])
        dq_QH = jnp.einsum("QE,EH->QH", dlogits_QE, k_TH[:stop], preferred_element_type=f32)
        dqs.append(dq_QH.reshape(-1, stop - start, q_GTH.shape[-1]).astype(dtype))
        dk_TH = dk_TH.at[:stop].add(jnp.einsum("QE,QH->EH", dlogits_QE, q_QH, preferred_element_type=f32))
        dv_TV = dv_TV.at[:stop].add(jnp.einsum("QE,QV->EV", probs_QE, do_QV, preferred_element_type=f32))
    return jnp.concatenate(dqs, axis=1), dk_TH.astype(dtype), dv_TV.astype(v_TV.dtype)
