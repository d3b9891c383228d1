import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs import fit
from kvjax.codecs.statistics import ArrayStatistics, Moments
from kvjax.layers import rotate
from kvjax.rope import frequencies

K, G, T, S, F, D = 2, 3, 120, 60, 8, 12
RANKS = (1, 3, 7)


def moments(x_KTF):
    x_TF = np.swapaxes(x_KTF, 0, 1).reshape(x_KTF.shape[1], -1)
    outer = np.stack([x.T @ x for x in x_KTF])
    return Moments(x_KTF.shape[1], x_KTF.sum(1), outer, x_TF.T @ x_TF, float(np.abs(x_KTF).max()))


class Case:
    """Keys (or values) with a mean, correlated features and heads; queries and W_O that care for few of them."""

    def __init__(self, jit):
        self.there_and_back = jit(lambda linear, x: linear.undo(linear.apply(x)))
        rng = np.random.default_rng(0)
        mixed = rng.standard_normal((T, K * F)) @ (rng.standard_normal((K * F, K * F)) * 0.7 ** np.arange(K * F))
        x_KTF = np.float32(mixed.reshape(T, K, F).swapaxes(0, 1) + 3 * rng.standard_normal((K, 1, F)))
        self.x_KTF = x_KTF.astype(np.float64)
        self.sinks_KTF = 9 * rng.standard_normal((K, 20, F))
        self.q_KGSF = rng.standard_normal((K, G, S, F)) @ (rng.standard_normal((K, 1, F, F)) * 0.7 ** np.arange(F))
        self.o_KGFD = (0.7 ** np.arange(F))[:, None] * rng.standard_normal((K, G, F, D))
        queries = np.einsum("KGSF,KGSE->KFE", self.q_KGSF, self.q_KGSF) / S
        output = np.einsum("KGFD,KGED->KFE", self.o_KGFD, self.o_KGFD)
        self.stats = ArrayStatistics(moments(self.sinks_KTF), moments(self.x_KTF), queries, output)

    def lost(self, linear, x_KTF=None):
        """x - x^, which the map computes in float32."""
        x_KTF = self.x_KTF if x_KTF is None else x_KTF
        return x_KTF - np.asarray(self.there_and_back(linear, np.float32(x_KTF[None]))[0], np.float64)

    def logit_error(self, linear):
        """Squared error of the scores of a query of every head, per token."""
        return np.square(np.einsum("KGSF,KTF->KGST", self.q_KGSF, self.lost(linear))).sum() / (S * T)

    def output_error(self, linear):
        """Squared error of what every head gives of one value, per token."""
        return np.square(np.einsum("KTF,KGFD->KGTD", self.lost(linear), self.o_KGFD)).sum() / T

    def energy_error(self, linear):
        return np.square(self.lost(linear)).sum() / T


@pytest.fixture(scope="module")
def case(quick_jit):
    return Case(quick_jit)


def tail(values, rank):
    return values[..., rank:].sum()


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("rank", RANKS)
def test_pca_loses_the_tail_of_the_spectrum(case, rank, mean):
    lost = case.energy_error(fit.pca(case.stats, rank, mean=mean))
    assert lost == pytest.approx(tail(fit.eigenvalues(case.stats, "pca", mean=mean), rank), rel=1e-5)
    centred = case.x_KTF - case.x_KTF.mean(1, keepdims=True) * mean
    assert lost == pytest.approx(tail(np.linalg.svd(centred, compute_uv=False) ** 2 / T, rank), rel=1e-5)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("rank", RANKS)
def test_query_aware_attains_the_bound_for_scores(case, rank, mean):
    """Eckart & Young's, of the matrix of all scores that a kv head's tokens get; no other kind is below it."""
    centred = case.x_KTF - case.x_KTF.mean(1, keepdims=True) * mean
    scores = case.q_KGSF.reshape(K, G * S, F) @ centred.swapaxes(1, 2)
    bound = tail(np.linalg.svd(scores, compute_uv=False) ** 2, rank) / (S * T)
    error = case.logit_error(fit.query_aware(case.stats, rank, mean=mean))
    assert error == pytest.approx(bound, rel=1e-4)
    assert bound == pytest.approx(tail(fit.eigenvalues(case.stats, "query", mean=mean), rank), rel=1e-5)
    for kind in set(fit.KINDS) - {"query", "random"}:
        assert error < case.logit_error(fit.fit(kind, case.stats, rank, mean=mean))
    assert error < case.logit_error(fit.random_orthogonal(case.stats, rank, mean=mean, seed=0))


