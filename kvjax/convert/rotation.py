"""The same model with turned values in its cache.

D width, N query heads, K kv heads, H head dim.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from kvjax.attention.grouped import GroupedAttention
from kvjax.codecs.linear import Linear
from kvjax.decoder import Decoder


def rotate_values(
    graphdef: nnx.GraphDef[Decoder], params: Any, rotation: Linear
) -> tuple[nnx.GraphDef[Decoder], Any]:
    """The same model whose cached values are turned by an orthogonal map, folded into W_V and W_O (QuaRot's R2).

    A codec for values then needs no rotation of its own: nothing is turned while decoding. One map for every
    head or one for each, `[H, H]` or `[K, H, H]`. Keys cannot be turned so: the rotary positions stand between.
    ValueError for attention without values of its own, and for a map that is no rotation.
    """
    model = nnx.merge(graphdef, params)
    for block in model.layers:
        attention = block.attention
        if not isinstance(attention, GroupedAttention):
            raise ValueError(f"only grouped attention caches values, not {type(attention).__name__}")
        K, H = attention.config.num_kv_heads, attention.config.head_dim
        turn_KHJ = jnp.broadcast_to(_rotation(rotation, H), (K, H, H))
        dtype = attention.v_DKH[...].dtype
        apply = lambda form, a, turn=turn_KHJ, dtype=dtype: jnp.einsum(form, a, turn, precision="highest").astype(
            dtype
        )
        attention.v_DKH = nnx.Param(apply("DKH,KHJ->DKJ", attention.v_DKH[...]))
        if attention.config.qkv_bias:
            attention.v_bias_KH = nnx.Param(apply("KH,KHJ->KJ", attention.v_bias_KH[...]))
        o_KGHD = attention.o_NHD[...].reshape(K, -1, H, attention.o_NHD.shape[-1])
        o_KGJD = apply("KGHD,KHJ->KGJD", o_KGHD)
        attention.o_NHD = nnx.Param(o_KGJD.reshape(attention.o_NHD.shape))
    return nnx.split(model)


def _rotation(rotation, H):
    turn = rotation.down
    shape = turn.shape[-2:]
    if shape != (H, H) or rotation.joint or jnp.abs(rotation.mean).max() > 0:
        raise ValueError(
            f"rotation must turn {H} features of a head in place and subtract nothing, not {list(shape)}"
        )
    error = jnp.abs(turn @ jnp.swapaxes(turn, -1, -2) - jnp.eye(H)[(None,) * (turn.ndim - 2)]).max()
    if error > 1e-4:
        raise ValueError(f"rotation must be orthogonal; its product with its transpose is {error:.1g} off")
    return turn
