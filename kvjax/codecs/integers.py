"""Codecs of integers with float16 scales: along a token's channels, or along time for every channel.

The scale is rounded first and then divided by. Scales and zero points saturate at 65504, codes at both ends.

T tokens, F features of a token, N blocks of C channels, M blocks of C tokens; axes before time are left out.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from kvjax.checks import at_least, multiple
from kvjax.codecs import bits as formats
from kvjax.codecs.base import Quantizer


@jax.tree_util.register_static
@dataclass(frozen=True)
class Int(Quantizer):
    """Integers along channels: every token has a scale for each `channels` of them (None: for all).

    Symmetric: s = amax / (2^(bits - 1) - 1), x^ = q s. Asymmetric, KIVI's values (arXiv 2402.02750):
    s = (max - min) / (2^bits - 1), x^ = q s + min.
    """

    bits: Literal[8, 4, 2] = 8
    channels: int | None = None
    symmetric: bool = True

    def __post_init__(self):
        _check_bits(self.bits)
        if self.channels is not None:
            at_least("channels", self.channels, 1)

    @property
    def code_bits(self):
        """Codes below 8 bits."""
        return _code_bits(self.bits)

    def encode(self, x):
        """`code`, uint8, `scale` `[..., T, N]` and, if asymmetric, `zero`, the bits of float16.

        Symmetric codes are offset by 2^(bits - 1) if that is not 8 bits, and two's complement if it is.
        """
        F = x.shape[-1]
        x_TNC = formats.blocks(x.astype(jnp.float32), self._size(F), mode="edge")
        if not self.symmetric:
            code_TNC, scale_TN1, zero_TN1 = _asymmetric(x_TNC, self.bits, axis=-1)
            return {"code": formats.joined(code_TNC, F), "scale": scale_TN1[..., 0], "zero": zero_TN1[..., 0]}
        top = 2 ** (self.bits - 1) - 1
        scale_TN = _scale(jnp.abs(x_TNC).max(-1), top)
        q_TNC = jnp.clip(jnp.rint(x_TNC / formats.f16_decode(scale_TN)[..., None]), -top, top).astype(jnp.int8)
        q_TF = formats.joined(q_TNC, F)
        if self.bits == 8:
            return {"code": lax.bitcast_convert_type(q_TF, jnp.uint8), "scale": scale_TN}
        return {"code": (q_TF + (top + 1)).astype(jnp.uint8), "scale": scale_TN}

    def decode(self, stored, dtype):
        """The array, rounded."""
        code_TF = stored["code"]
        if self.symmetric and self.bits == 8:
            q_TF = lax.bitcast_convert_type(code_TF, jnp.int8).astype(jnp.float32)
        else:
            offset = 2 ** (self.bits - 1) if self.symmetric else 0
            q_TF = (code_TF.astype(jnp.int32) - offset).astype(jnp.float32)
        scale_TN, size = formats.f16_decode(stored["scale"]), self._size(code_TF.shape[-1])
        zero_TN = None if self.symmetric else formats.f16_decode(stored["zero"])
        return formats.rescaled(q_TF, scale_TN, size, zero_TN).astype(dtype)

    def bits_per_value(self, features: int) -> float:
        """Stored bits an element of a token of so many features."""
        scales = -(-features // self._size(features)) * (1 if self.symmetric else 2)
        return self.bits + 16 * scales / features

    def _size(self, features):
        return features if self.channels is None else min(self.channels, features)


@jax.tree_util.register_static
@dataclass(frozen=True)
class IntPerChannel(Quantizer):
    """Asymmetric integers along time, KIVI's keys: every channel has a scale for each `tokens` tokens.

    `residual` tokens, a multiple of `tokens`, are encoded together (arXiv 2402.02750); None: `tokens`.
    """

    bits: Literal[8, 4, 2] = 4
    tokens: int = 32
    residual: int | None = None

    def __post_init__(self):
        _check_bits(self.bits)
        at_least("tokens", self.tokens, 1)
        if self.residual is not None:
            at_least("residual", self.residual, 1)
            multiple("residual", self.residual, "tokens", self.tokens)

    @property
    def group(self):
        """Tokens that are encoded together."""
        return self.tokens if self.residual is None else self.residual

    @property
    def code_bits(self):
        """Codes below 8 bits."""
        return _code_bits(self.bits)

    def encode(self, x):
        """`code`, uint8, and `scale` and `zero` `[..., M, F]`, the bits of float16."""
        x_MCF = x.astype(jnp.float32).reshape(*x.shape[:-2], -1, self.tokens, x.shape[-1])
        code_MCF, scale_M1F, zero_M1F = _asymmetric(x_MCF, self.bits, axis=-2)
        return {"code": code_MCF.reshape(x.shape), "scale": scale_M1F[..., 0, :], "zero": zero_M1F[..., 0, :]}

    def decode(self, stored, dtype):
        """The array, rounded."""
        code_TF = stored["code"]
        q_TF = code_TF.astype(jnp.int32).astype(jnp.float32)
        q_MCF = q_TF.reshape(*q_TF.shape[:-2], -1, self.tokens, q_TF.shape[-1])
        decoded = (formats.f16_decode(stored["scale"]), formats.f16_decode(stored["zero"]))
        scale_MF, zero_MF = lax.optimization_barrier(decoded)
        x_MCF = q_MCF * scale_MF[..., None, :] + zero_MF[..., None, :]
        return x_MCF.reshape(code_TF.shape).astype(dtype)

    def bits_per_value(self, features: int) -> float:
        """Stored bits an element of a token of so many features."""
        return self.bits + 32 / self.tokens


def _scale(span, top: int):
    """float16 bits of span / top, never of 0."""
    return formats.f16_encode(jnp.maximum(formats.quotient(span, top), 2.0**-24))


def _asymmetric(x, bits: int, axis: int):
    """Codes of x, and the float16 bits of their scale and zero point over `axis`."""
    top = 2**bits - 1
    low = x.min(axis, keepdims=True)
    scale, zero = _scale(x.max(axis, keepdims=True) - low, top), formats.f16_encode(low)
    q = jnp.rint((x - formats.f16_decode(zero)) / formats.f16_decode(scale))
    return jnp.clip(q, 0, top).astype(jnp.uint8), scale, zero


def _code_bits(bits: int):
    return {} if bits == 8 else {"code": bits}


def _check_bits(bits: int):
    if bits not in (8, 4, 2):
        nearest = min((8, 4, 2), key=lambda valid: abs(valid - bits))
        raise ValueError(f"bits={bits} must be 8, 4 or 2; nearest: {nearest}")