def test_query_aware_is_kq_svd(case):
    """The other closed form: A = K^+ W, B = K^T W with W the top right singular vectors of the scores."""
    linear = fit.query_aware(case.stats, 3, mean=False)
    for k in range(K):
        scores = case.q_KGSF[k].reshape(G * S, F) @ case.x_KTF[k].T
        w = np.linalg.svd(scores, full_matrices=False)[2][:3].T
        expected = np.linalg.pinv(case.x_KTF[k]) @ w @ w.T @ case.x_KTF[k]
        np.testing.assert_allclose(np.float64(linear.down[k]) @ np.float64(linear.up[k]), expected, atol=1e-4)


@pytest.mark.parametrize("rank", RANKS)
def test_output_weighted_attains_the_bound_for_outputs(case, rank):
    centred = case.x_KTF - case.x_KTF.mean(1, keepdims=True)
    through = centred @ np.swapaxes(case.o_KGFD, 1, 2).reshape(K, F, G * D)
    bound = tail(np.linalg.svd(through, compute_uv=False) ** 2, rank) / T
    error = case.output_error(fit.output_weighted(case.stats, rank))
    assert error == pytest.approx(bound, rel=1e-4)
    assert bound == pytest.approx(tail(fit.eigenvalues(case.stats, "output"), rank), rel=1e-5)
    assert error < case.output_error(fit.pca(case.stats, rank))


def test_key_query_spans_the_directions_of_keys_and_queries_stacked(case):
    linear = fit.key_query(case.stats, 3, mean=False)
    for k in range(K):
        stacked = np.concatenate([case.x_KTF[k] / np.sqrt(T), *case.q_KGSF[k] / np.sqrt(S)])
        values, top = np.linalg.svd(stacked)[1:]
        np.testing.assert_allclose(linear.down[k] @ linear.up[k], top[:3].T @ top[:3], atol=1e-5)
        np.testing.assert_allclose(fit.eigenvalues(case.stats, "keyquery", mean=False)[k], values**2)


def test_query_diagonal_is_query_aware_for_queries_of_uncorrelated_features(case):
    apart = dataclasses.replace(case.stats, queries=case.stats.queries * np.eye(F))
    for stats in (case.stats, apart):  # it never sees the correlations
        diagonal, full = fit.query_diagonal(stats, 3), fit.query_aware(apart, 3)
        np.testing.assert_allclose(diagonal.down @ diagonal.up, full.down @ full.up, atol=1e-4)
    assert case.logit_error(fit.query_diagonal(case.stats, 3)) < case.logit_error(fit.pca(case.stats, 3))


def test_random_loses_its_share_and_more_than_pca(case):
    stats = case.stats
    errors = np.array([case.energy_error(fit.random_orthogonal(stats, 3, seed=seed)) for seed in range(60)])
    assert errors.min() > case.energy_error(fit.pca(stats, 3))
    expected = tail(fit.eigenvalues(stats, "random"), 3)
    assert expected == pytest.approx(np.square(case.x_KTF - case.x_KTF.mean(1, keepdims=True)).sum() / T * 5 / 8)
    assert abs(errors.mean() - expected) < 4 * errors.std() / np.sqrt(60)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("kind", fit.KINDS)
def test_full_rank_is_the_identity(case, kind, joint):
    """Even where queries and outputs leave directions, or a whole head, unread."""
    unread = np.zeros((K, F, F))
    unread[0, :2, :2] = [[2.0, 1.0], [1.0, 1.0]]
    singular = dataclasses.replace(case.stats, queries=unread, output=unread)
    seed = 5 if kind == "random" else None
    for stats in (case.stats, singular):
        for mean in (True, False):
            linear = fit.fit(kind, stats, K * F if joint else F, mean=mean, joint=joint, seed=seed)
            assert np.abs(case.lost(linear)).max() < 2e-6 * np.abs(case.x_KTF).max()


def test_joint_projections_lose_less_at_equal_total_rank(case):
    for kind, error in (("pca", case.energy_error), ("query", case.logit_error), ("output", case.output_error)):
        together = error(fit.fit(kind, case.stats, K * 3, joint=True))
        assert together == pytest.approx(tail(fit.eigenvalues(case.stats, kind, joint=True), K * 3), rel=1e-4)
        assert together < error(fit.fit(kind, case.stats, 3))


def test_sinks_are_fitted_only_if_asked_for(case):
    everything = np.concatenate([case.sinks_KTF, case.x_KTF], axis=1)
    for sinks, x_KTF in ((False, case.x_KTF), (True, everything)):
        lost = np.square(case.lost(fit.pca(case.stats, 3, sinks=sinks), x_KTF)).sum() / x_KTF.shape[1]
        assert lost == pytest.approx(tail(fit.eigenvalues(case.stats, "pca", sinks=sinks), 3), rel=1e-5)


