"""Projections of an array's tokens to fewer dimensions, solved from calibration's sums in float64.

Row vectors: z = (x - mean) A and x^ = z B^T + mean. S is the covariance of x, or with `mean=False`, where
mean is 0, the second moment. K kv heads, F features of a token, R rank, J = F / 2 rotary pairs.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax.checks import one_of
from kvjax.codecs.linear import Linear
from kvjax.codecs.rotations import haar_matrices
from kvjax.codecs.statistics import ArrayStatistics

KINDS = ("pca", "random", "query", "output", "keyquery", "querydiag")

FLOOR = 1e-6
"""Eigenvalues of M^2 are raised to this part of its largest, which keeps B = M^-1 U moderate where calibration's
queries, or W_O, read next to nothing: later queries may."""


def fit(
    kind: str,
    stats: ArrayStatistics,
    rank: int,
    *,
    mean: bool = True,
    sinks: bool = False,
    joint: bool = False,
    seed: int | None = None,
) -> Linear:
    """The map of a kind (see the functions named below) to `rank` dimensions of every head.

    `mean`: subtract the mean before and add it after. `sinks`: fit on the first tokens of windows, too.
    `joint`: one projection of all heads side by side, to `rank` dimensions in all. `seed`: of kind "random".
    ValueError for statistics that the kind needs and the array lacks.
    """
    _, down, up, centre = _solve(kind, stats, mean, sinks, joint, seed)
    F = down.shape[-1]
    if not 1 <= rank <= F:
        of = "all heads" if joint else "a token's vector"
        raise ValueError(f"rank={rank} must be at least 1 and at most {F}, the features of {of}")
    down, up = down[..., :rank], up[..., :rank, :]
    if joint:
        K = stats.rest.total.shape[0]
        down, up = down.reshape(K, -1, rank), up.reshape(rank, K, -1).swapaxes(0, 1)
    float32 = lambda a: jnp.asarray(a, jnp.float32)
    return Linear(float32(down), float32(up), float32(centre.reshape(stats.rest.total.shape)), joint)


def eigenvalues(
    stats: ArrayStatistics, kind: str, *, mean: bool = True, sinks: bool = False, joint: bool = False
) -> np.ndarray:
    """`[K, F]`, `[F]` or jointly `[K F]`, descending: a projection to R dimensions loses the sum of those after R.

    Means over tokens of what the kind minimises: |x - x^|^2 ("pca", and in expectation "random"), the squared
    errors of scores, summed over a query of each head ("query"), of each head's output, summed ("output").
    "querydiag" takes the features of queries for uncorrelated; "keyquery" adds what is lost of the queries.
    """
    return _solve(kind, stats, mean, sinks, joint, seed=0 if kind == "random" else None)[0]


pca = functools.partial(fit, "pca")
"""A = B = the top eigenvectors of S: the least E|x - x^|^2 of all affine maps (Eckart & Young 1936)."""

random_orthogonal = functools.partial(fit, "random")
"""A = B = the first columns of a Haar matrix, another one for every head."""

query_aware = functools.partial(fit, "query")
"""A = M U, B = M^-1 U with M^2 = E q^T q and U the top eigenvectors of M S M: the least squared error of
scores, unmasked and before the softmax (KQ-SVD, arXiv 2512.05916). Centred, scores are meant up to what is the
same for all tokens, which is free where keys are stored as they are scored."""

output_weighted = functools.partial(fit, "output")
"""As `query_aware` with M^2 = sum W_O W_O^T: the least squared error of what heads give through W_O, the
products of different heads left out."""

key_query = functools.partial(fit, "keyquery")
"""A = B = the top eigenvectors of S + E q^T q (Eigen Attention, arXiv 2408.05646)."""

query_diagonal = functools.partial(fit, "querydiag")
"""As `query_aware` with M^2 = diag(E q^2)."""


def rope_averaged(second_q: np.ndarray, frequencies: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """E q^T q of queries turned by random distances: the weight for keys that are rotated only when read.

    A query at distance d behind a key sees the unrotated key by its own unrotated form turned by d. Rotary
    pairs are (j, j + F / 2). `second_q` `[..., F, F]` of unrotated queries, `frequencies` `[J]` radians a
    position, `weights` of the distances 0, 1, ..., which sum to 1.
    """
    J = second_q.shape[-1] // 2
    if frequencies.shape != (J,):
        raise ValueError(f"frequencies={list(frequencies.shape)} must be [{J}], one for each rotary pair")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and np.isclose(weights.sum(), 1.0)):
        raise ValueError(f"weights of sum {weights.sum()} must be probabilities of distances, of sum 1")
    # With c = x_j + i x_(j + J), turning by d is c e^(i d f): products of two c get a mean phase each.
    turns = np.exp(1j * np.outer(np.arange(len(weights)), frequencies.astype(np.float64)))
    weighted = (turns * weights[:, None]).T
    a, b = second_q[..., :J, :J], second_q[..., :J, J:]
    c, d = second_q[..., J:, :J], second_q[..., J:, J:]
    conjugate = (a + d + 1j * (c - b)) * (weighted @ turns.conj())
    plain = (a - d + 1j * (c + b)) * (weighted @ turns)
    plus, minus = (plain + conjugate) / 2, (plain - conjugate) / 2
    top = np.concatenate([plus.real, minus.imag], axis=-1)
    return np.concatenate([top, np.concatenate([plus.imag, -minus.real], axis=-1)], axis=-2)


def causal_distances(context: int) -> np.ndarray:
    """Probabilities `[context]` of the distances between a token and those up to it, all pairs alike."""
    pairs = context - np.arange(context, dtype=np.float64)
    return pairs / pairs.sum()


def _solve(kind: str, stats: ArrayStatistics, mean: bool, sinks: bool, joint: bool, seed: int | None) -> Any:
    """Energies `[..., F]`, A `[..., F, F]`, B^T `[..., F, F]`, best dimension first, and the mean `[..., F]`."""
    one_of("kind", kind, KINDS)
    if (kind == "random") != (seed is not None):
        rule = "be given with" if kind == "random" else "be left out with"
        raise ValueError(f"seed={seed} must {rule} kind={kind!r}")
    moments = stats.moments(sinks)
    if joint:
        second = moments.joint_covariance if mean else moments.joint_second
        centre = moments.joint_mean
    else:
        second = moments.covariance if mean else moments.second
        centre = moments.mean
    centre = centre if mean else np.zeros_like(centre)
    if kind == "random":
        assert seed is not None
        down = haar_matrices(np.random.default_rng(seed), second.shape[:-2], second.shape[-1])
        energy = np.trace(second, axis1=-2, axis2=-1)[..., None] / second.shape[-1]
        return np.broadcast_to(energy, second.shape[:-1]), down, down.swapaxes(-1, -2), centre
    if kind == "pca":
        values, vectors = _descending(second)
        return values, vectors, vectors.swapaxes(-1, -2), centre
    weight = _weight(kind, stats)
    if kind == "keyquery":
        values, vectors = _descending(second + (_block_diagonal(weight) if joint else weight))
        return values, vectors, vectors.swapaxes(-1, -2), centre
    root, inverse = _roots(weight)
    if joint:
        root, inverse = _block_diagonal(root), _block_diagonal(inverse)
    values, vectors = _descending(root @ second @ root)
    return values, root @ vectors, vectors.swapaxes(-1, -2) @ inverse, centre


def _weight(kind: str, stats: ArrayStatistics) -> np.ndarray:
    name = "output" if kind == "output" else "queries"
    weight = stats.output if kind == "output" else stats.queries
    if weight is None:
        raise ValueError(f"kind={kind!r} needs statistics of {name}, which this array lacks; choose pca or random")
    if not weight.any():
        raise ValueError(f"kind={kind!r} needs statistics of {name} that are not all 0; choose pca or random")
    return weight * np.eye(weight.shape[-1]) if kind == "querydiag" else weight


def _descending(symmetric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(symmetric)
    return np.maximum(values[..., ::-1], 0.0), vectors[..., ::-1]  # below 0 by rounding only


def _roots(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """M and M^-1 with M^2 = weight, of full rank."""
    values, vectors = np.linalg.eigh(weight)
    largest = values.max(-1, keepdims=True)
    # A head that nothing reads is as one that is read hardly at all.
    values = np.maximum(values, FLOOR * np.where(largest > 0, largest, largest.max()))
    turned = vectors.swapaxes(-1, -2)
    root = np.sqrt(values)[..., None, :]
    return vectors * root @ turned, vectors / root @ turned


def _block_diagonal(blocks: np.ndarray) -> np.ndarray:
    """`[K F, K F]` of `[K, F, F]`."""
    K, F, _ = blocks.shape
    whole = np.zeros((K, F, K, F))
    whole[np.arange(K), :, np.arange(K)] = blocks
    return whole.reshape(K * F, K * F)
