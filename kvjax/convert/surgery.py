"""Taking a decoder's attention out and putting another in."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.attention.base import Attention, AttentionConfig
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.decoder import Decoder, decodable

Split = tuple[nnx.GraphDef[Decoder], Any]
Weights = dict[str, np.ndarray]
"""A layer's arrays by attribute, dotted below modules of its own; float64."""


def target(source: AttentionConfig, like: AttentionConfig) -> AttentionConfig:
    """What `like` says of the cache, and all else as `source` has it; ValueError unless that is `Grouped`.

    For MLA that includes heads as wide as the source's, and no norm on the latent.
    """
    if not isinstance(source, Grouped):
        raise ValueError(
            f"attention={type(source).__name__} cannot be converted; only Grouped (MHA, MQA, GQA) can, whose keys "
            "and values are heads"
        )
    names = {field.name for field in dataclasses.fields(like)} & {
        field.name for field in dataclasses.fields(source)
    }
    kept: dict[str, Any] = {name: getattr(source, name) for name in names - {"num_kv_heads"}}
    if isinstance(like, Latent):
        kept |= {"nope_dim": source.head_dim, "value_dim": source.head_dim, "latent_norm": False}
    return dataclasses.replace(like, **kept)


def replace_attention(
    graphdef: nnx.GraphDef[Decoder],
    params: Any,
    config: AttentionConfig,
    make: Callable[[int, Any, Any], Weights],
) -> Split:
    """The same decoder, unrolled, with attention of `config`, each layer's weights from `make(i, old, new)`.

    `new` is the layer's module, its arrays no more than shapes. Weights are rounded to the old ones' dtype.
    """
    model = nnx.merge(*decodable(graphdef, params))
    width = model.config.width
    for i, block in enumerate(model.layers):
        _require_convertible(block.attention, config)
        new = nnx.eval_shape(lambda: config.build(width, 1.0, jax.random.key(0)))
        dtype = jax.tree.leaves(nnx.split(block.attention)[1])[0].dtype
        for path, value in make(i, block.attention, new).items():
            *parents, name = path.split(".")
            module = functools.reduce(getattr, parents, new)
            assert getattr(module, name).shape == value.shape, path
            setattr(module, name, nnx.Param(jnp.asarray(value, dtype)))
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.split(new)[1]))
        block.attention = new
    model.attention = config
    return nnx.split(model)


def weights_of(attention: Attention) -> Weights:
    """A layer's arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.split(attention)[1])
    return {".".join(str(key.key) for key in path[:-1]): np.asarray(leaf, np.float64) for path, leaf in leaves}


def _require_convertible(attention: Attention, config: AttentionConfig) -> None:
    """ValueError where something besides the cache would change, or `config` has no place for it."""
    source = attention.config
    wanted = dataclasses.asdict(target(source, config))
    free = {"num_kv_heads", "latent_norm"}
    for name, value in dataclasses.asdict(config).items():
        if value != wanted[name] and name not in free:
            raise ValueError(f"attention.{name}={value} must be {wanted[name]}, as in the source")
    if not isinstance(config, Grouped):
        for name in ("qk_norm", "qkv_bias", "output_bias"):
            if getattr(source, name):
                raise ValueError(f"the source's attention.{name}=True has no place in {type(config).__name__}")
