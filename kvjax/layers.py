"""The decoder's plain layers: initialisers, RMSNorm, rotary positions, the gated MLP.

B batch, T tokens, M = B * T, D width, F mlp width, E = 2 F, H features of a head (any last axis).
Modules compute in the dtype of their parameters; norms and rotations pass through float32.
"""

import functools
import math
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.rope import RopeScaling, frequencies

RMS_EPS = 1e-6


def normal(key: jax.Array, shape: Sequence[int], fan_in: int, scale: float = 1.0) -> nnx.Param:
    """A float32 parameter drawn from N(0, scale^2 / fan_in)."""
    return nnx.Param(jax.random.normal(key, shape, jnp.float32) * (scale / math.sqrt(fan_in)))


def subkey(key: jax.Array, name: str) -> jax.Array:
    """The key of a named part: shared parts of two variants get equal weights from equal seeds."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The last axis of `x` through the first of `weight`, as one product of two matrices.

    XLA:CPU runs these as they stand; over several axes it transposes weights, at every decoded token.
    """
    y_MF = x.reshape(-1, x.shape[-1]) @ weight.reshape(weight.shape[0], -1)
    return y_MF.reshape(*x.shape[:-1], *weight.shape[1:])


def to_heads(x_BTD: jax.Array, weight_DNH: jax.Array) -> jax.Array:
    """Heads `BNTH` of every token."""
    return jnp.swapaxes(project(x_BTD, weight_DNH), 1, 2)


def from_heads(x_BNTH: jax.Array, weight_NHD: jax.Array) -> jax.Array:
    """The sum `BTD` of every head through its part of the weight."""
    B, N, T, H = x_BNTH.shape
    return project(jnp.swapaxes(x_BNTH, 1, 2).reshape(B, T, N * H), weight_NHD.reshape(N * H, -1))


class RMSNorm(nnx.Module):
    """x / rms(x) * gain over the last axis (Zhang & Sennrich 2019, eq. 4), in float32."""

    def __init__(self, features: int, eps: float = RMS_EPS):
        self.gain_H = nnx.Param(jnp.ones(features, jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        gain = self.gain_H[...].astype(jnp.float32)
        return (y * jax.lax.broadcast_in_dim(gain, y.shape, (y.ndim - 1,))).astype(x.dtype)


def rotate(
    x: jax.Array,
    positions: jax.Array,
    theta: float,
    interleaved: bool = False,
    scaling: RopeScaling | None = None,
) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, eq. 34) of `x` [..., T, H] at `positions` [..., T].

    Pairs are (j, j + H/2), the layout of Hugging Face's Llama, or (2j, 2j + 1) when `interleaved`.
    Leading axes of `positions` meet the first axes of `x`; missing ones are shared. Angles are float32.
    """
    half = x.shape[-1] // 2
    turns = jnp.asarray(frequencies(theta, x.shape[-1], scaling).reshape((1,) * positions.ndim + (half,)))
    angles = jnp.maximum(positions, 0).astype(jnp.float32)[..., None] * turns
    missing = x.ndim - angles.ndim
    angles = angles.reshape(angles.shape[:-2] + (1,) * missing + angles.shape[-2:])
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scaling is not None and scaling.magnitude is not None:
        cos, sin = cos * scaling.magnitude, sin * scaling.magnitude
    return _turn(x.astype(jnp.float32), cos, sin, interleaved).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _turn(x, cos, sin, interleaved):
    half = x.shape[-1] // 2
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    pair = (a * cos - b * sin, b * cos + a * sin)
    return jnp.stack(pair, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(pair, axis=-1)


def _turn_forward(x, cos, sin, interleaved):
    return _turn(x, cos, sin, interleaved), (cos, sin)


def _turn_backward(interleaved, angles, g):
    # The transpose of a (stretched) rotation turns back; differentiating the slices would write padded copies.
    cos, sin = angles
    return _turn(g, cos, -sin, interleaved), None, None


_turn.defvjp(_turn_forward, _turn_backward)


class MLP(nnx.Module):
    """SwiGLU: (silu(x W_gate) * x W_up) W_down (Shazeer 2020, eq. 6), gate and up in one product."""

    def __init__(self, width: int, mlp_width: int, output_scale: float, key: jax.Array):
        self.gate_up_DE = normal(subkey(key, "gate"), (width, 2 * mlp_width), width)
        self.down_FD = normal(subkey(key, "down"), (mlp_width, width), mlp_width, output_scale)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        turned = hasattr(self, "gate_up_ED")
        gate_up_DE = self.gate_up_ED[...].T if turned else self.gate_up_DE[...]
        gate_BTF, up_BTF = jnp.split(project(x_BTD, gate_up_DE), 2, axis=-1)
        return project(jax.nn.silu(gate_BTF) * up_BTF, self.down_DF[...].T if turned else self.down_FD[...])

    def turn(self) -> None:
        """Keep weights output axis first, whose rows XLA:CPU's product with a single vector reads in order."""
        self.gate_up_ED, self.down_DF = nnx.Param(self.gate_up_DE[...].T), nnx.Param(self.down_FD[...].T)
        del self.gate_up_DE, self.down_FD


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity without a key or at rate 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros_like(x))
