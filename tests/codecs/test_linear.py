import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs.linear import Linear

B, K, G, T, F, R = 2, 3, 2, 5, 8, 6
# Shapes of `down`, of `mean`, and whether the projection is joint.
KINDS = {
    "all_alike": ((F, R), (F,), False),
    "alike_but_for_means": ((F, R), (K, F), False),
    "per_head": ((K, F, R), (K, F), False),
    "per_head_but_for_means": ((K, F, R), (F,), False),
    "joint": ((K, F, R), (K, F), True),
}


def draw(down, mean, joint, seed=0):
    """Random, with the pseudo-inverse of `down` as `up`."""
    rng = np.random.default_rng(seed)
    a, mean = rng.standard_normal(down), rng.standard_normal(mean)
    up = np.linalg.pinv(a.reshape(-1, a.shape[-1]) if joint else a)
    up = up.reshape(-1, *down[:2]).swapaxes(0, 1) if joint else up
    return Linear(*(jnp.asarray(leaf, jnp.float32) for leaf in (a, up, mean)), joint)


def by_head(linear, heads=K):
    """down [K, F, R], up [K, R, F], mean [K, F] in float64, whatever is shared repeated."""
    repeat = lambda a, ndim: np.broadcast_to(np.asarray(a, np.float64), (heads, *a.shape[-ndim:]))
    return repeat(linear.down, 2), repeat(linear.up, 2), repeat(linear.mean, 1)


def undone(linear, x_BKTF):
    """z, and x^ of it, head by head in float64."""
    downs, ups, means = by_head(linear)
    z = [(x_BKTF[:, k] - means[k]) @ downs[k] for k in range(K)]
    z = [sum(z)] * K if linear.joint else z
    return z, np.stack([z[k] @ ups[k] + means[k] for k in range(K)], axis=1)


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def linear(request):
    return draw(*request.param)


@pytest.fixture(name="x_BKTF")
def x():
    return np.random.default_rng(1).standard_normal((B, K, T, F)).astype(np.float32)


def test_there_and_back(linear, x_BKTF, quick_jit):
    expected_z, expected = undone(linear, x_BKTF)
    z = quick_jit(Linear.apply)(linear, x_BKTF)
    np.testing.assert_allclose(z, expected_z[0] if linear.joint else np.stack(expected_z, 1), atol=1e-5)
    np.testing.assert_allclose(quick_jit(Linear.undo)(linear, z), expected, atol=1e-4)


def test_arrays_without_heads():
    linear = draw((F, R), (F,), False)
    x_BTF = np.random.default_rng(1).standard_normal((B, T, F)).astype(np.float32)
    down, up, mean = (np.asarray(a, np.float64) for a in (linear.down, linear.up, linear.mean))
    z_BTR = linear.apply(x_BTF)
    np.testing.assert_allclose(z_BTR, (x_BTF - mean) @ down, atol=1e-5)
    np.testing.assert_allclose(linear.undo(z_BTR), (x_BTF - mean) @ down @ up + mean, atol=1e-4)


def test_scores_of_what_is_undone_are_those_of_entered_queries(linear, x_BKTF, quick_jit):
    z, back_BKTF = undone(linear, x_BKTF)
    q_BNTF = np.random.default_rng(2).standard_normal((B, K * G, 4, F)).astype(np.float32)
    q_BNTR, offset_BNT1 = quick_jit(Linear.enter)(linear, q_BNTF)
    for n in range(K * G):
        expected = q_BNTF[:, n] @ back_BKTF[:, n // G].swapaxes(-1, -2)
        scores = np.asarray(q_BNTR[:, n], np.float64) @ z[n // G].swapaxes(-1, -2) + offset_BNT1[:, n]
        np.testing.assert_allclose(scores, expected, atol=2e-4)


def test_sums_of_what_is_undone_are_what_leaves(linear, x_BKTF, quick_jit):
    z, back_BKTF = undone(linear, x_BKTF)
    weights_BNTS = np.random.default_rng(3).random((B, K * G, 4, T))
    mixed_BNTR = np.stack([weights_BNTS[:, n] @ z[n // G] for n in range(K * G)], axis=1)
    expected = np.stack([weights_BNTS[:, n] @ back_BKTF[:, n // G] for n in range(K * G)], axis=1)
    total_BNT1 = weights_BNTS.sum(-1, keepdims=True)
    left = quick_jit(Linear.leave)(linear, jnp.float32(mixed_BNTR), jnp.float32(total_BNT1))
    np.testing.assert_allclose(left, expected, atol=2e-4)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("all_alike", "all_alike"),
        ("all_alike", "per_head_but_for_means"),
        ("alike_but_for_means", "all_alike"),
        ("per_head", "all_alike"),
        ("per_head", "per_head"),
        ("per_head", "joint"),
        ("all_alike", "joint"),
        ("joint", "all_alike"),
    ],
)
def test_one_map_after_another(first, second, x_BKTF, quick_jit):
    """Their product does what they do one by one."""
    one = draw(*KINDS[first])
    down, mean, joint = KINDS[second]
    two = draw((*down[:-2], R, 4), (*mean[:-1], R), joint, seed=9)

    @quick_jit
    def run(one, two, x):
        z, both = two.apply(one.apply(x)), one.then(two)
        return z, both.apply(x), one.undo(two.undo(z)), both.undo(z)

    z, z_at_once, back, back_at_once = run(one, two, x_BKTF)
    np.testing.assert_allclose(z_at_once, z, atol=1e-4)
    np.testing.assert_allclose(back_at_once, back, atol=1e-4)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (KINDS["joint"], ((K, R, R), (K, R), False), "a joint projection leaves no heads"),
        (KINDS["joint"], ((R, R), (K, R), False), "a joint projection leaves no heads"),
        (
            KINDS["per_head"],
            ((F, R), (F,), False),
            f"a map of {F} features must follow one that gives as many, not {R}",
        ),
        (
            KINDS["per_head"],
            ((K + 1, R, R), (K + 1, R), False),
            f"maps that follow each other must be for as many heads, not [{K}, {K + 1}]",
        ),
    ],
)
def test_maps_that_cannot_follow_are_refused(first, second, message):
    with pytest.raises(ValueError) as error:
        draw(*first).then(draw(*second))
    assert str(error.value).startswith(message)
