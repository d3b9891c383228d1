"""The one real model, where it was fetched: that its weights stand in the right order, in figures."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.data.store import data_folder
from kvjax.losses import token_nats
from kvjax.pretrained import load
from kvjax.pretrained.smollm2 import NAME

PARAGRAPH = (
    "The lighthouse stood at the end of a long stone pier, and every evening the keeper climbed its narrow stairs "
    "to light the lamp. In winter the waves broke over the wall and froze on the windows, so that he had to scrape "
    "the ice away before the ships could see the light. He had done this for thirty years, and he knew the sound "
    "of the wind in each of its moods. When the harbour was finally given an electric lamp, the town asked him to "
    "stay on as a guide, and visitors came to hear him talk about the storms he remembered."
)


@pytest.fixture(scope="module")
def model():
    if not (data_folder() / "models" / NAME).is_dir():
        pytest.skip("needs the model in $KVJAX_DATA: python -m experiments.fetch_smollm2")
    return load("smollm2", "float32")


@pytest.fixture(scope="module")
def perplexity(model):
    """Function of parameters."""
    ids = np.array([[model.tokenizer.begin_id, *model.tokenizer.encode(PARAGRAPH)]])

    @jax.jit
    def nats(params):
        decoder = nnx.merge(model.graphdef, params)
        x_BTD, _ = decoder.hidden(jnp.asarray(ids[:, :-1]))
        return token_nats(x_BTD, decoder.unembedding(), jnp.asarray(ids[:, 1:]))[0].mean()

    return lambda params: math.exp(float(nats(params)))


def test_a_paragraph_is_as_likely_as_in_transformers(model, perplexity):
    """32.8539 is what transformers 5.23 gives for the same files."""
    assert perplexity(model.params) == pytest.approx(32.8539, rel=1e-4)


def test_rows_in_the_order_of_the_file_that_was_converted_would_show(model, perplexity):
    """Queries and keys of a head in GGUF's order: neighbours that turn together instead of halves."""
    interleave = lambda w: w.reshape(*w.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(w.shape)
    wrong = jax.tree_util.tree_map_with_path(
        lambda path, w: interleave(w) if "q_DNH" in str(path) or "k_DKH" in str(path) else w, model.params
    )
    assert perplexity(wrong) > 3 * perplexity(model.params)
