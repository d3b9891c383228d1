import dataclasses
import importlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments import cli
from kvjax import accounting
from kvjax.config import Config
from kvjax.data.config import DataConfig
from kvjax.data.tokenizer import ByteTokenizer

# What the cache holds of a token and layer, counted by hand.
ELEMENTS = {
    "gqa2": 2 * 2 * 24,
    "gqa4": 2 * 4 * 24,
    "gqa4_124m": 2 * 4 * 64,
    "low_rank": 96,
    "mha": 2 * 8 * 24,
    "mla": 64 + 16,
    "mqa": 2 * 1 * 24,
    "tiny": 2 * 2 * 16,
}


@pytest.fixture(params=cli.presets())
def named(request) -> tuple[str, Config]:
    return request.param, cli.preset(request.param)


def vocab_size(data: DataConfig) -> int:
    return ByteTokenizer().vocab_size if data.tokenizer == "bytes" else data.vocab_size


def test_every_preset_tells_its_story(named):
    name, config = named
    module = importlib.import_module(f"configs.{name}")
    assert isinstance(module.__doc__, str) and len(module.__doc__) >= 40
    assert isinstance(config, Config)
    assert [v for v in vars(module).values() if isinstance(v, Config)] == [config]


def test_every_preset_builds(named):
    _, config = named
    model = nnx.eval_shape(lambda: config.build(vocab_size(config.data)))
    assert len(model.layers) == config.decoder.depth
    params = nnx.split(model)[1]
    assert params["embedding_VD"].shape == (vocab_size(config.data), config.decoder.width)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_holds_what_is_declared(named, dtype):
    _, config = named
    dtype = jnp.dtype(dtype)
    cache = accounting.abstract_cache(config, vocab_size(config.data), 3, 11, dtype)
    assert cache.bytes_per_token() == accounting.declared_bytes_per_token(config, dtype.itemsize)


@pytest.mark.parametrize("name", ELEMENTS)
def test_declared_bytes_by_hand(name):
    config = cli.preset(name)
    assert accounting.declared_bytes_per_token(config, 2) == ELEMENTS[name] * config.decoder.depth * 2


def test_the_compared_presets_differ_in_attention_alone():
    compared = [cli.preset(name) for name in ("gqa2", "gqa4", "low_rank", "mha", "mla", "mqa")]
    assert len({config.attention for config in compared}) == len(compared)
    rest = {dataclasses.replace(config, attention=compared[0].attention) for config in compared}
    assert rest == {compared[0]}
    assert {config.attention.num_heads for config in compared} == {8}


def test_gpt2_small_sized_preset():
    config = cli.preset("gqa4_124m")
    assert (config.decoder.depth, config.decoder.width) == (12, 768)
    D, L, V = 768, 12, config.data.vocab_size
    attention = D * 64 * (12 + 4 + 4 + 12)
    total = V * D + L * (attention + 3 * D * config.decoder.mlp_width + 2 * D) + D
    measured = accounting.num_parameters(accounting.abstract_params(config, V))
    assert measured == total and 120e6 < total < 130e6


def test_presets_are_the_files(tmp_path):
    names = sorted(p.stem for p in (tmp_path / cli.__file__).parents[1].glob("configs/*.py"))
    assert cli.presets() == [name for name in names if re.fullmatch("[a-z0-9_]+", name) and name != "__init__"]
