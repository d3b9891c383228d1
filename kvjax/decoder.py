"""The decoder: embedding, [norm, attention, norm, MLP] x depth, logits.

It knows attention only by its protocol. B batch, T tokens, D width, V vocabulary, L layers.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from kvjax import cache as caches
from kvjax.attention.base import AttentionConfig
from kvjax.cache import Cache
from kvjax.checks import at_least, between, positive
from kvjax.codecs.base import Codecs, slot_multiple
from kvjax.layer_cache import LayerCache
from kvjax.layers import MLP, RMS_EPS, RMSNorm, dropout, normal, subkey
from kvjax.slots import Ring

EMBEDDING_STD = 0.02


@dataclass(frozen=True)
class DecoderConfig:
    """Everything of the decoder but its attention."""

    width: int = 192
    """Features of the residual stream."""
    depth: int = 4
    """Layers."""
    mlp_width: int = 512
    """Hidden features of the gated MLP."""
    tie_embeddings: bool = True
    """Compute logits with the embedding matrix."""
    output_scale: float = 0.0
    """Initial scale of every sublayer's last projection; 0 starts layers as the identity, 1 keeps variances."""
    dropout: float = 0.0
    """Rate on the embedding and on every sublayer's result."""
    scan: bool = False
    """Run the layers as one scanned layer: compiles faster, runs slower on CPU; cannot decode."""
    remat: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again."""
    norm_eps: float = field(default=RMS_EPS, kw_only=True)
    """What the norms add to mean squares."""

    def __post_init__(self):
        for name in ("width", "depth", "mlp_width"):
            at_least(name, getattr(self, name), 1)
        at_least("output_scale", self.output_scale, 0.0)
        between("dropout", self.dropout, 0.0, 1.0)
        positive("norm_eps", self.norm_eps)


class Block(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, config: DecoderConfig, attention: AttentionConfig, key: jax.Array):
        # The residual stream sums 2 x depth results.
        output_scale = config.output_scale / math.sqrt(2 * config.depth)
        self.rate = config.dropout
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = attention.build(config.width, output_scale, subkey(key, "attention"))
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_width, output_scale, subkey(key, "mlp"))

    def __call__(self, x_BTD, positions_BT, cache=None, key=None):
        """The layer's result and its cache."""
        keys = (None, None) if key is None else jax.random.split(key)
        y_BTD, cache = self.attention(self.attention_norm(x_BTD), positions_BT, cache)
        x_BTD = x_BTD + dropout(y_BTD, self.rate, keys[0])
        return x_BTD + dropout(self.mlp(self.mlp_norm(x_BTD)), self.rate, keys[1]), cache


