"""Affine maps of a token's vector, in and out of which queries and readings can be taken.

B batch, T tokens, F features of a token, R of its image, N query heads, K kv heads (1 where all are
alike), G = N // K, M any features.
"""

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Linear:
    """z = (x - mean) down, and back x^ = z up + mean, in float32.

    `down` is `[F, R]` for every head alike, `[K, F, R]` for each head of an array `[B, K, T, F]`, or the
    same with `joint` for one z `[B, T, R]` of all heads together. `up` is the other way round, `[..., R, F]`,
    such that x^ has the same z: up down = 1.
    """

    down: jax.Array
    up: jax.Array
    mean: jax.Array
    """`[F]` or `[K, F]`."""
    joint: bool = field(default=False, metadata={"static": True})

    def apply(self, x: jax.Array) -> jax.Array:
        """z of an array `[..., T, F]`."""
        x = x.astype(jnp.float32) - self._over_time(x.ndim)
        if self.down.ndim == 2:
            return jnp.einsum("...TF,FR->...TR", x, self.down)
        return jnp.einsum("BKTF,KFR->BTR" if self.joint else "BKTF,KFR->BKTR", x, self.down)

    def undo(self, z: jax.Array) -> jax.Array:
        """x^ of z."""
        if self.up.ndim == 2:
            x = jnp.einsum("...TR,RF->...TF", z, self.up)
        else:
            x = jnp.einsum("BTR,KRF->BKTF" if self.joint else "BKTR,KRF->BKTF", z, self.up)
        return x + self._over_time(x.ndim)

    def enter(self, q_BNTF: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries `BNTR` against z, and the scores `BNT1` of the mean: together the scores against x^."""
        up_KRF, mean_KF = self._of_heads()
        q_BKGTF = _grouped(q_BNTF.astype(jnp.float32), mean_KF.shape[0])
        q_BKGTR = jnp.einsum("BKGTF,KRF->BKGTR", q_BKGTF, up_KRF)
        offset_BKGT = jnp.einsum("BKGTF,KF->BKGT", q_BKGTF, mean_KF)
        shape = q_BNTF.shape[:3]
        return q_BKGTR.reshape(*shape, -1).astype(q_BNTF.dtype), offset_BKGT.reshape(*shape, 1)

    def leave(self, mixed_BNTR: jax.Array, total_BNT1: jax.Array) -> jax.Array:
        """The weighted sum `BNTF` of x^ from that of z and the sum of the weights."""
        up_KRF, mean_KF = self._of_heads()
        mixed_BKGTR = _grouped(mixed_BNTR.astype(jnp.float32), mean_KF.shape[0])
        total_BKGT1 = _grouped(total_BNT1.astype(jnp.float32), mean_KF.shape[0])
        mixed_BKGTF = jnp.einsum("BKGTR,KRF->BKGTF", mixed_BKGTR, up_KRF)
        mixed_BKGTF += total_BKGT1 * mean_KF[None, :, None, None]
        return mixed_BKGTF.reshape(*mixed_BNTR.shape[:3], -1)

    def then(self, other: "Linear") -> "Linear":
        """This map and then another one of what it gives, as one; ValueError if there is no such thing."""
        if self.joint and (other.down.ndim == 3 or other.mean.ndim == 2):
            raise ValueError("a joint projection leaves no heads: what follows it must be one map for all")
        gives, takes = self.down.shape[-1], other.down.shape[-2]
        if gives != takes:
            raise ValueError(f"a map of {takes} features must follow one that gives as many, not {gives}")
        heads = {a.shape[0] for map in (self, other) for a in (map.up, map.mean[..., None]) if a.ndim == 3}
        if len(heads) > 1:
            raise ValueError(f"maps that follow each other must be for as many heads, not {sorted(heads)}")
        matmul = functools.partial(jnp.matmul, precision="highest")  # GPUs round factors to 10 bits otherwise
        # As up down = 1, what the other subtracts from z can be subtracted from x.
        shift = matmul(other.mean[..., None, :], self.up)[..., 0, :]
        shape = jnp.broadcast_shapes(self.mean.shape, shift.shape)
        mean = jnp.broadcast_to(self.mean, shape) + jnp.broadcast_to(shift, shape)
        down, up = matmul(self.down, other.down), matmul(other.up, self.up)
        return Linear(down, up, mean, self.joint or other.joint)

    def _of_heads(self):
        """`up` and `mean`, both with an axis of heads."""
        R, F = self.up.shape[-2:]
        K = self.up.shape[0] if self.up.ndim == 3 else self.mean.size // F
        return jnp.broadcast_to(self.up, (K, R, F)), jnp.broadcast_to(self.mean, (K, F))

    def _over_time(self, ndim):
        mean = self.mean if self.mean.ndim == 1 else self.mean[:, None]
        return mean.reshape((1,) * (ndim - mean.ndim) + mean.shape)


def _grouped(a_BNTM, K):
    B, N, T, M = a_BNTM.shape
    return a_BNTM.reshape(B, K, N // K, T, M)
