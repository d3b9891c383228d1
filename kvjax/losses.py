"""Cross-entropy without the logits of a whole batch.

B batch, T tokens, D width, V vocabulary, C tokens of a chunk.
"""

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 512  # tokens whose float32 logits are held at a time


def _chunks(x_BTD, targets_BT):
    """Tokens in equal chunks, the last one filled up with targets of -1, which count nothing."""
    x_ND, targets_N = x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.reshape(-1)
    chunk = min(CHUNK, targets_N.size)
    missing = -targets_N.size % chunk
    x_ND = jnp.pad(x_ND, ((0, missing), (0, 0)))
    targets_N = jnp.pad(targets_N, (0, missing), constant_values=-1)
    return x_ND.reshape(-1, chunk, x_ND.shape[-1]), targets_N.reshape(-1, chunk)


def _chunk_nats(x_CD, w_VD, targets_C):
    logits_CV = jnp.einsum("CD,VD->CV", x_CD, w_VD, preferred_element_type=jnp.float32)
    lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
    right_C = jnp.take_along_axis(logits_CV, jnp.maximum(targets_C, 0)[:, None], axis=-1)[:, 0]
    return logits_CV, lse_C, right_C, jnp.where(targets_C >= 0, lse_C - right_C, 0.0)


def token_nats(x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood `nats_BT` of every target, and whether greedy decoding would take it, `top_BT`.

    Chunk by chunk; a target of -1 counts 0 nats.
    """

    def chunk(chunk):
        logits_CV, _, right_C, nats_C = _chunk_nats(chunk[0], w_VD, chunk[1])
        # The argmax, where the first of equals wins, in a form that XLA:CPU vectorises.
        earlier_CV = jnp.arange(w_VD.shape[0])[None] < chunk[1][:, None]
        beaten_CV = (logits_CV > right_C[:, None]) | ((logits_CV == right_C[:, None]) & earlier_CV)
        return nats_C, ~beaten_CV.any(-1)

    parts = lax.map(chunk, _chunks(x_BTD, targets_BT))
    nats_BT, top_BT = (part.reshape(-1)[: targets_BT.size].reshape(targets_BT.shape) for part in parts)
    return nats_BT, top_BT


@jax.custom_vjp
def cross_entropy(x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Mean negative log-likelihood (nats) of `targets` under softmax(x W^T).

    Chunk by chunk; differentiated, each chunk's gradient is made while its logits are at hand, so
    that they are neither kept nor computed twice.
    """
    xs, targets = _chunks(x_BTD, targets_BT)
    total = lax.map(lambda chunk: _chunk_nats(chunk[0], w_VD, chunk[1])[3].sum(), (xs, targets)).sum()
    return total / targets_BT.size


def _forward(x_BTD, w_VD, targets_BT):
    def chunk(dw_VD, chunk):
        x_CD, targets_C = chunk
        logits_CV, lse_C, _, nats_C = _chunk_nats(x_CD, w_VD, targets_C)
        hit_CV = targets_C[:, None] == jnp.arange(w_VD.shape[0])[None]
        share_C1 = jnp.where(targets_C >= 0, 1.0 / targets_BT.size, 0.0)[:, None]
        dlogits_CV = (jnp.exp(logits_CV - lse_C[:, None]) - hit_CV.astype(jnp.float32)) * share_C1
        dlogits_CV = dlogits_CV.astype(x_CD.dtype)
        dx_CD = jnp.einsum("CV,VD->CD", dlogits_CV, w_VD)
        dw_VD += jnp.einsum("CV,CD->VD", dlogits_CV, x_CD, preferred_element_type=jnp.float32)
        return dw_VD, (nats_C.sum(), dx_CD)

    dw_VD, (losses, dxs) = lax.scan(chunk, jnp.zeros(w_VD.shape), _chunks(x_BTD, targets_BT))
    dx_BTD = dxs.reshape(-1, x_BTD.shape[-1])[: targets_BT.size].reshape(x_BTD.shape)
    return losses.sum() / targets_BT.size, (dx_BTD, dw_VD.astype(w_VD.dtype))


def _backward(residuals, g):
    dx_BTD, dw_VD = residuals
    return g.astype(dx_BTD.dtype) * dx_BTD, g.astype(dw_VD.dtype) * dw_VD, None


cross_entropy.defvjp(_forward, _backward)
