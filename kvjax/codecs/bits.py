"""Narrow floats as the bits that are stored, and channels in blocks that share a scale.

Decoding computes on integers: XLA:CPU hoists `astype` of a narrow float array out of a loop, which decodes
the whole cache, and flushes float32 subnormals, which no step here meets. Every code decodes exactly, NaN to NaN.

T tokens, F features of a token, N blocks of C channels; axes before time are left out.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_NAN = 0x7FC00000  # of float32


def _float32(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def e4m3_decode(code: jax.Array) -> jax.Array:
    """float32 of uint8 E4M3 codes (the variant with a NaN and no infinities; OCP FP8, arXiv 2209.05433)."""
    code = code.astype(jnp.int32)
    rest = code & 0x7F
    normal = _float32(jnp.where(rest == 0x7F, _NAN, (rest << 20) + (120 << 23)))
    magnitude = jnp.where(rest < 8, rest.astype(jnp.float32) * 2.0**-9, normal)
    return jnp.where(code >= 0x80, -magnitude, magnitude)


def e4m3_encode(x: jax.Array) -> jax.Array:
    """uint8 E4M3 codes of float32, ties to even, saturating at 448."""
    return lax.bitcast_convert_type(jnp.clip(x, -448.0, 448.0).astype(jnp.float8_e4m3fn), jnp.uint8)


def e2m1_decode(code: jax.Array) -> jax.Array:
    """float32 of E2M1 codes, 4 bits in uint8: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and, from code 8 on, their negatives."""
    code = code.astype(jnp.int32)
    rest = code & 7
    normal = _float32((rest << 22) + (126 << 23))
    magnitude = jnp.where(rest < 2, rest.astype(jnp.float32) * 0.5, normal)
    return jnp.where(code >= 8, -magnitude, magnitude)


def e2m1_encode(x: jax.Array) -> jax.Array:
    """E2M1 codes, 4 bits in uint8, of float32: ties to even, saturating at 6. There is no NaN: it becomes 0."""
    a = jnp.abs(x)
    above = (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0)
    return sum((up.astype(jnp.uint8) for up in above), start=jnp.signbit(x).astype(jnp.uint8) << 3)


def e8m0_decode(code: jax.Array) -> jax.Array:
    """float32 2^(code - 127) of uint8 E8M0 codes, 255 is NaN (OCP MX v1.0).

    Code 0 gives 2^-127, a subnormal, which XLA:CPU reads as 0 in what follows. `e8m0_encode` never gives it.
    """
    code = code.astype(jnp.int32)
    return _float32(jnp.where(code == 255, _NAN, jnp.maximum(code << 23, 1 << 22)))


def e8m0_encode(amax: jax.Array, emax: int) -> jax.Array:
    """uint8 E8M0 codes of 2^(floor(log2 amax) - emax), at least 2^-126, of float32; NaN for what is not finite."""
    exponent = lax.bitcast_convert_type(amax, jnp.int32) >> 23  # biased by 127, just as E8M0 is
    return jnp.where(exponent == 255, 255, jnp.maximum(exponent - emax, 1)).astype(jnp.uint8)


def f16_decode(code: jax.Array) -> jax.Array:
    """float32 of the uint16 bits of float16."""
    code = code.astype(jnp.int32)
    rest = code & 0x7FFF
    normal = _float32((rest << 13) + jnp.where(rest < 0x7C00, 112 << 23, 224 << 23))
    magnitude = jnp.where(rest < 0x400, rest.astype(jnp.float32) * 2.0**-24, normal)
    return jnp.where(code >= 0x8000, -magnitude, magnitude)


def f16_encode(x: jax.Array) -> jax.Array:
    """uint16 bits of float32 as float16, ties to even, saturating at 65504."""
    return _half(x, jnp.float16)


def bf16_decode(code: jax.Array) -> jax.Array:
    """float32 of the uint16 bits of bfloat16."""
    return _float32(code.astype(jnp.int32) << 16)


def bf16_encode(x: jax.Array) -> jax.Array:
    """uint16 bits of float32 as bfloat16, ties to even, saturating at the largest finite value, about 3.39e38."""
    return _half(x, jnp.bfloat16)


def quotient(x: jax.Array, y: Any) -> jax.Array:
    """x / y for a scalar y, rounded once, in every program."""
    # XLA multiplies by the rounded reciprocal of a constant, in some programs and not in others: let it be none.
    return x / jnp.where(jnp.isnan(x), jnp.nan, y)


def _half(x, dtype: Any):
    top = float(jnp.finfo(dtype).max)
    return lax.bitcast_convert_type(jnp.clip(x, -top, top).astype(dtype), jnp.uint16)


def blocks(x_TF: jax.Array, size: int, mode: str = "constant") -> jax.Array:
    """`x_TNC`: blocks of `size` channels, the last one filled up with zeros, or its last channel (mode "edge")."""
    F = x_TF.shape[-1]
    N = -(-F // size)
    if N * size > F:
        x_TF = jnp.pad(x_TF, [(0, 0)] * (x_TF.ndim - 1) + [(0, N * size - F)], mode=mode)
    return x_TF.reshape(*x_TF.shape[:-1], N, size)


def joined(x_TNC: jax.Array, features: int) -> jax.Array:
    """`x_TF` of blocks, without what fills up the last one."""
    return x_TNC.reshape(*x_TNC.shape[:-2], -1)[..., :features]


def rescaled(q_TF: jax.Array, scale_TN: jax.Array, size: int, zero_TN: jax.Array | None = None) -> jax.Array:
    """Each block of `size` channels times its scale, plus its zero point."""
    # Without the barrier XLA:CPU decodes a scale again for every channel.
    scale_TN, zero_TN = lax.optimization_barrier((scale_TN, zero_TN))
    x_TNC = blocks(q_TF, size) * scale_TN[..., None]
    if zero_TN is not None:
        x_TNC += zero_TN[..., None]
    return joined(x_TNC, q_TF.shape[-1])
