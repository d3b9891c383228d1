"""Codecs of narrow floats: halves, FP8, and the block formats MX and NVFP4.

Numbers saturate. NaN is read back as NaN, in blocks as the whole block; in Fp8Block and Mx an infinity, too.

T tokens, F features of a token, N blocks of C channels; axes before time are left out.
"""

from dataclasses import dataclass
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.checks import at_least, one_of, positive
from kvjax.codecs import bits
from kvjax.codecs.base import Quantizer

_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
_NVFP4_BLOCK = 16
_ONE = np.float32(1)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Half(Quantizer):
    """16 bits an element: float16 or bfloat16, whatever the array's dtype."""

    kind: Literal["float16", "bfloat16"]

    def __post_init__(self):
        one_of("kind", self.kind, ("float16", "bfloat16"))

    def encode(self, x):
        """`code`, uint16."""
        encode = bits.f16_encode if self.kind == "float16" else bits.bf16_encode
        return {"code": encode(x.astype(jnp.float32))}

    def decode(self, stored, dtype):
        """The array, rounded."""
        decode = bits.f16_decode if self.kind == "float16" else bits.bf16_decode
        return decode(stored["code"]).astype(dtype)

    def bits_per_value(self, features: int) -> float:
        """Stored bits an element of a token of so many features."""
        return 16.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fp8(Quantizer):
    """E4M3 with one scale for the whole array: x^ = scale E4M3(x / scale)."""

    scale: jax.Array | np.float32 = _ONE
    """float32 scalar."""

    @classmethod
    def calibrated(cls, amax: float) -> Self:
        """Whose largest value is `amax`; ValueError if that is no finite number of at least 1e-30."""
        return cls(_calibrated(amax, _E4M3_MAX))

    def encode(self, x):
        """`code`, uint8."""
        return {"code": bits.e4m3_encode(bits.quotient(x.astype(jnp.float32), self.scale))}

    def decode(self, stored, dtype):
        """The array, rounded and saturated."""
        return (bits.e4m3_decode(stored["code"]) * self.scale).astype(dtype)

    def bits_per_value(self, features: int) -> float:
        """Stored bits an element of a token of so many features."""
        return 8.0


@jax.tree_util.register_static
@dataclass(frozen=True)
class Fp8Block(Quantizer):
    """E4M3 with a float32 scale, amax / 448, for each token's every `block` channels."""

    block: int = 128

    def __post_init__(self):
        at_least("block", self.block, 1)

    def encode(self, x):
        """`code`, uint8, and `scale` `[..., T, N]`."""
        x_TNC = bits.blocks(x.astype(jnp.float32), self._size(x.shape[-1]))
        scale_TN = bits.quotient(jnp.abs(x_TNC).max(-1), _E4M3_MAX)
        scale_TN = jnp.where(scale_TN == 0, 1.0, scale_TN)  # of zeros, or flushed to zero
        code_TNC = bits.e4m3_encode(x_TNC / scale_TN[..., None])
        return {"code": bits.joined(code_TNC, x.shape[-1]), "scale": scale_TN}

    def decode(self, stored, dtype):
        """The array, rounded."""
        q_TF = bits.e4m3_decode(stored["code"])
        return bits.rescaled(q_TF, stored["scale"], self._size(q_TF.shape[-1])).astype(dtype)

    def bits_per_value(self, features: int) -> float:
        """Stored bits an element of a token of so many features."""
        return 8 + 32 * -(-features // self.block) / features

    def _size(self, features):
        return min(self.block, features)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Mx(Quantizer):
    """MXFP8 (E4M3) or MXFP4 (E2M1): a power of two as scale for every `block` channels (OCP MX v1.0)."""

    element: Literal["e4m3", "e2m1"]
    block: int = 32

    def __post_init__(self):
        one_of("element", self.element, ("e4m3", "e2m1"))
        at_least("block", self.block, 1)

    @property
    def code_bits(self):
        """MXFP4 has codes of 4 bits."""
        return {"code": 4} if self.element == "e2m1" else {}

    def encode(self, x):
        """`code` and `scale` `[..., T, N]`, both uint8; the scale 2^(floor(log2 amax) - emax) as E8M0."""
        x_TNC = bits.blocks(x.astype(jnp.float32), self.block)
        emax, encode = (2, bits.e2m1_encode) if self.element == "e2m1" else (8, bits.e4m3_encode)
        scale_TN = bits.e8m0_encode(jnp.abs(x_TNC).max(-1), emax)
        code_TNC = encode(x_TNC / bits.e8m0_decode(scale_TN)[..., None])
        return {"code": bits.joined(code_TNC, x.shape[-1]), "scale": scale_TN}

    def decode(self, stored, dtype):
        """The array, rounded and saturated."""
        decode = bits.e2m1_decode if self.element == "e2m1" else bits.e4m3_decode
        scale_TN = bits.e8m0_decode(stored["scale"])
        return bits.rescaled(decode(stored["code"]), scale_TN, self.block).astype(dtype)

    def bits_per_value(self, features: int) -> float:
        """Stored bits an element of a token of so many features."""
        return (4 if self.element == "e2m1" else 8) + 8 * -(-features // self.block) / features


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NvFp4(Quantizer):
    """NVFP4: E2M1 with an E4M3 scale for every 16 channels and one for the array (NVIDIA Model-Optimizer).

    The array's scale is fixed, so that later tokens never change what earlier ones mean.
    """

    tensor_scale: jax.Array | np.float32
    """float32 scalar."""

    @property
    def code_bits(self):
        """Codes of 4 bits."""
        return {"code": 4}

    @classmethod
    def calibrated(cls, amax: float, headroom: float = 1.0) -> Self:
        """Whose largest value is `headroom * amax`; ValueError if that is no finite number of at least 1e-30."""
        at_least("amax", float(amax), 1e-30)
        positive("headroom", headroom)
        return cls(_calibrated(headroom * amax, _E2M1_MAX * _E4M3_MAX, "headroom * amax"))

    def encode(self, x):
        """`code` and `scale` `[..., T, N]`, both uint8; the scale as E4M3."""
        x_TNC = bits.blocks(x.astype(jnp.float32), _NVFP4_BLOCK)
        amax_TN = jnp.abs(x_TNC).max(-1)
        scale_TN = jnp.clip(bits.quotient(amax_TN, _E2M1_MAX * self.tensor_scale), 2.0**-9, _E4M3_MAX)
        scale_TN = bits.e4m3_encode(jnp.where(amax_TN == 0, 1.0, scale_TN))
        code_TNC = bits.e2m1_encode(x_TNC / self._full(scale_TN)[..., None])
        return {"code": bits.joined(code_TNC, x.shape[-1]), "scale": scale_TN}

    def decode(self, stored, dtype):
        """The array, rounded and saturated."""
        q_TF = bits.e2m1_decode(stored["code"])
        return bits.rescaled(q_TF, self._full(stored["scale"]), _NVFP4_BLOCK).astype(dtype)

    def bits_per_value(self, features: int) -> float:
        """Stored bits an element of a token of so many features."""
        return 4 + 8 * -(-features // _NVFP4_BLOCK) / features

    def _full(self, scale_TN):
        return bits.e4m3_decode(scale_TN) * self.tensor_scale


def _calibrated(amax: float, top: float, name: str = "amax") -> np.float32:
    """The scale by which `amax` becomes `top`; from 1e-30 on it is no subnormal, times a block's scale neither."""
    at_least(name, float(amax), 1e-30)
    return np.float32(float(amax) / top)
