import pytest

from kvjax import accounting, formulas
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.config import Config
from kvjax.decoder import DecoderConfig

D, N = 23, 6
VARIANTS = {
    "mha": (Grouped(N, N, head_dim=10), formulas.grouped(D, N, N, 10)),
    "gqa": (Grouped(N, 2, head_dim=10), formulas.grouped(D, N, 2, 10)),
    "mqa": (Grouped(N, 1, head_dim=10), formulas.grouped(D, N, 1, 10)),
    "norms": (Grouped(N, 2, head_dim=10, qk_norm=True), formulas.grouped(D, N, 2, 10, qk_norm=True)),
    "biases": (
        Grouped(N, 2, head_dim=10, qkv_bias=True, output_bias=True),
        formulas.grouped(D, N, 2, 10, qkv_bias=True, output_bias=True),
    ),
    "low_rank": (LowRank(N, head_dim=4, rank=11), formulas.low_rank(D, N, 4, 11)),
    "split": (LowRank(N, head_dim=4, rank=None, rank_k=7, rank_v=13), formulas.low_rank_split(D, N, 4, 7, 13)),
    "mla": (Latent(N, rank=13, rope_dim=4, nope_dim=3, value_dim=5), formulas.mla(D, N, 13, 4, 3, 5)),
    "mla_query_rank": (
        Latent(N, rank=13, rope_dim=4, nope_dim=3, value_dim=5, query_rank=9),
        formulas.mla(D, N, 13, 4, 3, 5, 9),
    ),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_formulas_are_those_of_the_arrays(name, tied):
    attention, layer = VARIANTS[name]
    config = Config(attention, DecoderConfig(width=D, depth=3, mlp_width=31, tie_embeddings=tied))
    counted = accounting.num_parameters(accounting.abstract_params(config, 37))
    assert formulas.model(layer, D, 3, 31, 37, tied=tied) == counted
    assert layer.cache_elements == attention.elements_per_token()


# Depth, width, heads, features a head, rotary features of latent variants: arXiv 2505.21487.
SHAPES = {
    "small": (12, 768, 12, 64, 32),
    "medium": (24, 1024, 16, 64, 32),
    "large": (24, 1536, 16, 96, 32),
    "xl": (24, 2048, 16, 128, 64),
}
# Published MLP widths that match parameters, and the published totals in millions.
PUBLISHED = {
    "mha": {"small": (2048, 183.45), "medium": (2736, 433.77), "large": (4096, 876.55), "xl": (5464, 1471.12)},
    "gqa4": {"small": (2392, 183.53), "medium": (3248, 433.77), "large": (4864, 876.55), "xl": (6486, 1470.83)},
    "mqa": {"small": (2520, 183.53), "medium": (3376, 433.77), "large": (5056, 876.55)},
    "gta4": {"small": (2462, 183.40), "medium": (3320, 433.57), "large": (4976, 876.55), "xl": (6638, 1471.22)},
    "mla": {"small": (2128, 183.65), "medium": (3062, 433.55), "large": (4640, 876.73), "xl": (6120, 1470.58)},
    "gla2": {"small": (2208, 183.51), "medium": (3152, 433.89), "large": (4768, 876.73), "xl": (6292, 1470.78)},
}


def millions(variant: str, size: str, mlp_width: int, rope_dim: int | None = None) -> float:
    """Of the paper's models: tied vocabulary of 128,256, latent projections with biases."""
    depth, d, h, dh, rope = SHAPES[size]
    rope = rope_dim or rope
    layer = {
        "mha": lambda: formulas.grouped(d, h, h, dh),
        "gqa4": lambda: formulas.grouped(d, h, 4, dh),
        "mqa": lambda: formulas.grouped(d, h, 1, dh),
        "gta4": lambda: formulas.gta(d, h, 4, dh),
        "mla": lambda: formulas.mla(d, h, 4 * dh, rope, dh, dh, 8 * dh, bias=True),
        "gla2": lambda: formulas.gla(d, h, 2, 2 * dh, rope, dh, dh, 8 * dh, bias=True),
    }[variant]()
    return formulas.model(layer, d, depth, mlp_width, 128_256, tied=True) / 1e6


@pytest.mark.parametrize(("variant", "size"), [(v, s) for v, row in PUBLISHED.items() for s in row])
def test_published_totals(variant, size):
    mlp_width, total = PUBLISHED[variant][size]
    assert round(millions(variant, size, mlp_width), 2) == total


def test_published_total_that_is_wrong():
    """GLA-2 with 48 rotary features: the printed width gives 898.19 M; the printed 876.96 M is that of 4722."""
    assert round(millions("gla2", "large", 4914, rope_dim=48), 2) == 898.19
    assert round(millions("gla2", "large", 4722, rope_dim=48), 2) == 876.96


def test_published_cache_elements():
    """DeepSeek-V2 table 9, V2-Lite, V3; GLA paper's XL models, in bytes of 16-bit elements a layer."""
    mla = formulas.mla(5120, 128, 512, 64, 128, 128, 1536)
    assert [depth * mla.cache_elements for depth in (60, 27, 61)] == [34_560, 15_552, 35_136]
    _, d, h, dh, rope = SHAPES["xl"]
    layers = [formulas.grouped(d, h, h, dh), formulas.grouped(d, h, 4, dh), formulas.gta(d, h, 4, dh)]
    layers += [formulas.gla(d, h, 2, 2 * dh, rope, dh, dh), formulas.mla(d, h, 4 * dh, rope, dh, dh)]
    assert [2 * layer.cache_elements for layer in layers] == [8192, 2048, 1152, 1152, 1152]


def test_published_models():
    """Llama-7B, Llama-2-70B, Qwen3-0.6B (tied): parameters as their publishers give them."""
    of = lambda layer, *shape, tied=False: formulas.model(layer, *shape, tied=tied)
    assert of(formulas.grouped(4096, 32, 32, 128), 4096, 32, 11008, 32_000) == 6_738_415_616
    assert of(formulas.grouped(8192, 64, 8, 128), 8192, 80, 28672, 32_000) == 68_976_648_192
    qwen3 = formulas.grouped(1024, 16, 8, 128, qk_norm=True)
    assert of(qwen3, 1024, 28, 3072, 151_936, tied=True) == 596_049_920


def test_errors():
    with pytest.raises(ValueError, match="num_heads=6 must be a multiple of num_latents=4"):
        formulas.gla(D, 6, 4, 8, 4, 8, 8)
    with pytest.raises(ValueError, match="num_heads=6 must be a multiple of num_kv_heads=4"):
        formulas.gta(D, 6, 4, 8)
    with pytest.raises(ValueError, match="head_dim=10 must be a multiple of 4"):
        formulas.gta(D, 6, 2, 10)
