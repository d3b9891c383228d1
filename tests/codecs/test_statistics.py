import numpy as np
import pytest

from kvjax.codecs.statistics import ArrayStatistics, Moments

K, T, F = 2, 30, 4


def moments(x_KTF):
    x_TF = np.concatenate(list(x_KTF), axis=1)
    outer = np.stack([x.T @ x for x in x_KTF])
    return Moments(x_KTF.shape[1], x_KTF.sum(1), outer, x_TF.T @ x_TF, float(np.abs(x_KTF).max()))


@pytest.fixture(scope="module", name="x_KTF")
def x():
    return np.random.default_rng(0).standard_normal((K, T, F)) + np.arange(F)


def test_what_sums_mean(x_KTF):
    """Against NumPy's means and covariances of the tokens, heads apart and side by side."""
    m = moments(x_KTF)
    np.testing.assert_allclose(m.mean, x_KTF.mean(1))
    for k in range(K):
        np.testing.assert_allclose(m.covariance[k], np.cov(x_KTF[k].T, bias=True), atol=1e-12)
        np.testing.assert_allclose(m.second[k], np.cov(x_KTF[k].T, bias=True) + np.outer(m.mean[k], m.mean[k]))
    side_TF = np.concatenate(list(x_KTF), axis=1)
    np.testing.assert_allclose(m.joint_mean, side_TF.mean(0))
    np.testing.assert_allclose(m.joint_covariance, np.cov(side_TF.T, bias=True), atol=1e-12)
    np.testing.assert_allclose(m.joint_second, side_TF.T @ side_TF / T)


def test_sums_of_parts_are_those_of_all(x_KTF):
    together, whole = moments(x_KTF[:, :7]) + moments(x_KTF[:, 7:]), moments(x_KTF)
    assert (together.count, together.amax) == (T, whole.amax)
    for name in ("total", "outer", "cross"):
        np.testing.assert_allclose(getattr(together, name), getattr(whole, name))


def test_first_tokens_count_only_if_asked_for(x_KTF):
    array = ArrayStatistics(moments(9 + x_KTF[:, :1]), moments(x_KTF[:, 1:]), None, None)
    np.testing.assert_allclose(array.moments(sinks=False).mean, x_KTF[:, 1:].mean(1))
    np.testing.assert_allclose(array.moments(sinks=True).mean, x_KTF.mean(1) + 9 / T)


def test_arrays_without_heads(x_KTF):
    m = Moments(T, x_KTF[0].sum(0), x_KTF[0].T @ x_KTF[0], None, 1.0)
    np.testing.assert_allclose((m + m).covariance, np.cov(x_KTF[0].T, bias=True), atol=1e-12)
    with pytest.raises(ValueError, match="joint=True must be left out for an array without heads"):
        m.joint_covariance  # noqa: B018


def test_no_tokens_have_no_mean():
    with pytest.raises(ValueError, match="count=0 must be at least 1"):
        Moments(0, np.zeros(F), np.zeros((F, F)), None, 0.0).mean  # noqa: B018
