"""What only a GPU runs: lowered for CUDA here, and the same code computed on CPU against the CPU form."""

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention import heads


def _qkv(B=2, K=3, G=2, T=70, H=6, V=4):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((B, K, G, T, H), (B, K, T, H), (B, K, T, V))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


def _loss(q, k, v):
    return heads.causal_attention(q, k, v, 0.4).sum()


def test_cuda_program_takes_all_rows_at_once_and_never_repeats_keys():
    q, k, v = _qkv()
    gradient = jax.jit(jax.grad(_loss, argnums=(0, 1, 2)))
    cuda = jax.export.export(gradient, platforms=["cuda"])(q, k, v).mlir_module()
    cpu = jax.export.export(gradient, platforms=["cpu"])(q, k, v).mlir_module()
    assert "stablehlo.while" in cpu  # one (batch, kv head) after the other
    assert "stablehlo.while" not in cuda
    assert "tensor<2x3x2x70x4xf32>" in cuda  # the result's heads
    assert "tensor<2x6x70x6xf32>" not in cuda and "tensor<12x70x6xf32>" not in cuda  # keys, repeated


def test_rows_at_once_equal_rows_one_by_one():
    q, k, v = (a.reshape(6, *a.shape[2:]) for a in _qkv())
    do = jnp.cos(jnp.arange(6 * 2 * 70 * 4, dtype=jnp.float32)).reshape(6, 2, 70, 4)

    def both(over_rows):
        out, lse = over_rows(lambda *row: heads._row_forward(*row, 0.4, heads.CAUSAL))(q, k, v)
        return out, over_rows(lambda *row: heads._row_backward(*row, 0.4, heads.CAUSAL))(q, k, v, out, lse, do)

    at_once = jax.jit(lambda: both(jax.vmap))()
    one_by_one = jax.jit(lambda: both(lambda f: lambda *rows: jax.lax.map(lambda row: f(*row), rows)))()
    for a, b in zip(jax.tree.leaves(at_once), jax.tree.leaves(one_by_one)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
