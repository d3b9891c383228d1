"""B batch, T tokens, V vocabulary."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.codecs import Codec, Exact
from kvjax.decoder import Decoder, DecoderConfig, decodable
from kvjax.generate import generate

VOCAB = 29
PROMPT_BT = np.random.default_rng(0).integers(0, VOCAB, (3, 5)).astype(np.int32)
VARIANTS = {
    "grouped": Grouped(6, 2, head_dim=10),
    "low_rank": LowRank(6, head_dim=4, rank=11),
    "mla": Latent(6, rank=13, rope_dim=4, nope_dim=3, value_dim=5),
}


def model_of(attention, **fields):
    config = DecoderConfig(width=23, depth=2, mlp_width=31, output_scale=1.0, **fields)
    graphdef, params = nnx.split(Decoder(config, attention, VOCAB, jax.random.key(2)))
    # Large, so that the tokens generated are not all the same.
    return graphdef, jax.tree.map(lambda a: 3 * a, params)


@pytest.fixture(scope="module")
def gqa():
    return model_of(VARIANTS["grouped"])


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_is_the_argmax_of_forward_passes_without_a_cache(name):
    graphdef, params = model_of(VARIANTS[name])
    # Padded to one length: what comes after a token does not reach it.
    forward = jax.jit(lambda params, tokens_BT: nnx.merge(graphdef, params)(tokens_BT)[0])
    tokens_BT = np.zeros((3, 14), np.int32)
    tokens_BT[:, :5] = PROMPT_BT
    for t in range(5, 14):
        tokens_BT[:, t] = np.asarray(forward(params, tokens_BT))[:, t - 1].argmax(-1)
    made = generate(graphdef, params, PROMPT_BT, 9)
    assert made.dtype == np.int32
    np.testing.assert_array_equal(made, tokens_BT[:, 5:])
    assert len(set(made.ravel().tolist())) > 3


def test_one_token_needs_no_loop(gqa):
    np.testing.assert_array_equal(generate(*gqa, PROMPT_BT, 1), generate(*gqa, PROMPT_BT, 3)[:, :1])


def test_a_scanned_model_generates_once_unrolled(gqa):
    graphdef, params = model_of(VARIANTS["grouped"], scan=True)
    with pytest.raises(ValueError, match=r"decoder\.scan=True cannot decode"):
        generate(graphdef, params, PROMPT_BT, 3)
    np.testing.assert_array_equal(
        generate(*decodable(graphdef, params), PROMPT_BT, 3), generate(*gqa, PROMPT_BT, 3)
    )


def test_sampling_is_a_function_of_the_seed(gqa):
    first, again, other = (generate(*gqa, PROMPT_BT, 11, 1.5, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first.min() >= 0 and first.max() < VOCAB


def test_sampling_follows_the_softmax(gqa):
    """Frequencies of 4,000 first tokens against the probabilities at temperature 2."""
    graphdef, params = gqa
    logits_V = np.asarray(nnx.merge(graphdef, params)(PROMPT_BT[:1])[0], np.float64)[0, -1] / 2.0
    expected_V = np.exp(logits_V - logits_V.max())
    expected_V /= expected_V.sum()
    made = generate(graphdef, params, PROMPT_BT[:1].repeat(4000, 0), 1, 2.0, 7)
    found_V = np.bincount(made[:, 0], minlength=VOCAB) / 4000
    error_V = 5 * np.sqrt(expected_V * (1 - expected_V) / 4000) + 1e-3
    assert (np.abs(found_V - expected_V) < error_V).all()
    assert expected_V.max() < 0.9


def test_every_token_is_drawn_anew(gqa):
    """At this temperature all tokens are alike: one draw for all would repeat a single one."""
    made = generate(*gqa, PROMPT_BT, 20, 1e6)
    assert all(len(set(row)) > 8 for row in made.tolist())
    assert len({tuple(row) for row in made.tolist()}) == len(made)


def test_a_low_temperature_is_greedy(gqa):
    np.testing.assert_array_equal(generate(*gqa, PROMPT_BT, 5, 1e-5), generate(*gqa, PROMPT_BT, 5))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Zero(Codec):
    def encode(self, entry):
        return entry

    def decode(self, stored):
        return jax.tree.map(jnp.zeros_like, stored)


def test_generation_reads_the_cache_through_its_codec(gqa):
    made = generate(*gqa, PROMPT_BT, 8)
    assert (generate(*gqa, PROMPT_BT, 8, codec=Zero()) != made).any()
    np.testing.assert_array_equal(generate(*gqa, PROMPT_BT, 8, codec=Exact(chunk=4)), made)


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        (PROMPT_BT, (0,), "num_tokens=0 must be at least 1"),
        (PROMPT_BT, (3, -0.5), "temperature=-0.5 must be finite and at least 0"),
        (PROMPT_BT, (3, float("nan")), "temperature=nan must be finite and at least 0"),
        (PROMPT_BT, (3, float("inf")), "temperature=inf must be finite and at least 0"),
        (PROMPT_BT[:, :0], (3,), "prompt tokens=0 must be at least 1"),
        (PROMPT_BT + VOCAB, (3,), "must be at least 0 and below the vocabulary size 29"),
        (np.array([[1, VOCAB]]), (3,), "prompt token 29 must be at least 0 and below the vocabulary size 29"),
        (np.array([[1, -1]]), (3,), "prompt token -1 must be at least 0 and below the vocabulary size 29"),
    ],
)
def test_impossible_arguments(gqa, prompt, arguments, message):
    with pytest.raises(ValueError) as error:
        generate(*gqa, prompt, *arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
