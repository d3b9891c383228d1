import jax
import jax.numpy as jnp
import pytest

from kvjax import accounting, primer
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.capacity import SHAPES, Shape, Sizes, bytes_text, enough, parse_bytes, variants
from kvjax.codecs import Exact, Storage
from kvjax.codecs.floats import NvFp4
from kvjax.codecs.integers import Int
from kvjax.config import Config
from kvjax.data.config import DataConfig
from kvjax.decoder import DecoderConfig
from kvjax.recipes import parse
from kvjax.slots import nbytes

BF16 = jnp.dtype("bfloat16")
DECODER = DecoderConfig(width=48, depth=3, mlp_width=40, tie_embeddings=False)
SMALL = {
    "gqa": Grouped(6, 2, head_dim=10),
    "mla": Latent(6, rank=13, rope_dim=4, nope_dim=3, value_dim=5),
    "window": Grouped(6, 2, head_dim=10, window=70, num_sinks=3),
}


def config_of(name: str) -> Config:
    return Config(SMALL[name], DECODER, DataConfig(tokenizer="bytes", context=33))


def sizes_of(name: str) -> Sizes:
    return Sizes(Shape.of(config_of(name)), BF16)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("24GB", 24 * 10**9), ("512MiB", 2**29), ("1.5 KiB", 1536), ("2TB", 2 * 10**12)],
)
def test_sizes_are_read(text, size):
    assert parse_bytes("--memory", text) == size


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("80", "80GiB"), ("24gb", "24GB"), ("8gib", "8GiB"), ("7g", "7GiB"), ("much", "80GiB"), ("-1GB", "80GiB")],
)
def test_other_sizes_are_refused(text, nearest):
    with pytest.raises(
        ValueError, match=rf"^--memory='{text}' must be a number and one of KB, .*nearest: {nearest}$"
    ):
        parse_bytes("--memory", text)


def test_nothing_is_no_memory():
    with pytest.raises(ValueError, match="--memory=0 must be at least 1"):
        parse_bytes("--memory", "0GiB")


def test_sizes_are_shown():
    assert [enough(n) for n in (1, 2**20 - 1, 2**20, 5 * 2**30 - 1)] == ["1KiB", "1024KiB", "2MiB", "5GiB"]
    assert [bytes_text(n) for n in (0, 1023, 1024, 2.5 * 2**30)] == ["0 B", "1,023 B", "1.00 KiB", "2.50 GiB"]


def test_weights_of_published_shapes():
    """Parameters as published; one query head a kv head adds 80 * 2 * 8192 * 56 * 128 to the 70B."""
    parameters = {name: Sizes(shape, BF16).weight_bytes / 2 for name, shape in SHAPES.items()}
    assert parameters["llama-7b"] == 6_738_415_616 and parameters["llama2-70b"] == 68_976_648_192
    assert parameters["llama2-70b-mha"] == 68_976_648_192 + 80 * 2 * 8192 * 56 * 128


def test_caches_of_published_shapes():
    """Against the formula in NumPy: 16 bits; a 16-bit scale for each 128; 4 bits and 8 more for each 16."""
    sizes, element_bytes = Sizes(SHAPES["llama2-70b"], BF16), {"bf16": 2, "int8": 130 / 128, "nvfp4": 0.5625}
    live = sum(array.nbytes for array in jax.live_arrays())
    for codec, each in element_bytes.items():
        expected = primer.compute_kv_cache_size(8192, 80, 8, 128, each, 5)
        found = sizes.cache_bytes(sizes.layers(parse(codec)), 5, 8192)
        assert (found.memory, found.slots, found.positions) == (expected, 8192, 5 * 8192 * 4)
    assert sum(array.nbytes for array in jax.live_arrays()) - live < 2**16