def test_arrays_without_heads(case):
    part = moments(case.x_KTF[:1])
    part = Moments(part.count, part.total[0], part.outer[0], None, part.amax)
    stats = ArrayStatistics(part, part, case.stats.queries[0], None)
    for kind in ("pca", "query"):
        alone, among = fit.fit(kind, stats, 3), fit.fit(kind, case.stats, 3)
        assert alone.down.shape == (F, 3)
        np.testing.assert_allclose(alone.down @ alone.up, among.down[0] @ among.up[0], atol=1e-5)
        np.testing.assert_allclose(alone.mean, among.mean[0], rtol=1e-6)


def test_rope_averaged_is_the_mean_over_distances(quick_jit):
    """Against queries that `rotate` turns."""
    rng = np.random.default_rng(1)
    q_SF = rng.standard_normal((50, F)) @ rng.standard_normal((F, F))
    weights = fit.causal_distances(40)
    np.testing.assert_allclose(weights[[0, 39]], [40 / 820, 1 / 820])
    averaged = fit.rope_averaged(q_SF.T @ q_SF / 50, frequencies(100.0, F), weights)
    copies_SDF = np.repeat(np.float32(q_SF[:, None]), 40, axis=1)
    turned_SDF = np.float64(quick_jit(lambda q: rotate(q, jnp.arange(40), 100.0))(copies_SDF))
    expected = np.einsum("D,SDF,SDE->FE", weights, turned_SDF, turned_SDF) / 50
    np.testing.assert_allclose(averaged, expected, atol=1e-4)
    # What it is for: the mean square of scores that a key at position 0 gets, of queries as far behind it.
    k_F = rng.standard_normal(F)
    scores = weights @ np.square(turned_SDF @ k_F).mean(0)
    assert k_F @ averaged @ k_F == pytest.approx(scores, rel=1e-4)


def test_only_fast_pairs_are_averaged_to_a_diagonal():
    """Over 4,000 distances; .0013 and .476 have been measured of another matrix of this kind."""
    x = np.random.default_rng(0).standard_normal((64, 64))
    averaged = fit.rope_averaged(x @ x.T, frequencies(1e4, 64), np.full(4000, 1 / 4000))

    def off_diagonal(pairs):
        part = averaged.reshape(2, 32, 2, 32)[:, :pairs, :, :pairs].reshape(2 * pairs, 2 * pairs)
        diagonal = np.diagonal(part)
        return np.linalg.norm(part - np.diag(diagonal)) / np.linalg.norm(diagonal)

    assert off_diagonal(8) < 0.002
    assert off_diagonal(32) > 0.2
    diagonal = np.diagonal(averaged).reshape(2, 32)[:, :8]
    halved = np.diagonal(x @ x.T).reshape(2, 32)[:, :8].mean(0)  # half of E |q_j|^2, for both of a pair
    np.testing.assert_allclose(diagonal, np.stack([halved, halved]), rtol=5e-3)


@pytest.mark.parametrize(
    ("kind", "rank", "options", "message"),
    [
        ("pcaa", 3, {}, "kind='pcaa' is unknown; did you mean 'pca'?"),
        ("pca", 0, {}, "rank=0 must be at least 1 and at most 8, the features of a token's vector"),
        ("pca", 9, {}, "rank=9 must be at least 1 and at most 8, the features of a token's vector"),
        ("pca", 17, {"joint": True}, "rank=17 must be at least 1 and at most 16, the features of all heads"),
        ("query", 3, {}, "kind='query' needs statistics of queries, which this array lacks; choose pca or random"),
        ("querydiag", 3, {}, "kind='querydiag' needs statistics of queries, which this array lacks"),
        ("output", 3, {}, "kind='output' needs statistics of output that are not all 0; choose pca or random"),
        ("random", 3, {}, "seed=None must be given with kind='random'"),
        ("pca", 3, {"seed": 1}, "seed=1 must be left out with kind='pca'"),
    ],
)
def test_what_makes_no_sense_is_refused(case, kind, rank, options, message):
    stats = dataclasses.replace(case.stats, queries=None, output=np.zeros((K, F, F)))
    with pytest.raises(ValueError) as error:
        fit.fit(kind, stats, rank, **options)
    assert str(error.value).startswith(message)


def test_maps_without_tokens_or_heads_are_refused(case):
    none = Moments(0, np.zeros((K, F)), np.zeros((K, F, F)), np.zeros((K * F, K * F)), 0.0)
    with pytest.raises(ValueError, match="count=0 must be at least 1"):
        fit.pca(dataclasses.replace(case.stats, rest=none), 3)
    alone = Moments(5, np.ones(F), np.eye(F), None, 1.0)
    with pytest.raises(ValueError, match="joint=True must be left out for an array without heads"):
        fit.pca(ArrayStatistics(alone, alone, None, None), 3, joint=True)
