"""Low-rank KV: a token leaves latents, from which keys and values are rebuilt on read.

B batch, T query tokens, S memory slots, D width, N heads, H head dim, R latent rank.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.attention.base import Attention, AttentionConfig
from kvjax.checks import at_least, even, one_of
from kvjax.layers import from_heads, normal, project, subkey, to_heads


@dataclass(frozen=True)
class LowRank(AttentionConfig):
    """K and V through a joint latent of `rank`, or through two of `rank_k` and `rank_v`.

    With `position="rope"` a rotation stands between the query and the key's up-projection, so keys
    are rebuilt and rotated whenever the cache is read. With "none" there is no position but the
    causal mask, and the up-projection is absorbed into the query. Both cache the latents alone.
    """

    head_dim: int = 24
    """Features of a head."""
    rank: int | None = 128
    """Joint latent for keys and values; None for the split form."""
    rank_k: int | None = None
    """Latent of the keys, in the split form."""
    rank_v: int | None = None
    """Latent of the values, in the split form."""
    position: Literal["rope", "none"] = "rope"
    """Rotary positions on the rebuilt keys, or none."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""

    def __post_init__(self):
        super().__post_init__()
        at_least("head_dim", self.head_dim, 1)
        one_of("position", self.position, ("rope", "none"))
        if self.position == "rope":
            even("head_dim", self.head_dim)
        at_least("rope_theta", self.rope_theta, 1.0)
        if self.position == "none" and self.rope_scaling is not None:
            raise ValueError("rope_scaling must be None with position='none': nothing turns")
        split = (self.rank_k, self.rank_v)
        if (self.rank is None) != (None not in split) or (self.rank is not None and split != (None, None)):
            raise ValueError(
                f"rank={self.rank}, rank_k={self.rank_k}, rank_v={self.rank_v} must be either a rank alone "
                "(joint latent) or rank None with both rank_k and rank_v (split)"
            )
        for field, value in (("rank", self.rank), ("rank_k", self.rank_k), ("rank_v", self.rank_v)):
            if value is not None:
                at_least(field, value, 1)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every latent, by its name in the cache."""
        if self.rank is not None:
            return {"latent": self.rank}
        assert self.rank_k is not None and self.rank_v is not None
        return {"latent_k": self.rank_k, "latent_v": self.rank_v}

    def build(self, width: int, output_scale: float, key: jax.Array) -> "LowRankAttention":
        """The module for a decoder of this width."""
        return LowRankAttention(self, width, output_scale, key)

    def elements_per_token(self) -> int:
        """The latents; heads do not appear."""
        return sum(self.ranks.values())

    def flops_per_slot(self) -> int:
        """As multi-head attention, once keys and values are rebuilt."""
        return 2 * self.num_heads * 2 * self.head_dim


class LowRankAttention(Attention):
    """Caches latents `BSR`."""

    def __init__(self, config: LowRank, width: int, output_scale: float, key: jax.Array):
        D, N, H = width, config.num_heads, config.head_dim
        self.config = config
        self.scale = H**-0.5
        self.key_latent, self.values = (list(config.ranks) * 2)[:2]  # one name twice where it is joint
        rank_k, rank_v = config.ranks[self.key_latent], config.ranks[self.values]
        self.q_DNH = normal(subkey(key, "q"), (D, N, H), D)
        if config.rank is not None:
            self.down_DR = normal(subkey(key, "down"), (D, rank_k), D)
        else:
            self.down_k_DR = normal(subkey(key, "dk"), (D, rank_k), D)
            self.down_v_DR = normal(subkey(key, "dv"), (D, rank_v), D)
        self.up_k_RNH = normal(subkey(key, "uk"), (rank_k, N, H), rank_k)
        self.up_v_RNH = normal(subkey(key, "uv"), (rank_v, N, H), rank_v)
        self.o_NHD = normal(subkey(key, "o"), (N, H, D), N * H, output_scale)
        # Rebuilding saves 2 N (R - H) FLOPs a query and slot in what absorption reads, and costs
        # 2 R N H a slot; rotated keys are rebuilt in either form.
        absorbed = [rank_v] if config.position == "rope" else [rank_k, rank_v]
        saved = sum(rank - H for rank in absorbed)
        self.expand_from = math.ceil(sum(absorbed) * H / saved) if saved > 0 else 2**30

    def project(self, x_BTD, positions_BT):
        """Queries `BNTH` and the entry: the latents `BTR`."""
        q_BNTH = to_heads(x_BTD, self.q_DNH[...])
        if self.config.position == "rope":
            q_BNTH = self.rotate(q_BNTH, positions_BT)
        if self.config.rank is not None:
            return q_BNTH, {"latent": project(x_BTD, self.down_DR[...])}
        return q_BNTH, {
            "latent_k": project(x_BTD, self.down_k_DR[...]),
            "latent_v": project(x_BTD, self.down_v_DR[...]),
        }

    def _keys(self, memory, positions_BS):
        k_BNSH = jnp.einsum("BSR,RNH->BNSH", memory[self.key_latent], self.up_k_RNH[...])
        return self.rotate(k_BNSH, positions_BS) if self.config.position == "rope" else k_BNSH

    def expand(self, queries, memory, positions_BS):
        """Keys (rotated where they turn) and values of every head."""
        v_BNSH = jnp.einsum("BSR,RNH->BNSH", memory[self.values], self.up_v_RNH[...])
        return queries[:, :, None], self._keys(memory, positions_BS), v_BNSH

    def merge(self, heads_BNTV):
        """Every head through its part of the output projection."""
        return from_heads(heads_BNTV, self.o_NHD[...])

    def absorb(self, queries):
        """Queries through the keys' up-projection, where no rotation stands between."""
        if self.config.position == "none":
            queries = jnp.einsum("BNTH,RNH->BNTR", queries, self.up_k_RNH[...])
        return {self.key_latent: queries}

    @property
    def inside(self):
        """Not the latent from which keys are rebuilt."""
        names = frozenset({self.key_latent, self.values})
        return names if self.config.position == "none" else names - {self.key_latent}

    def score(self, queries, memory, positions_BS):
        """Against rebuilt, rotated keys; against the latents themselves without positions."""
        if self.config.position == "none":
            return super().score(queries, memory, positions_BS)
        return jnp.einsum("BNTH,BNSH->BNTS", queries[self.key_latent], self._keys(memory, positions_BS))

    def output(self, mixed_BNTM):
        """Heads from weighted latents, then merged."""
        return self.merge(jnp.einsum("BNTR,RNH->BNTH", mixed_BNTM, self.up_v_RNH[...]))

    def value_weights(self):
        """The values' up-projection, then the output projection."""
        return jnp.einsum("RNH,NHD->NRD", self.up_v_RNH[...], self.o_NHD[...])
