"""Choosing tokens, against hand-solved distributions and Hugging Face's filters.

B batch, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.sampling import Sampling, choose, filtered

PROBS_V = np.array([0.05, 0.4, 0.02, 0.25, 0.15, 0.1, 0.03])
LOGITS_V = np.log(PROBS_V) + 1.7


def frequencies(sampling, logits_V=LOGITS_V, draws=20_000):
    logits_BV = jnp.broadcast_to(jnp.asarray(logits_V, jnp.float32), (draws, len(logits_V)))
    keys_B = jax.random.split(jax.random.key(0), draws)
    tokens_B = choose(logits_BV, keys_B, sampling.form, sampling.numbers(len(logits_V)))
    return np.bincount(tokens_B, minlength=len(logits_V)) / draws


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0), range(7)),
        (Sampling(1.0, top_k=1), [1]),
        (Sampling(1.0, top_k=3), [1, 3, 4]),
        (Sampling(1.0, top_k=7), range(7)),
        (Sampling(1.0, top_p=0.39), [1]),
        (Sampling(1.0, top_p=0.41), [1, 3]),
        (Sampling(1.0, top_p=0.79), [1, 3, 4]),
        (Sampling(1.0, top_p=0.81), [1, 3, 4, 5]),
        (Sampling(1.0, min_p=0.3), [1, 3, 4]),
        (Sampling(1.0, min_p=1.0), [1]),
        # top-p of what top-k leaves: 0.4, 0.25 and 0.15 of 0.8
        (Sampling(1.0, top_k=3, top_p=0.8), [1, 3]),
        (Sampling(1.0, top_k=3, top_p=0.82), [1, 3, 4]),
        (Sampling(1.0, top_k=4, top_p=0.95, min_p=0.5), [1, 3]),
    ],
)
def test_frequencies_are_those_of_the_kept_tokens(sampling, kept):
    expected_V = np.where(np.isin(np.arange(7), list(kept)), PROBS_V, 0)
    expected_V /= expected_V.sum()
    found_V = frequencies(sampling)
    assert (np.abs(found_V - expected_V) <= 5 * np.sqrt(expected_V * (1 - expected_V) / 20_000)).all()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_comes_before_the_filters(temperature):
    tempered_V = PROBS_V ** (1 / temperature)
    tempered_V /= tempered_V.sum()
    order = np.argsort(-tempered_V)
    count = int(np.searchsorted(np.cumsum(tempered_V[order]), 0.7)) + 1
    expected_V = np.where(np.isin(np.arange(7), order[:count]), tempered_V, 0)
    expected_V /= expected_V.sum()
    found_V = frequencies(Sampling(temperature, top_p=0.7))
    assert (np.abs(found_V - expected_V) <= 5 * np.sqrt(expected_V * (1 - expected_V) / 20_000)).all()


def test_tokens_tied_with_the_last_kept_are_kept():
    assert (frequencies(Sampling(1.0, top_k=2), np.log([0.4, 0.2, 0.2, 0.1])) > 0).tolist() == [
        True,
        True,
        True,
        False,
    ]


def test_greedy_takes_the_first_of_the_likeliest():
    logits_BV = jnp.array([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    greedy = Sampling()
    assert choose(logits_BV, jax.random.split(jax.random.key(0), 2), greedy.form, {}).tolist() == [1, 0]
    np.testing.assert_array_equal(frequencies(Sampling(1e-4)), np.eye(7)[1])


def test_the_filters_are_those_of_transformers():
    """The kept tokens of random logits, one filter after the other, against Hugging Face's processors."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for temperature, top_k, top_p, min_p in [(0.7, 23, 0.8, 0.05), (1.4, 11, 0.95, 0.0), (1.0, 61, 0.3, 0.2)]:
        logits_BV = 2 * rng.standard_normal((13, 61)).astype(np.float32)
        right = torch.from_numpy(logits_BV)
        for warper in (
            transformers.TemperatureLogitsWarper(temperature),
            transformers.TopKLogitsWarper(top_k),
            transformers.TopPLogitsWarper(top_p),
            *([transformers.MinPLogitsWarper(min_p)] if min_p else []),
        ):
            right = warper(None, right)
        sampling = Sampling(temperature, top_k, top_p, min_p)
        kept_BV = filtered(jnp.asarray(logits_BV), sampling.form, sampling.numbers(61)) > -1e29
        np.testing.assert_array_equal(kept_BV, np.isfinite(right.numpy()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be a finite number"),
        ({"temperature": float("inf")}, "temperature=inf must be a finite number"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1 must be above 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p=nan must be above 0 and at most 1"),
        ({"min_p": -0.1}, "min_p=-0.1 must be at least 0 and at most 1"),
        ({"min_p": 1.5}, "min_p=1.5 must be at least 0 and at most 1"),
    ],
)
def test_impossible_rules(fields, message):
    with pytest.raises(ValueError) as error:
        Sampling(**fields)
    assert message in str(error.value)
