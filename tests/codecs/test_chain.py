from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs import Codec, Exact
from kvjax.codecs.base import Storage
from kvjax.codecs.chain import Projected, chain
from kvjax.codecs.linear import Linear
from kvjax.codecs.rotations import haar, hadamard

B, K, T, F, R = 2, 3, 4, 16, 8


@jax.tree_util.register_static
@dataclass(frozen=True)
class Fourths(Codec):
    """Multiples of a quarter from -2 to 1.75, as codes of 4 bits; two tokens at a time."""

    group = 2
    code_bits: ClassVar[dict[str, int]] = {"code": 4}

    def encode(self, x):
        return {"code": (jnp.clip(jnp.round(4 * x), -8, 7) + 8).astype(jnp.uint8)}

    def decode(self, stored, dtype):
        return ((stored["code"].astype(jnp.float32) - 8) / 4).astype(dtype)

    def bits_per_token(self, heads, features, element_bits):
        return heads * features * element_bits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaled(Codec):
    """Has a leaf."""

    scale: jax.Array

    def encode(self, x):
        return x / self.scale

    def decode(self, stored, dtype):
        return (stored * self.scale).astype(dtype)

    def bits_per_token(self, heads, features, element_bits):
        return heads * features * element_bits


@pytest.fixture(name="x_BKTF")
def x():
    return np.random.default_rng(0).standard_normal((B, K, T, F)).astype(np.float32)


@pytest.fixture
def narrow():
    """A projection per head to half the features, its basis orthonormal, with a mean."""
    rng = np.random.default_rng(1)
    down = np.linalg.qr(rng.standard_normal((K, F, F)))[0][..., :R].astype(np.float32)
    mean = rng.standard_normal((K, F)).astype(np.float32)
    return Linear(jnp.asarray(down), jnp.asarray(down.swapaxes(1, 2)), jnp.asarray(mean))


def test_a_chain_does_its_steps_one_by_one(x_BKTF, narrow, quick_jit):
    codec = chain(narrow, hadamard(R), Fourths())
    down, mean, turn = np.float64(narrow.down), np.float64(narrow.mean), np.float64(hadamard(R).down)
    z = (np.einsum("BKTF,KFR->BKTR", x_BKTF - mean[:, None], down) @ turn).clip(-2, 1.75)
    stored = quick_jit(lambda codec, x: codec.encode(x))(codec, x_BKTF)
    assert stored["code"].dtype == jnp.uint8 and stored["code"].shape == (B, K, T, R)
    rounded = np.asarray(stored["code"], np.float64) / 4 - 2
    assert np.abs(rounded - z).max() <= 0.125 + 1e-5  # to the nearest
    expected = np.einsum("BKTR,KFR->BKTF", rounded @ turn.T, down) + mean[:, None]
    decode = quick_jit(lambda codec, stored: codec.decode(stored, jnp.float32))
    np.testing.assert_allclose(decode(codec, stored), expected, atol=1e-5)


def test_what_stands_first_can_be_left_undone(x_BKTF, narrow):
    """Read by `inner`, and then undone by `linear`, what is stored is what the chain decodes."""
    codec = chain(narrow, haar(R, seed=0), Fourths())
    assert codec.inner == Fourths()
    stored = codec.encode(x_BKTF)
    apart = codec.linear.undo(codec.inner.decode(stored, jnp.float32))
    np.testing.assert_array_equal(apart, codec.decode(stored, jnp.float32))


def test_a_chain_of_full_rank_is_the_identity(x_BKTF):
    codec = chain(haar(F, seed=0), hadamard(F))
    stored = codec.encode(x_BKTF.astype(jnp.bfloat16))
    assert stored.dtype == jnp.float32  # z is kept as exactly as it was computed
    assert np.abs(stored - x_BKTF).max() > 1.0
    np.testing.assert_allclose(codec.decode(stored, jnp.float32), x_BKTF.astype(jnp.bfloat16), atol=1e-5)
    assert codec.decode(stored, jnp.bfloat16).dtype == jnp.bfloat16


def test_chains_nest(x_BKTF, narrow):
    at_once, nested = chain(narrow, hadamard(R), Fourths()), chain(narrow, chain(hadamard(R), Fourths()))
    assert nested.inner == Fourths()
    jax.tree.map(np.testing.assert_array_equal, nested, at_once)


def test_storage_sees_the_last_codec_and_training_the_leaves(narrow):
    codec = chain(narrow, Fourths())
    assert (codec.group, codec.code_bits) == (2, {"code": 4})
    storage = Storage({"k": codec, "v": Exact()})
    assert (storage.group, storage.parts, storage.unit) == (2, 2, 4)
    leaves = jax.tree.leaves(chain(narrow, Scaled(jnp.float32(2.0))))
    assert [leaf.shape for leaf in leaves] == [(K, F, R), (K, R, F), (K, F), ()]


def test_a_codec_alone_is_itself():
    assert chain(Fourths()) == Fourths()
    assert isinstance(chain(haar(4, seed=0)), Projected)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((), "chain needs at least one step, a linear map or a codec"),
        ((Fourths(), haar(4, seed=0)), "step 1 of 2, Fourths, must be the last: only maps have steps after"),
        (
            (haar(4, seed=0), Exact(), Fourths()),
            "step 2 of 3, Exact, must be the last: only maps have steps after",
        ),
        ((haar(4, seed=0), hadamard(8)), "a map of 8 features must follow one that gives as many, not 4"),
    ],
)
def test_what_makes_no_chain_is_refused(steps, message):
    with pytest.raises(ValueError) as error:
        chain(*steps)
    assert str(error.value) == message
