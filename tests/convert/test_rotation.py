"""Surgery that changes the cache and not what the model computes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.codecs import Storage
from kvjax.codecs.chain import chain
from kvjax.codecs.integers import Int
from kvjax.codecs.linear import Linear
from kvjax.codecs.rotations import haar, hadamard
from kvjax.convert import rotate_values

TOKENS, POSITIONS = (
    np.arange(24, dtype=np.int32).reshape(2, 12) % 29,
    np.tile(np.arange(12, dtype=np.int32), (2, 1)),
)


def per_head(heads):
    maps = [haar(10, seed) for seed in range(heads)]
    stack = lambda name: jnp.stack([getattr(map, name) for map in maps])
    return Linear(stack("down"), stack("up"), jnp.zeros((heads, 10)))


@pytest.mark.parametrize("name", ["mha", "gqa3", "mqa", "gqa_norm_bias"])
def test_the_same_logits_from_turned_values(name, model_of, error):
    model = model_of(name)
    heads = model.attention.num_kv_heads
    for rotation in (haar(10, 3), per_head(heads)):
        turned = nnx.merge(*rotate_values(model.graphdef, model.params, rotation))
        got, want = turned(TOKENS, POSITIONS)[0], model.forward(model.params, TOKENS, POSITIONS)
        assert error(got, want) < 2e-5
    x_BTD = np.random.default_rng(0).standard_normal((2, 12, 23)).astype(np.float32)
    before, after = (
        nnx.merge(*split).layers[0].attention.project(x_BTD, POSITIONS)[1]
        for split in ((model.graphdef, model.params), nnx.split(turned))
    )
    want_BKTH = np.einsum(
        "BKTH,KHJ->BKTJ", np.asarray(before["v"], np.float64), np.asarray(rotation.down, np.float64)
    )
    assert error(after["v"], want_BKTH) < 2e-6 and error(after["k"], before["k"]) == 0.0


def test_a_folded_rotation_is_the_codecs(model_of, error):
    """4 bits of turned values, turned by the codec while decoding or by the weights: the same rounding."""
    model, rotation = model_of("gqa3"), haar(10, 3)
    turned = rotate_values(model.graphdef, model.params, rotation)
    coded = Storage({"v": chain(rotation, Int(4))}, chunk=16)
    read = lambda split, storage: nnx.merge(*split)(
        TOKENS, POSITIONS, nnx.merge(*split).init_cache(2, 16, storage)
    )[0]
    ours = read(turned, Storage({"v": Int(4)}, chunk=16))
    assert error(ours, read((model.graphdef, model.params), coded)) < 2e-2  # a code or two may flip
    plain = read((model.graphdef, model.params), Storage({"v": Int(4)}, chunk=16))
    assert error(ours, plain) > 5e-2


@pytest.mark.parametrize(
    ("name", "rotation", "message"),
    [
        ("mla", haar(10, 0), "only grouped attention caches values, not LatentAttention"),
        ("mqa", hadamard(8), r"must turn 10 features of a head in place and subtract nothing, not \[8, 8\]"),
        ("mqa", dataclasses.replace(haar(10, 0), mean=jnp.ones(10)), "subtract nothing"),
        ("mqa", dataclasses.replace(haar(10, 0), down=jnp.ones((10, 10))), "must be orthogonal"),
    ],
)
def test_what_cannot_be_folded(name, rotation, message, model_of):
    model = model_of(name)
    with pytest.raises(ValueError, match=message):
        rotate_values(model.graphdef, model.params, rotation)
