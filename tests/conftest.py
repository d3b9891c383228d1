"""The process that tests compute in, small models of every variant, and their NumPy oracle in float64.

B batch, T tokens, D width, V vocabulary.
"""

import functools
import math
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax import primer
from kvjax.attention.base import Attention, AttentionConfig
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.cache import Cache
from kvjax.codecs import Codec, Storage
from kvjax.decoder import Decoder, DecoderConfig

jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))  # of subprocesses, too
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
nnx.set_graph_mode(False)

# Ranks and head dims are such that 1 or 3 queries read a cache in absorbed form, 7 in expanded form.
VARIANTS: dict[str, AttentionConfig] = {
    "mha": Grouped(6, 6, head_dim=10),
    "gqa2": Grouped(6, 3, head_dim=10),
    "gqa3": Grouped(6, 2, head_dim=10, rope_theta=101.0),
    "mqa": Grouped(6, 1, head_dim=10),
    "gqa_norm_bias": Grouped(6, 2, head_dim=10, qk_norm=True, qkv_bias=True),
    "low_rank": LowRank(6, head_dim=4, rank=11),
    "low_rank_split": LowRank(6, head_dim=4, rank=None, rank_k=7, rank_v=13),
    "low_rank_none": LowRank(6, head_dim=4, rank=11, position="none"),
    "low_rank_split_none": LowRank(6, head_dim=4, rank=None, rank_k=7, rank_v=13, position="none"),
    "mla": Latent(6, rank=13, rope_dim=4, nope_dim=3, value_dim=5),
    "mla_query_rank": Latent(6, rank=13, rope_dim=4, nope_dim=3, value_dim=5, query_rank=11),
    "mla_interleaved": Latent(6, rank=13, rope_dim=4, nope_dim=3, value_dim=5, rope_interleaved=True),
}
WIDTH, VOCAB = 23, 29
DECODER = DecoderConfig(width=WIDTH, depth=2, mlp_width=31)

# For programs that run for microseconds: XLA compiles them eight times as fast.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


def quick_jit_of(f: Callable, **options: Any) -> Any:
    return jax.jit(f, compiler_options=QUICK, **options)


@pytest.fixture(scope="session")
def quick_jit() -> Callable[..., Any]:
    """`jax.jit` for tiny programs, whose compilation is most of their time."""
    return quick_jit_of


@pytest.fixture(scope="session", params=VARIANTS.values(), ids=VARIANTS)
def variant(request) -> AttentionConfig:
    """Every variant in turn."""
    return request.param


def drawn(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, Any]:
    """A module's graph definition, and parameters from NumPy: compiling JAX's draws would take most of the time.

    Gains are not 1 and biases are not 0, which would hide whether they are used.
    """
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name, noise = path[-2].key, rng.standard_normal(leaf.shape).astype(leaf.dtype)
        if "bias" in name or "gain" in name:
            return np.float32("gain" in name) + np.float32(0.3) * noise
        return noise / np.float32(math.sqrt(leaf.shape[0]))

    graphdef, shapes = nnx.split(nnx.eval_shape(make))
    return graphdef, jax.tree_util.tree_map_with_path(draw, shapes)


@dataclass(frozen=True)
class Model:
    """A small decoder, split, with its jitted training and cached forms."""

    attention: AttentionConfig
    graphdef: nnx.GraphDef
    params: Any
    forward: Callable
    """`(params, tokens_BT, positions_BT) -> logits_BTV` without a cache."""
    step: Callable
    """`(params, tokens_BT, positions_BT, cache) -> logits_BTV, cache`."""

    empty: Callable[[int, int, int | None], Cache]
    """`(batch, max_len, chunk)` -> an exact cache; calls of equal arguments share one, caches being values."""

    def feed(
        self, cache: Cache, tokens: np.ndarray, positions: np.ndarray, split: tuple[int, ...]
    ) -> tuple[np.ndarray, Cache]:
        """Logits of tokens that are written and read in parts of these lengths, and the cache."""
        parts, start = [], 0
        for length in split:
            now = slice(start, start + length)
            logits, cache = self.step(self.params, tokens[:, now], positions[:, now], cache)
            parts.append(np.asarray(logits, np.float64))
            start += length
        return np.concatenate(parts, axis=1), cache


