import numpy as np
import pytest

from kvjax.codecs.rotations import haar, haar_matrices, hadamard, hadamard_matrix

# Orders 2^k, and 2^k (q + 1) for the primes 11, 19, 23, 43, 47, 59, 67, 71, 79, 83 that are 3 modulo 4.
ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 32, 40, 44, 48, 60, 64, 68, 72, 80, 84, 88, 96]


def test_hadamard_matrices_have_orthogonal_rows_of_signs():
    for n in [*ORDERS, 128, 160, 192, 576]:
        matrix = hadamard_matrix(n)
        assert matrix.shape == (n, n) and (np.abs(matrix) == 1).all()
        np.testing.assert_array_equal(matrix @ matrix.T, n * np.eye(n))


def test_only_known_orders_are_taken():
    for n in range(1, 97):
        if n not in ORDERS:
            with pytest.raises(ValueError, match=f"n={n} must be the order of a known Hadamard matrix"):
                hadamard(n)
    with pytest.raises(ValueError, match=r"n=100 .* nearest: 96 and 104"):
        hadamard(100)
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        hadamard(0)


def test_hadamard_spreads_one_outlier_and_keeps_lengths():
    x = np.zeros((1, 2, 3, 12), np.float32)
    x[..., 5] = 6.0
    z = np.asarray(hadamard(12).apply(x))
    np.testing.assert_allclose(np.abs(z), 6.0 / np.sqrt(12), rtol=1e-6)
    np.testing.assert_allclose(hadamard(12).undo(z), x, atol=1e-5)


def test_haar_is_orthogonal_and_of_its_seed():
    down = np.asarray(haar(24, seed=3).down, np.float64)
    np.testing.assert_allclose(down @ down.T, np.eye(24), atol=1e-6)
    x = np.random.default_rng(0).standard_normal((1, 2, 24)).astype(np.float32)
    np.testing.assert_allclose(haar(24, seed=3).undo(haar(24, seed=3).apply(x)), x, atol=1e-5)
    assert np.abs(down - np.asarray(haar(24, seed=4).down)).max() > 0.1


def test_haar_is_uniform():
    """Its trace has mean 0 and variance 1 in every dimension; without the signs fixed, the mean is off by one."""
    traces = np.trace(haar_matrices(np.random.default_rng(0), (4000,), 4), axis1=-2, axis2=-1)
    assert abs(traces.mean()) < 0.06 and abs(traces.var() - 1.0) < 0.1
    unfixed = np.linalg.qr(np.random.default_rng(0).standard_normal((4000, 4, 4)))[0]
    assert abs(np.trace(unfixed, axis1=-2, axis2=-1).mean()) > 0.5
