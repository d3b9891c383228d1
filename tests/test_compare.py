"""Letters: B batch, T tokens, V vocabulary."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax import compare
from kvjax.accounting import abstract_cache
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.compare import (
    attention_variants,
    calculate_kv_cache_size,
    compare_attention_variants,
    evaluate_perplexity_vs_kv_heads,
    sizes,
)
from kvjax.config import Config
from kvjax.data import Corpus, DataConfig
from kvjax.data.tokenizer import ByteTokenizer
from kvjax.decoder import Decoder, DecoderConfig
from kvjax.model import Model

D, N, H, L, S = 48, 4, 12, 3, 37
SHAPE = Config(Grouped(N, N, H), DecoderConfig(D, L, mlp_width=32), DataConfig(tokenizer="bytes", context=S))


@pytest.mark.parametrize(("itemsize", "dtype"), [(4, "float32"), (2, "bfloat16")])
def test_cache_size_is_that_of_the_arrays(itemsize, dtype):
    config = Config(Grouped(4, 2, 8), DecoderConfig(16, 3, mlp_width=8))
    memory = abstract_cache(config, 300, 7, 5, jnp.dtype(dtype)).memory
    num_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(memory))
    assert calculate_kv_cache_size(3, 2, 5, 8, 7, itemsize) == num_bytes == 2 * 3 * 7 * 2 * 5 * 8 * itemsize


def test_cache_size_of_a_llama_7b():
    """The project's "1024 MB" are MiB, of 2 bytes a number; its formula has 4, as the default here."""
    assert calculate_kv_cache_size(32, 32, 2048, 128, itemsize=2) == 1024 * 2**20
    assert calculate_kv_cache_size(32, 32, 2048, 128) == 2048 * 2**20


def test_cache_size_refuses_what_is_no_shape():
    with pytest.raises(ValueError, match="num_kv_heads=0 must be a finite number above 0"):
        calculate_kv_cache_size(2, 0, 5, 8)


def test_memory_savings_are_drawn_of_the_same_bytes():
    pytest.importorskip("matplotlib")
    figure = compare.plot_memory_savings((512, 2048))
    drawn = [line.get_ydata() for line in figure.axes[0].lines[:4]]
    expected = [
        [calculate_kv_cache_size(32, k, s, 128, itemsize=2) / 2**30 for s in (512, 2048)] for k in (32, 8, 4, 1)
    ]
    np.testing.assert_allclose(drawn, expected)


# Parameters of a layer (DeepSeek-V2, and what follows from the projections' shapes), elements a token leaves, FLOPs a
# slot costs when decoding, and FLOPs that a token does not take through its own weights, as they rebuild slots.
R_LOW, R_MLA, P = 24, 16, 4
ORACLE = {
    "MHA": (4 * D * N * H, 2 * N * H, 4 * N * H, 0),
    "GQA-2": (2 * D * H * (N + 2), 2 * 2 * H, 4 * N * H, 0),
    "MQA": (2 * D * H * (N + 1), 2 * H, 4 * N * H, 0),
    "low rank": (
        2 * D * N * H + D * R_LOW + 2 * R_LOW * N * H,
        R_LOW,
        2 * R_LOW * N * H + 2 * N * H + 2 * N * R_LOW,
        2 * R_LOW * N * H,
    ),
    "MLA": (
        D * N * (H + P) + D * (R_MLA + P) + 2 * R_MLA * N * H + N * H * D + R_MLA,
        R_MLA + P,
        2 * N * (2 * R_MLA + P),
        0,
    ),
}


@pytest.mark.parametrize("label", ORACLE)
def test_sizes_in_closed_form(label):
    attention = attention_variants(D, N, ("mha", "gqa2", "mqa", "low_rank", "mla"))[label]
    row = sizes(dataclasses.replace(SHAPE, attention=attention), batch=2)
    layer, elements, per_slot, rebuilt = ORACLE[label]
    rest = L * (3 * D * 32 + 2 * D) + D + 257 * D
    assert row["attention_parameters"] == L * layer
    assert row["parameters"] == L * layer + rest
    assert row["cache_bytes_per_token"] == 4 * L * elements
    assert row["cache_bytes"] == row["cache_bytes_read_per_step"] == 2 * S * 4 * L * elements
    assert row["weight_bytes_read_per_step"] == 4 * row["parameters"]
    assert row["decode_flops_per_token"] == 2 * row["parameters"] + L * (per_slot * S - rebuilt)
    assert row["num_kv_heads"] == {"MHA": 4, "GQA-2": 2, "MQA": 1}.get(label)


def test_fewer_kv_heads_save_bytes_and_not_reading_flops():
    """A project's check: sharing heads saves the products that made the others' keys and values, none that read them."""
    few, many = (sizes(dataclasses.replace(SHAPE, attention=Grouped(N, k, H)), 1) for k in (1, N))
    saved = many["decode_flops_per_token"] - few["decode_flops_per_token"]
    assert saved == 2 * (many["parameters"] - few["parameters"]) < 0.2 * many["decode_flops_per_token"]
    assert few["cache_bytes_read_per_step"] == many["cache_bytes_read_per_step"] / N


def test_variants_have_the_presets_share_of_the_width():
    made = attention_variants(192, 8)
    assert list(made) == ["MHA", "GQA-4", "GQA-2", "MQA", "low rank", "MLA"]
    assert made["MLA"] == Latent(8, rank=64, rope_dim=16, nope_dim=24, value_dim=24)
    assert made["low rank"].elements_per_token() == made["GQA-2"].elements_per_token() == 96
    assert attention_variants(192, 8, ["gqa1"])["GQA-1"] == made["MQA"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((192, 7), "d_model=192 must be a multiple of num_heads=7; nearest num_heads: 6"),
        ((24, 8), "d_model / num_heads=3 must be even"),
        ((192, 8, ["gqa3"]), "num_heads=8 must be a multiple of num_kv_heads=3"),
        ((192, 8, ["gqa"]), "variants='gqa' is unknown; choose from mha, gqaN"),
        ((0, 8), "d_model=0 must be at least 1"),
    ],
)
def test_variants_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention_variants(*arguments)