@functools.cache
def make_model(attention: AttentionConfig) -> Model:
    graphdef, params = drawn(lambda: Decoder(DECODER, attention, VOCAB, jax.random.key(0)))
    forward = lambda params, tokens, positions: nnx.merge(graphdef, params)(tokens, positions)[0]
    step = lambda params, tokens, positions, cache: nnx.merge(graphdef, params)(tokens, positions, cache)
    empty = lambda batch, max_len, chunk: nnx.merge(graphdef, params).init_cache(
        batch, max_len, Storage(chunk=chunk)
    )
    params = jax.tree.map(jnp.asarray, params)
    return Model(attention, graphdef, params, quick_jit_of(forward), quick_jit_of(step), functools.cache(empty))


@pytest.fixture(scope="session")
def model(variant) -> Model:
    """A decoder of every variant in turn: two layers of width 23, 29 tokens of vocabulary."""
    return make_model(variant)


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], Model]:
    """Function to get the decoder of a variant by its name."""
    return lambda name: make_model(VARIANTS[name])


@pytest.fixture(scope="session")
def draw_params() -> Callable[[Callable[[], nnx.Module]], tuple[nnx.GraphDef, Any]]:
    """Function to get a new module's graph definition, and random parameters for it."""
    return drawn


@jax.tree_util.register_static
@dataclass(frozen=True)
class Zeros(Codec):
    """Forgets what it is given.

    Not by constants: XLA:CPU 0.10.2 now and then makes NaN of a fused product with a broadcast zero.
    """

    def encode(self, x):
        return x

    def decode(self, stored, dtype):
        return (0 * stored).astype(dtype)

    def bits_per_token(self, heads, features, element_bits):
        return heads * features * element_bits


@pytest.fixture(scope="session")
def zeros() -> Codec:
    """A codec that forgets what it is given."""
    return Zeros()


@pytest.fixture(scope="session")
def build() -> Callable[..., Attention]:
    """Function to build one attention layer of width 23, no parameter of it constant."""

    @functools.cache
    def build_layer(config: AttentionConfig) -> Attention:
        return nnx.merge(*drawn(lambda: config.build(WIDTH, 1.0, jax.random.key(0))))

    return build_layer


@pytest.fixture(scope="session")
def oracle() -> Callable[[Attention, np.ndarray], np.ndarray]:
    """Function to compute a layer's result in float64 NumPy, from its weights, at positions 0 ... T-1."""
    return primer_layer


def primer_layer(module: Any, x_BTD: np.ndarray) -> np.ndarray:
    params = nnx.split(module)[1]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    weights = {_plain_name(path[0].key): np.asarray(leaf, np.float64) for path, leaf in leaves}
    config, x_BTD = module.config, np.asarray(x_BTD, np.float64)
    if isinstance(config, Grouped):
        return primer.grouped_attention_layer(x_BTD, weights, config.rope_theta)
    if isinstance(config, LowRank):
        return primer.low_rank_layer(x_BTD, weights, config.position, config.rope_theta)
    assert isinstance(config, Latent)
    weights["kv_up"] = np.concatenate([weights.pop("k_up"), weights.pop("v_up")], axis=-1)
    return primer.mla_layer(x_BTD, weights, config.rope_theta, config.rope_interleaved)


def _plain_name(attribute: str) -> str:
    """`k_bias` of `k_bias_KH`, and `q_norm` of the module `q_norm`."""
    head, _, tail = attribute.rpartition("_")
    return head if tail.isupper() else attribute


@pytest.fixture(scope="session")
def largest_array() -> Callable[..., int]:
    """Function to find the elements of the largest array in a jitted function's program, before and after XLA."""

    def largest(jitted: Any, *args: Any) -> int:
        lowered = jitted.lower(*args)
        dims = re.findall(r"tensor<((?:\d+x)+)[a-z]", lowered.as_text())
        dims += re.findall(r"[a-z]\d+\[([\d,]+)\]", lowered.compile().as_text())
        return max(math.prod(int(d) for d in re.findall(r"\d+", shape)) for shape in dims)

    return largest


@pytest.fixture(scope="session")
def error() -> Callable[[Any, Any], float]:
    """Function to measure the largest error relative to the standard deviation of what is expected."""

    def relative_error(actual: Any, expected: Any) -> float:
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert actual.shape == expected.shape
        return float(np.abs(actual - expected).max() / expected.std())

    return relative_error


@pytest.fixture
def offline(monkeypatch):
    """No host name resolves, and no proxy is set."""

    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
