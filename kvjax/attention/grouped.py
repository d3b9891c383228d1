"""MHA, MQA and GQA: one module, `num_kv_heads` from `num_heads` down to 1.

B batch, T query tokens, S memory slots, D width, N query heads, K kv heads, G = N // K, H head dim.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.attention.base import Attention, AttentionConfig
from kvjax.attention.heads import scores
from kvjax.checks import at_least, even, multiple, positive
from kvjax.layers import RMS_EPS, RMSNorm, from_heads, normal, project, subkey, to_heads


@dataclass(frozen=True)
class Grouped(AttentionConfig):
    """Multi-head (Vaswani 2017), multi-query (Shazeer 2019) and grouped-query (Ainslie 2023) attention."""

    num_kv_heads: int = 8
    """Heads of the cache; query head i reads kv head i // (num_heads / num_kv_heads)."""
    head_dim: int = 24
    """Features of a head; even, as rotary positions turn pairs."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    qk_norm: bool = False
    """RMSNorm over each head's query and key, before the rotation (as Qwen3)."""
    qkv_bias: bool = False
    """Bias on query, key and value projections (as Qwen2)."""
    output_bias: bool = field(default=False, kw_only=True)
    """Bias on the output projection (as Llama's `attention_bias`, beside the three of `qkv_bias`)."""
    norm_eps: float = field(default=RMS_EPS, kw_only=True)
    """What `qk_norm` adds to mean squares."""
    rope_on_read: bool = field(default=False, kw_only=True)
    """Keys are cached as they are before the rotation, and rotated whenever they are read."""

    def __post_init__(self):
        super().__post_init__()
        at_least("num_kv_heads", self.num_kv_heads, 1)
        multiple("num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)
        at_least("head_dim", self.head_dim, 2)
        even("head_dim", self.head_dim)
        at_least("rope_theta", self.rope_theta, 1.0)
        positive("norm_eps", self.norm_eps)

    def build(self, width: int, output_scale: float, key: jax.Array) -> "GroupedAttention":
        """The module for a decoder of this width."""
        return GroupedAttention(self, width, output_scale, key)

    def elements_per_token(self) -> int:
        """Keys and values of every kv head."""
        return 2 * self.num_kv_heads * self.head_dim

    def flops_per_slot(self) -> int:
        """Scores and mix of every query head; sharing kv heads saves bytes, not these."""
        return 2 * self.num_heads * 2 * self.head_dim


class GroupedAttention(Attention):
    """Caches keys, rotated unless `rope_on_read`, and values `BKSH`; both are read in place, never repeated."""

    values = "v"

    def __init__(self, config: Grouped, width: int, output_scale: float, key: jax.Array):
        D, N, K, H = width, config.num_heads, config.num_kv_heads, config.head_dim
        self.config = config
        self.scale = H**-0.5
        self.q_DNH = normal(subkey(key, "q"), (D, N, H), D)
        self.k_DKH = normal(subkey(key, "k"), (D, K, H), D)
        self.v_DKH = normal(subkey(key, "v"), (D, K, H), D)
        self.o_NHD = normal(subkey(key, "o"), (N, H, D), N * H, output_scale)
        if config.qkv_bias:
            self.q_bias_NH = nnx.Param(jnp.zeros((N, H)))
            self.k_bias_KH = nnx.Param(jnp.zeros((K, H)))
            self.v_bias_KH = nnx.Param(jnp.zeros((K, H)))
        if config.qk_norm:
            self.q_norm = RMSNorm(H, config.norm_eps)
            self.k_norm = RMSNorm(H, config.norm_eps)
        if config.output_bias:
            self.o_bias_D = nnx.Param(jnp.zeros(D))

    def project(self, x_BTD, positions_BT):
        """Queries `BKGTH` and the entry `k_BKTH, v_BKTH`."""
        q_BNTH, k_BKTH, v_BKTH = self._unrotated(x_BTD)
        q_BNTH = self.rotate(q_BNTH, positions_BT)
        if not self.config.rope_on_read:
            k_BKTH = self.rotate(k_BKTH, positions_BT)
        B, N, T, H = q_BNTH.shape
        K = self.config.num_kv_heads
        return q_BNTH.reshape(B, K, N // K, T, H), {"k": k_BKTH, "v": v_BKTH}

    def _unrotated(self, x_BTD):
        q_BNTH, k_BKTH, v_BKTH = self._heads(x_BTD)
        if self.config.qkv_bias:
            q_BNTH += self.q_bias_NH[...][None, :, None]
            k_BKTH += self.k_bias_KH[...][None, :, None]
            v_BKTH += self.v_bias_KH[...][None, :, None]
        if self.config.qk_norm:
            q_BNTH, k_BKTH = self.q_norm(q_BNTH), self.k_norm(k_BKTH)
        return q_BNTH, k_BKTH, v_BKTH

    def observe(self, x_BTD, positions_BT):
        """Besides the entry, keys and queries before the rotation."""
        q_BNTH, k_BKTH, v_BKTH = self._unrotated(x_BTD)
        q, k = (self.rotate(a, positions_BT) for a in (q_BNTH, k_BKTH))
        return {"k": k, "k_before_rope": k_BKTH, "v": v_BKTH}, {"k": q, "k_before_rope": q_BNTH}

    def _heads(self, x_BTD):
        if hasattr(self, "q_DNH"):
            return [to_heads(x_BTD, w[...]) for w in (self.q_DNH, self.k_DKH, self.v_DKH)]
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        qkv_DF = self.qkv_FD[...].T if hasattr(self, "qkv_FD") else self.qkv_DF[...]
        parts = jnp.split(project(x_BTD, qkv_DF), [N * H, (N + K) * H], axis=-1)
        return [jnp.swapaxes(a.reshape(*a.shape[:2], -1, H), 1, 2) for a in parts]

    def fuse(self, turn):
        """Query, key and value weights as one."""
        if not hasattr(self, "q_DNH"):
            return
        weights = (self.q_DNH, self.k_DKH, self.v_DKH)
        qkv_DF = jnp.concatenate([w[...].reshape(w.shape[0], -1) for w in weights], axis=1)
        if turn:
            self.qkv_FD = nnx.Param(qkv_DF.T)
        else:
            self.qkv_DF = nnx.Param(qkv_DF)
        del self.q_DNH, self.k_DKH, self.v_DKH

    @property
    def inside(self):
        """Values, and keys that need no rotation."""
        return frozenset({"v"} if self.config.rope_on_read else {"k", "v"})

    def _keys(self, memory, positions_BS):
        return self.rotate(memory["k"], positions_BS) if self.config.rope_on_read else memory["k"]

    def expand(self, queries, memory, positions_BS):
        """The cache as it is, but for a rotation on read."""
        return queries, self._keys(memory, positions_BS), memory["v"]

    def merge(self, heads_BNTV):
        """Every head through its part of the output projection."""
        y_BTD = from_heads(heads_BNTV, self.o_NHD[...])
        return y_BTD + self.o_bias_D[...][None, None] if self.config.output_bias else y_BTD

    def absorb(self, queries):
        """Queries by head; nothing stands between them and the keys."""
        B, K, G, T, H = queries.shape
        return {"k": queries.reshape(B, K * G, T, H)}

    def score(self, queries, memory, positions_BS):
        """The queries of a group are rows against their one key head."""
        return scores(queries["k"], self._keys(memory, positions_BS))

    def output(self, mixed_BNTM):
        """A reading already is the heads."""
        return self.merge(mixed_BNTM)

    def value_weights(self):
        """The output projection."""
        return self.o_NHD[...]
