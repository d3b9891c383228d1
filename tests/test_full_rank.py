"""Maps of full rank change nothing, in every mode, wherever a text starts: fitted, stored, read, decoded from."""

import numpy as np
import pytest
from flax import nnx

from kvjax.calibrate import calibrate
from kvjax.compress import entries, key_frequencies
from kvjax.data import Corpus
from kvjax.decoder import rope_on_read
from kvjax.recipe_build import build
from kvjax.recipes import parse

START, LENGTH, SLOTS, VOCAB = 57, 11, 256, 29
AFTER = [
    "pca100%",
    "pca100%:nomean",
    "pca100%:joint",
    "random100%",
    "query100%",
    "querydiag100%",
    "haar",
]
CASES = [("gqa3", f"k={kind},v=pca100%") for kind in AFTER]
CASES += [
    ("gqa3", "v=output100%"),
    ("gqa3", "v=random100%:nomean"),
    ("gqa3", "v=pca100%:joint"),
    ("gqa3", "v=haar"),
    ("gqa3", "k=keyquery100%,v=output100%,sinks=2,recent=4"),
]
CASES += [("gqa3", f"k={kind},keys=before_rope") for kind in ("pca100%", "query100%", "pca100%:joint", "haar")]
CASES += [
    ("mla", "latent=query100%,k_rope=hadamard"),
    ("mla", "latent=output100%"),
    ("low_rank", "latent=output100%"),
]
CASES += [("low_rank_none", "latent=query100%"), ("low_rank_split", "latent_k=pca100%,latent_v=output100%")]


@pytest.fixture(scope="module")
def statistics_of(model_of):
    made = {}

    def statistics(name):
        if name not in made:
            model, rng = model_of(name), np.random.default_rng(0)
            ids = rng.integers(0, VOCAB, 8 * 40).astype(np.int32)
            corpus = Corpus(ids, np.arange(9, dtype=np.int64) * 40, np.zeros(8, np.int64))
            made[name] = calibrate(model.graphdef, model.params, corpus, 39, 8 * 39, 4, model="m", data="d")
        return made[name]

    return statistics


@pytest.mark.parametrize(("name", "text"), CASES)
def test_full_rank_is_the_identity(name, text, model_of, statistics_of, error, quick_jit):
    model, recipe = model_of(name), parse(text)
    split = model.graphdef, model.params
    storages = build(recipe, entries(*split, 1, 1), statistics_of(name), frequencies=key_frequencies(*split))
    graphdef, params = rope_on_read(*split) if recipe.keys == "before_rope" else split
    step = quick_jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))
    tokens = np.random.default_rng(1).integers(0, VOCAB, (2, LENGTH)).astype(np.int32)
    positions = np.tile(START + np.arange(LENGTH, dtype=np.int32), (2, 1))
    want, _ = model.feed(model.empty(2, SLOTS, None), tokens, positions, (LENGTH,))
    for lengths in ((LENGTH,), (7, 1, 1, 1, 1)):
        cache, parts, start = nnx.merge(graphdef, params).init_cache(2, SLOTS, storages), [], 0
        for length in lengths:
            now = slice(start, start + length)
            logits, cache = step(params, tokens[:, now], positions[:, now], cache)
            parts.append(np.asarray(logits))
            start += length
        assert error(np.concatenate(parts, axis=1), want) < 1e-4
