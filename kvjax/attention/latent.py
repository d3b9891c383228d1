"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; V3 is the same).

B batch, T query tokens, S memory slots, D width, N heads, H no-position dim, P rotary dim,
E = H + P, V value dim, R latent rank, Q query rank, C = R + P.
"""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from kvjax.attention.base import Attention, AttentionConfig
from kvjax.checks import at_least, even, positive
from kvjax.layers import RMSNorm, from_heads, normal, project, subkey, to_heads


@dataclass(frozen=True)
class Latent(AttentionConfig):
    """A token leaves one normed latent and one rotary key that all heads share; heads do not appear."""

    rank: int = 64
    """Latent of keys and values (`kv_lora_rank`)."""
    rope_dim: int = 16
    """Features of the shared rotary key (`qk_rope_head_dim`)."""
    nope_dim: int = 24
    """Features of a head's key without position (`qk_nope_head_dim`)."""
    value_dim: int = 24
    """Features of a head's value (`v_head_dim`)."""
    query_rank: int | None = None
    """Latent of the queries (`q_lora_rank`), None for a full projection."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_interleaved: bool = False
    """Rotate pairs (2j, 2j + 1), as DeepSeek's weights are laid out."""
    logit_scale: float | None = field(default=None, kw_only=True)
    """What logits are multiplied by before the softmax; None for (nope_dim + rope_dim)^-0.5."""
    latent_norm: bool = field(default=True, kw_only=True)
    """RMSNorm on the latent; without it keys and values are linear in a layer's input, as in other variants."""
    rope_blocks: int = field(default=1, kw_only=True)
    """Equal parts of the rotary key that turn alike, each with the frequencies of its own width."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("rank", "nope_dim", "value_dim"):
            at_least(name, getattr(self, name), 1)
        at_least("rope_dim", self.rope_dim, 2)
        even("rope_dim", self.rope_dim)
        if self.query_rank is not None:
            at_least("query_rank", self.query_rank, 1)
        at_least("rope_theta", self.rope_theta, 1.0)
        if self.logit_scale is not None:
            positive("logit_scale", self.logit_scale)
        at_least("rope_blocks", self.rope_blocks, 1)
        step, below = 2 * self.rope_blocks, self.rope_dim - self.rope_dim % (2 * self.rope_blocks)
        if below != self.rope_dim:
            nearest = " and ".join(str(dim) for dim in (below, below + step) if dim)
            raise ValueError(f"rope_dim={self.rope_dim} must be a multiple of 2 * rope_blocks={step}: {nearest}")

    def build(self, width: int, output_scale: float, key: jax.Array) -> "LatentAttention":
        """The module for a decoder of this width."""
        return LatentAttention(self, width, output_scale, key)

    def elements_per_token(self) -> int:
        """The latent and the rotary key."""
        return self.rank + self.rope_dim

    def flops_per_slot(self) -> int:
        """Scores over E features and a mix of V, every head."""
        return 2 * self.num_heads * (self.nope_dim + self.rope_dim + self.value_dim)


class LatentAttention(Attention):
    """Caches `latent_BSR` (normed) and `k_rope_BSP` (rotated): expanded for long T, absorbed for short."""

    values = "latent"

    def __init__(self, config: Latent, width: int, output_scale: float, key: jax.Array):
        D, N, R, P = width, config.num_heads, config.rank, config.rope_dim
        H, V, Q = config.nope_dim, config.value_dim, config.query_rank
        self.config = config
        self.scale = config.logit_scale or (H + P) ** -0.5
        if Q is None:
            self.q_DNE = normal(subkey(key, "q"), (D, N, H + P), D)
        else:
            self.q_down_DQ = normal(subkey(key, "qd"), (D, Q), D)
            self.q_norm = RMSNorm(Q)
            self.q_up_QNE = normal(subkey(key, "qu"), (Q, N, H + P), Q)
        self.kv_down_DC = normal(subkey(key, "down"), (D, R + P), D)
        if config.latent_norm:
            self.kv_norm = RMSNorm(R)
        self.k_up_RNH = normal(subkey(key, "uk"), (R, N, H), R)
        self.v_up_RNV = normal(subkey(key, "uv"), (R, N, V), R)
        self.o_NVD = normal(subkey(key, "o"), (N, V, D), N * V, output_scale)
        # Per slot and head, absorption reads 2R features a query instead of H + V; expansion costs R (H + V).
        saved = 2 * R - H - V
        self.expand_from = math.ceil(R * (H + V) / saved) if saved > 0 else 2**30

    def project(self, x_BTD, positions_BT):
        """Queries `(q_BNTH, q_rope_BNTP)` and the entry `latent_BTR, k_rope_BTP`."""
        if self.config.query_rank is None:
            q_BNTE = to_heads(x_BTD, self.q_DNE[...])
        else:
            q_BTQ = self.q_norm(project(x_BTD, self.q_down_DQ[...]))
            q_BNTE = to_heads(q_BTQ, self.q_up_QNE[...])
        q_BNTH, q_rope_BNTP = jnp.split(q_BNTE, [self.config.nope_dim], axis=-1)
        c_BTC = project(x_BTD, self.kv_down_DC[...])
        latent_BTR, k_rope_BTP = jnp.split(c_BTC, [self.config.rank], axis=-1)
        turn = lambda x: self.rotate(x, positions_BT, self.config.rope_interleaved)
        latent_BTR = self.kv_norm(latent_BTR) if self.config.latent_norm else latent_BTR
        return (q_BNTH, turn(q_rope_BNTP)), {"latent": latent_BTR, "k_rope": turn(k_rope_BTP)}

    def rotate(self, x, positions_BT, interleaved=False):
        """Every block of rotary features by itself."""
        blocks = self.config.rope_blocks
        if blocks == 1:
            return super().rotate(x, positions_BT, interleaved)
        parts = jnp.swapaxes(x.reshape(*x.shape[:-1], blocks, -1), -2, -3)
        return jnp.swapaxes(super().rotate(parts, positions_BT, interleaved), -2, -3).reshape(x.shape)

    def expand(self, queries, memory, positions_BS):
        """Keys `[no-position | rotary]` and values of every head."""
        q_BNTE = jnp.concatenate(queries, axis=-1)
        k_BNSH = jnp.einsum("BSR,RNH->BNSH", memory["latent"], self.k_up_RNH[...])
        v_BNSV = jnp.einsum("BSR,RNV->BNSV", memory["latent"], self.v_up_RNV[...])
        B, N, S, _ = k_BNSH.shape
        k_rope_BNSP = jnp.broadcast_to(memory["k_rope"][:, None], (B, N, S, self.config.rope_dim))
        return q_BNTE[:, :, None], jnp.concatenate([k_BNSH, k_rope_BNSP], axis=-1), v_BNSV

    def merge(self, heads_BNTV):
        """Every head through its part of the output projection."""
        return from_heads(heads_BNTV, self.o_NVD[...])

    @property
    def inside(self):
        """Both."""
        return frozenset({"latent", "k_rope"})

    def absorb(self, queries):
        """Queries through the keys' up-projection: from here the latent is the key."""
        q_BNTH, q_rope_BNTP = queries
        return {"latent": jnp.einsum("BNTH,RNH->BNTR", q_BNTH, self.k_up_RNH[...]), "k_rope": q_rope_BNTP}

    def output(self, mixed_BNTM):
        """Heads from weighted latents, then merged."""
        return self.merge(jnp.einsum("BNTR,RNV->BNTV", mixed_BNTM, self.v_up_RNV[...]))

    def value_weights(self):
        """The values' up-projection, then the output projection."""
        return jnp.einsum("RNV,NVD->NRD", self.v_up_RNV[...], self.o_NVD[...])