def test_times_are_medians_of_rounds_in_turns(monkeypatch):
    """Ratios are taken within a round, so that what slows a whole round leaves them."""
    calls = []
    took = {"a": [4.0, 40.0, 8.0], "b": [1.0, 20.0, 4.0]}

    class Clock:
        first_prefill_seconds, first_round_seconds = 7.0, 9.0

        def __init__(self, case):
            self.name = {N: "a", 1: "b"}[case.config.attention.num_kv_heads]
            assert (case.batch, case.filled, case.tokens) == (2, S, 5)

        def seconds(self):
            calls.append(self.name)
            return took[self.name][calls.count(self.name) - 1]

        def prefill_seconds(self):
            return 0.5

    monkeypatch.setattr(compare, "DecodeWorkload", Clock)
    variants = {"a": Grouped(N, N, H), "b": Grouped(N, 1, H)}
    options = {"depth": 1, "vocab_size": 258, "context": S, "batch": 2, "rounds": 3, "tokens": 5}
    a, b = compare_attention_variants(D, N, variants=variants, **options)
    assert calls == ["a", "b"] * 3
    assert a["decode_seconds_per_token"] == {"median": 8.0, "min": 4.0, "max": 40.0}
    assert a["decode_speed_ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert b["decode_speed_ratio"] == {"median": 2.0, "min": 2.0, "max": 4.0}
    assert b["prefill_tokens_per_second"]["median"] == 2 * S / 0.5
    assert (b["first_prefill_seconds"], b["first_round_seconds"], b["trained"]) == (7.0, 9.0, None)
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        compare_attention_variants(D, N, rounds=0)


WINDOW = 7
TEXT = "Kept, or rebuilt: what a token leaves?"


@pytest.fixture(scope="module")
def models(draw_params):
    kinds = {
        2: Grouped(2, 2, 4),
        1: Grouped(2, 1, 4),
        "mla": Latent(2, rank=8, rope_dim=2, nope_dim=4, value_dim=4),
    }
    made = {}
    for name, attention in kinds.items():
        make = lambda attention=attention: Decoder(DecoderConfig(16, 1, 16), attention, 257, jax.random.key(0))
        made[name] = Model("somewhere", *draw_params(make), ByteTokenizer(), (256,), WINDOW)
    return made | {"longer": dataclasses.replace(made[2], max_len=9)}


def test_perplexity_through_the_cache_is_that_of_the_whole_text(models, tmp_path, quick_jit):
    """Against float64 sums over the cacheless logits of every window."""
    (tmp_path / "text.txt").write_text(TEXT)
    rows = evaluate_perplexity_vs_kv_heads({"b": models[2], 1: models[1]}, tmp_path / "text.txt", batch_size=2)
    assert [row["num_kv_heads"] for row in rows] == [1, 2]
    ids = np.concatenate([[256], np.frombuffer(TEXT.encode(), np.uint8)]).astype(np.int32)
    windows = [range(start, min(start + WINDOW, len(TEXT))) for start in range(0, len(TEXT), WINDOW)]
    tokens_BT = np.stack(
        [np.resize(ids[window], WINDOW) for window in windows]
    )  # what fills the last comes after it
    for row in rows:
        model = models[row["num_kv_heads"]]
        logits_BTV = quick_jit(lambda params, of=model: nnx.merge(of.graphdef, params)(tokens_BT)[0])(model.params)
        logits_BTV = np.asarray(logits_BTV, np.float64)
        logits_TV = np.concatenate([logits[: len(window)] for logits, window in zip(logits_BTV, windows)])
        nats = np.log(np.exp(logits_TV).sum(-1)) - logits_TV[np.arange(len(TEXT)), ids[1:]]
        assert row["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-4)
        assert row["bits_per_byte"] == pytest.approx(nats.sum() / len(TEXT) / math.log(2), rel=1e-5)
        assert (row["tokens"], row["bytes"], row["documents"]) == (len(TEXT), len(TEXT), 1)
        assert row["cache_bytes_per_token"] == 2 * row["num_kv_heads"] * 4 * 4
        assert row["perplexity_se"] is None, "one document has no standard error"
    assert rows[0]["perplexity"] != pytest.approx(rows[1]["perplexity"], rel=1e-2)


@pytest.mark.parametrize(
    ("variants", "data", "message"),
    [
        ({}, "validation", "model_variants=0 must be at least 1"),
        ({1: 2}, "validation", r"model_variants\[1\] must be a model of 1 KV heads, not 2"),
        ({2: 2}, "no.txt", "test_data='no.txt' must be a file of text, or one of train, validation, test"),
        ({"mla": "mla"}, "validation", r"model_variants\['mla'\] has Latent attention, which has no KV heads"),
        ({"a": 2, "b": "longer"}, "validation", "'a' and 'b' must have the same context, not 7 and 9"),
        (
            {2: 2},
            Corpus(np.array([256, 300], np.int32), np.array([0, 2]), np.array([1])),
            "token 300; .* vocabulary 257",
        ),
        ({2: 2}, Corpus(np.array([256], np.int32), np.array([0, 1]), np.array([0])), "no text"),
    ],
)
def test_what_cannot_be_compared(models, variants, data, message):
    given = {key: models[value] for key, value in variants.items()}
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity_vs_kv_heads(given, data, batch_size=2)
