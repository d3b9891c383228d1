"""The chunked cross-entropy against NumPy in float64 and against plain autodiff.

B batch, T tokens, D width, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.losses import CHUNK, cross_entropy, token_nats

VOCAB, WIDTH = 29, 7
SHAPES = pytest.mark.parametrize("shape", [(3, 7), (2, 256), (3, 512), (5, 103)], ids=str)


def batch(shape, spread=1.0):
    rng = np.random.default_rng(0)
    x_BTD = spread * rng.standard_normal((*shape, WIDTH))
    w_VD = rng.standard_normal((VOCAB, WIDTH))
    return x_BTD.astype(np.float32), w_VD.astype(np.float32), rng.integers(0, VOCAB, shape, np.int32)


def solved(x_BTD, w_VD, targets_BT):
    """Loss and gradients in float64: d loss / d logits = (softmax - one-hot) / tokens."""
    x_ND, w_VD, targets_N = (
        x_BTD.reshape(-1, WIDTH).astype(np.float64),
        w_VD.astype(np.float64),
        targets_BT.ravel(),
    )
    logits_NV = x_ND @ w_VD.T
    logits_NV -= logits_NV.max(-1, keepdims=True)
    logp_NV = logits_NV - np.log(np.exp(logits_NV).sum(-1, keepdims=True))
    dlogits_NV = (np.exp(logp_NV) - np.eye(VOCAB)[targets_N]) / targets_N.size
    loss = -logp_NV[np.arange(targets_N.size), targets_N].mean()
    return loss, (dlogits_NV @ w_VD).reshape(x_BTD.shape), dlogits_NV.T @ x_ND


def test_the_shapes_cover_less_than_a_chunk_one_several_and_a_filled_up_one():
    assert [divmod(size, CHUNK) for size in (3 * 7, 2 * 256, 3 * 512, 5 * 103)] == [
        (0, 21),
        (1, 0),
        (3, 0),
        (1, 3),
    ]


@SHAPES
def test_loss_and_gradients(shape, error, quick_jit):
    x_BTD, w_VD, targets_BT = batch(shape)
    loss, dx_BTD, dw_VD = solved(x_BTD, w_VD, targets_BT)
    assert float(quick_jit(cross_entropy)(x_BTD, w_VD, targets_BT)) == pytest.approx(loss, rel=2e-6)
    thrice = lambda x, w: 3.0 * cross_entropy(x, w, targets_BT)
    value, (got_x, got_w) = quick_jit(jax.value_and_grad(thrice, argnums=(0, 1)))(x_BTD, w_VD)
    assert float(value) == pytest.approx(3 * loss, rel=2e-6)
    assert error(got_x, 3 * dx_BTD) < 5e-6
    assert error(got_w, 3 * dw_VD) < 5e-6


def test_gradients_are_those_of_plain_autodiff(error, quick_jit):
    x_BTD, w_VD, targets_BT = batch((2, 256))

    def plain(x, w):
        logp = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", x, w))
        return -jnp.take_along_axis(logp, targets_BT[..., None], axis=-1).mean()

    ours = quick_jit(jax.grad(lambda x, w: cross_entropy(x, w, targets_BT), argnums=(0, 1)))(x_BTD, w_VD)
    theirs = quick_jit(jax.grad(plain, argnums=(0, 1)))(x_BTD, w_VD)
    assert max(error(a, b) for a, b in zip(ours, theirs)) < 5e-6


def test_large_logits_stay_finite():
    x_BTD, w_VD, targets_BT = batch((3, 7), spread=1e4)
    loss, _, _ = solved(x_BTD, w_VD, targets_BT)
    assert float(cross_entropy(x_BTD, w_VD, targets_BT)) == pytest.approx(loss, rel=1e-5)


def test_bfloat16(error, quick_jit):
    x_BTD, w_VD, targets_BT = batch((2, 256))
    grad = jax.value_and_grad(lambda x, w: cross_entropy(x, w, targets_BT), argnums=(0, 1))
    value, (got_x, got_w) = quick_jit(grad)(jnp.asarray(x_BTD, jnp.bfloat16), jnp.asarray(w_VD, jnp.bfloat16))
    loss, dx_BTD, dw_VD = solved(x_BTD, w_VD, targets_BT)
    assert (value.dtype, got_x.dtype, got_w.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    assert float(value) == pytest.approx(loss, rel=0.01)
    assert max(error(got_x, dx_BTD), error(got_w, dw_VD)) < 0.15


@pytest.mark.parametrize("tokens", [1024, 1021])
def test_logits_of_a_batch_are_never_held(tokens):
    """8 x 1,024 tokens x 499 of vocabulary are 16 MB of logits; a chunk's are 1 MB."""
    x, w, targets = jnp.zeros((8, tokens, WIDTH)), jnp.zeros((499, WIDTH)), jnp.zeros((8, tokens), jnp.int32)
    run = jax.jit(jax.grad(lambda x, w: cross_entropy(x, w, targets), argnums=(0, 1)))
    memory = run.lower(x, w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.3 * 8 * 1024 * 499 * 4


def test_of_equal_logits_the_first_is_the_likeliest():
    """As argmax has it: a model that says nothing is right about one token, not about all."""
    x_BTD, w_VD = jnp.zeros((1, 5, 3)), jnp.ones((7, 3))
    nats_BT, top_BT = token_nats(x_BTD, w_VD, jnp.array([[0, 1, 6, 0, 3]]))
    assert top_BT.tolist() == [[True, False, False, True, False]]
    np.testing.assert_allclose(nats_BT, math.log(7), rtol=1e-6)


def test_likeliest_tokens_and_nats_are_those_of_numpy():
    """Over several chunks, the last one partly filled, with many ties."""
    rng = np.random.default_rng(0)
    x_BTD, w_VD = rng.integers(-1, 2, (2, 301, 2)), rng.integers(-1, 2, (11, 2))
    targets_BT = rng.integers(0, 11, (2, 301))
    nats_BT, top_BT = token_nats(jnp.float32(x_BTD), jnp.float32(w_VD), jnp.asarray(targets_BT, jnp.int32))
    logits_BTV = (x_BTD @ w_VD.T).astype(np.float64)
    np.testing.assert_array_equal(top_BT, logits_BTV.argmax(-1) == targets_BT)
    right_BT = np.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
    np.testing.assert_allclose(nats_BT, np.log(np.exp(logits_BTV).sum(-1)) - right_BT, rtol=1e-5)