class Decoder(nnx.Module):
    """A causal language model. `nnx.split` it once; from there on its parameters are a plain pytree."""

    def __init__(self, config: DecoderConfig, attention: AttentionConfig, vocab_size: int, key: jax.Array):
        self.config = config
        self.attention = attention
        self.vocab_size = vocab_size
        # Small: a tied embedding gives its own token's logit |embedding| sqrt(D), which training must undo.
        self.embedding_VD = normal(subkey(key, "embedding"), (vocab_size, config.width), 1, EMBEDDING_STD)
        keys = [subkey(key, f"layer {i}") for i in range(config.depth)]
        if config.scan:
            self.stack = _stacked(config, attention, keys)
        else:
            self.layers: nnx.List[Block] = nnx.List([Block(config, attention, k) for k in keys])
        self.norm = RMSNorm(config.width, config.norm_eps)
        if not config.tie_embeddings:
            self.unembedding_VD = normal(subkey(key, "unembedding"), (vocab_size, config.width), config.width)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        cache: Cache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Float32 logits `BTV` of the next token, and the cache that now holds these tokens.

        `positions_BT` defaults to 0 ... T-1 without a cache, and to the slots' numbers with one.
        `key` turns dropout on.
        """
        x_BTD, cache = self.hidden(tokens_BT, positions_BT, cache, key)
        return self.logits(x_BTD), cache

    def unembedding(self) -> jax.Array:
        """The matrix `VD` that turns final hidden states into logits."""
        return (self.embedding_VD if self.config.tie_embeddings else self.unembedding_VD)[...]

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits from final hidden states."""
        return jnp.einsum("BTD,VD->BTV", x_BTD, self.unembedding(), preferred_element_type=jnp.float32)

    def hidden(self, tokens_BT, positions_BT=None, cache=None, key=None):
        """Final hidden states `x_BTD` after the last norm, and the cache."""
        B, T = tokens_BT.shape
        if positions_BT is None:
            first = 0 if cache is None else cache.length
            positions_BT = jnp.broadcast_to(first + jnp.arange(T, dtype=jnp.int32)[None], (B, T))
        x_BTD = self.embedding_VD[...][tokens_BT]
        keys = [None] * (self.config.depth + 1)
        if key is not None:
            keys = list(jax.random.split(key, self.config.depth + 1))
            x_BTD = dropout(x_BTD, self.config.dropout, keys[-1])
        if cache is not None:
            x_BTD, cache = self._cached(x_BTD, positions_BT, cache)
        elif self.config.scan or self.config.remat:
            x_BTD = self._scanned(x_BTD, positions_BT, keys[:-1])
        else:
            for block, k in zip(self.layers, keys[:-1]):
                x_BTD, _ = block(x_BTD, positions_BT, None, k)
        return self.norm(x_BTD), cache

    def _require_unrolled(self):
        if self.config.scan:
            raise ValueError("decoder.scan=True cannot decode; use `unscanned` on the model first")

    def _cached(self, x_BTD, positions_BT, cache):
        self._require_unrolled()
        claim, layers = cache.claim(positions_BT), []
        for i, block in enumerate(self.layers):
            x_BTD, layer = block(x_BTD, positions_BT, claim.layer(i))
            assert isinstance(layer, LayerCache)
            layers.append(layer)
        return x_BTD, claim.written(layers)

    def _scanned(self, x_BTD, positions_BT, keys):
        """As one scanned layer: XLA:CPU undoes the recomputation of unrolled ones."""
        if self.config.scan:
            graphdef, stack = nnx.split(self.stack)
        else:
            graphdef = nnx.split(self.layers[0])[0]
            layers = [nnx.split(block)[1] for block in self.layers]
            stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

        def step(x, layer):
            params, key = layer
            return nnx.merge(graphdef, params)(x, positions_BT, None, key)[0], None

        stacked_keys = None if keys[0] is None else jnp.stack(keys)
        return lax.scan(jax.checkpoint(step) if self.config.remat else step, x_BTD, (stack, stacked_keys))[0]

    def init_cache(self, batch: int, max_len: int, codec: Codecs) -> Cache:
        """An empty cache of `max_len` slots, its shapes derived from what the layers' `project` returns.

        `codec` is one for all arrays of all layers, or as in `kvjax.codecs.base`. With windowed attention,
        a ring of no more slots than the window and its sinks take, and the codec packs together.
        """
        at_least("batch", batch, 1)
        at_least("max_len", max_len, 1)
        self._require_unrolled()
        ring, (window, num_sinks) = None, self.attention.band
        if window is not None and window + num_sinks <= max_len:
            ring = Ring(window, num_sinks)
            max_len = ring.num_slots + -ring.num_slots % slot_multiple(codec)
        x_BTD = jax.ShapeDtypeStruct((batch, max_len, self.config.width), self.embedding_VD[...].dtype)
        positions_BT = jax.ShapeDtypeStruct((batch, max_len), jnp.int32)
        entry = lambda block: jax.eval_shape(lambda x, p: block.attention.project(x, p)[1], x_BTD, positions_BT)
        return caches.empty(tuple(entry(block) for block in self.layers), codec, ring)


def _stacked(config, attention, keys):
    """One block whose parameters have a leading layer axis."""
    graphdef = nnx.split(Block(config, attention, keys[0]))[0]
    stack = jax.vmap(lambda key: nnx.split(Block(config, attention, key))[1])(jnp.stack(keys))
    return nnx.merge(graphdef, stack)


def unscanned(decoder: Decoder) -> Decoder:
    """The same model with its layers unrolled, as decoding from a cache wants them."""
    if not decoder.config.scan:
        return decoder
    config = dataclasses.replace(decoder.config, scan=False)
    shapes = nnx.eval_shape(lambda: Decoder(config, decoder.attention, decoder.vocab_size, jax.random.key(0)))
    graphdef, stack = nnx.split(decoder.stack)
    shapes.layers = nnx.List(
        [nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], stack)) for i in range(config.depth)]
    )
    for name in ("embedding_VD", "norm") + (() if config.tie_embeddings else ("unembedding_VD",)):
        setattr(shapes, name, getattr(decoder, name))
    return shapes


def decodable(graphdef: nnx.GraphDef[Decoder], params: Any) -> tuple[nnx.GraphDef[Decoder], Any]:
    """Structure and parameters of the same model in a form that can decode."""
    model = nnx.merge(graphdef, params)
    return nnx.split(unscanned(model)) if model.config.scan else (graphdef, params)


def fused(graphdef: nnx.GraphDef[Decoder], params: Any, turn: bool) -> tuple[nnx.GraphDef[Decoder], Any]:
    """The same model with the weights of its layers joined for decoding, once, outside of any loop.

    `turn` also keeps them output axis first, as decoding a single row on a CPU wants them.
    """
    model = nnx.merge(graphdef, params)
    for block in model.layers:
        block.attention.fuse(turn)
        if turn and not hasattr(block.mlp, "gate_up_ED"):
            block.mlp.turn()
    return nnx.split(model)


def rope_on_read(graphdef: nnx.GraphDef[Decoder], params: Any) -> tuple[nnx.GraphDef[Decoder], Any]:
    """The same model, but keys are cached before the rotation; ValueError if its attention has no such form."""
    model = nnx.merge(graphdef, params)
    if not hasattr(model.attention, "rope_on_read"):
        kind = type(model.attention).__name__
        raise ValueError(f"keys before the rotation need grouped attention, not {kind}, which caches latents")
    for block in model.layers:
        block.attention.config = dataclasses.replace(block.attention.config, rope_on_read=True)
    return nnx.split(model)