RECIPES = {
    "exact": Exact(),
    "int8": Int(8),
    "nvfp4": NvFp4.calibrated(1.0),
    "int8,sinks=4": Storage(Int(8), sinks=4),
    "int8,layers=1": [Storage(Exact()), Storage(Int(8)), Storage(Exact())],
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("recipe", RECIPES)
def test_sizes_are_those_of_the_cache(name, recipe):
    """Of all layers, built together."""
    sizes = sizes_of(name)
    found = sizes.cache_bytes(sizes.layers(parse(recipe)), 5, 256)
    whole = accounting.abstract_cache(config_of(name), 257, 5, 256, BF16, RECIPES[recipe])
    assert (found.memory, found.slots) == (nbytes(whole.memory), whole.max_len)
    assert found.total == nbytes(whole)
    assert sizes.weight_bytes == 2 * accounting.num_parameters(accounting.abstract_params(config_of(name), 257))


def test_fitted_codecs_count_by_their_ranks():
    """5 of 10 features in 16 bits, 6 in 8 bits and a 16-bit scale; half of 20 together, a latent's third."""
    of = lambda name, recipe: (s := sizes_of(name)).cache_bytes(s.layers(parse(recipe)), 1, 256).memory / 256 / 3
    assert of("gqa", "k=pca5+bf16,v=random6+int8") == 2 * (5 * 2 + 6 + 2)
    assert of("gqa", "k=query50%:joint+bf16,v=bf16") == 10 * 2 + 2 * 10 * 2
    assert of("gqa", "k=pca5+bf16,v=bf16,keys=before_rope") == 2 * (5 + 10) * 2
    assert of("mla", "latent=output4+bf16,k_rope=bf16") == (4 + 4) * 2
    assert of("gqa", "k=pca+bf16,v=bf16,budget=75%") == 2 * (5 + 10) * 2
    with pytest.raises(ValueError, match="allocate=water takes what experiments"):
        of("gqa", "pca+bf16,budget=50%,allocate=water")


@pytest.mark.parametrize("name", ["gqa", "mla"])
@pytest.mark.parametrize("recipe", ["exact", "int8", "int8,sinks=4"])
def test_what_fits_is_the_most(name, recipe):
    """One sequence more, or the next number of slots, is more than the memory."""
    sizes, codec, context = sizes_of(name), RECIPES[recipe], 300
    memory = sizes.weight_bytes + 1_000_000
    fit = sizes.fit(sizes.layers(parse(recipe)), memory, context)
    slots, unit = (320, 64) if recipe == "exact" else (512, 256)
    whole = lambda batch, slots: nbytes(accounting.abstract_cache(config_of(name), 257, batch, slots, BF16, codec))
    assert whole(fit.largest_batch, slots) <= 1_000_000 < whole(fit.largest_batch + 1, slots)
    assert fit.longest_context and fit.longest_context % unit == 0
    assert whole(1, fit.longest_context) <= 1_000_000 < whole(1, fit.longest_context + unit)
    assert fit.sequence_bytes == whole(1, slots)
    stored = accounting.abstract_cache(config_of(name), 257, 1, slots, BF16, codec)
    assert fit.bytes_per_token == stored.bytes_per_token()
    assert sizes.fit(sizes.layers(parse(recipe)), sizes.weight_bytes - 1, context)[2:] == (0, 0)


def test_a_window_fits_any_length_or_little():
    """73 slots in a ring, of 3 * 2 * 2 * 10 * 2 bytes and a position, besides a length of 4 bytes."""
    sizes = sizes_of("window")
    layers, ring = sizes.layers(parse("exact")), 73 * (240 + 4) + 4
    assert sizes.fit(layers, sizes.weight_bytes + ring, 10_000) == (240, ring, None, 1)
    assert sizes.fit(layers, sizes.weight_bytes + ring - 1, 10_000) == (240, ring, 64, 0)


def test_variants():
    """All divisors; elements that a token leaves by hand."""
    made = variants(Grouped(12, 4, head_dim=8, qk_norm=True, window=9))
    elements = {name: attention.elements_per_token() for name, attention in made.items()}
    grouped = {"mha": 192, "gqa6": 96, "gqa4": 64, "gqa3": 48, "gqa2": 32, "mqa": 16}
    assert elements == grouped | {"low_rank": 48, "mla": 36}
    assert made["gqa4"] == Grouped(12, 4, head_dim=8, qk_norm=True, window=9)
    assert all(attention.window == 9 for attention in made.values())
    own = Latent(12, rank=5, rope_dim=2, nope_dim=8, value_dim=6)
    assert variants(own)["mla"] == own and variants(own)["mqa"] == Grouped(12, 1, head_dim=6)
    own = LowRank(12, head_dim=8, rank=None, rank_k=3, rank_v=4)
    assert variants(own)["low_rank"] == own
