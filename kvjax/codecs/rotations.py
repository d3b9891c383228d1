"""Orthogonal maps that are alike for every head: they spread outliers, and leave scores and sums as they are."""

import jax.numpy as jnp
import numpy as np

from kvjax.checks import at_least
from kvjax.codecs.linear import Linear


def haar(n: int, seed: int) -> Linear:
    """A rotation or reflection drawn uniformly (Haar): QR of a Gaussian matrix, signs fixed (Mezzadri 2007)."""
    at_least("n", n, 1)
    return _orthogonal(haar_matrices(np.random.default_rng(seed), (), n))


def hadamard(n: int) -> Linear:
    """The Hadamard matrix of order `n` over sqrt(n), of entries +-1 / sqrt(n).

    Orders are 2^k (Sylvester) and 2^k (q + 1) for primes q = 3 mod 4 (Paley I); ValueError for others.
    """
    at_least("n", n, 1)
    if _paley_base(n) is None:
        below = next(m for m in range(n - 1, 0, -1) if _paley_base(m) is not None)
        above = next(m for m in range(n + 1, 2 * n + 1) if _paley_base(m) is not None)
        raise ValueError(f"n={n} must be the order of a known Hadamard matrix; nearest: {below} and {above}")
    return _orthogonal(hadamard_matrix(n) / np.sqrt(n))


def haar_matrices(rng: np.random.Generator, lead: tuple[int, ...], n: int) -> np.ndarray:
    """Float64 `[*lead, n, n]`, each drawn uniformly from the orthogonal matrices."""
    q, r = np.linalg.qr(rng.standard_normal((*lead, n, n)))
    # Householder's QR leaves signs that depend on the matrix; without them R's diagonal is positive.
    return q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]


def hadamard_matrix(n: int) -> np.ndarray:
    """Float64 `[n, n]` of entries +-1 with orthogonal rows, for the orders of `hadamard`."""
    base = _paley_base(n)
    assert base is not None
    matrix = np.ones((1, 1)) if base == 1 else _paley(base - 1)
    while len(matrix) < n:
        matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def _paley_base(n: int) -> int | None:
    """The smallest order, 1 or q + 1, that n is a power of two times; None if there is none."""
    power = n & -n
    bases = [n // power * 2**k for k in range(power.bit_length())]
    return next((m for m in bases if m == 1 or (m % 4 == 0 and _is_prime(m - 1))), None)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _paley(q: int) -> np.ndarray:
    """I + S for the skew matrix S of quadratic residues modulo q, bordered by 1 and -1 (Paley 1933)."""
    residue = -np.ones(q)
    residue[np.arange(1, q) ** 2 % q] = 1.0
    residue[0] = 0.0
    skew = np.zeros((q + 1, q + 1))
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = residue[(np.arange(q)[:, None] - np.arange(q)) % q]
    return np.eye(q + 1) + skew


def _orthogonal(matrix: np.ndarray) -> Linear:
    down = jnp.asarray(matrix, jnp.float32)
    return Linear(down, down.T, jnp.zeros(len(matrix), jnp.float32))
