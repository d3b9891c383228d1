"""Which runs are of a variant, and which may be compared."""

import copy
import dataclasses
from pathlib import Path

import pytest

from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.compare import attention_variants
from kvjax.config import Config, OptimizerConfig, to_dict
from kvjax.decoder import DecoderConfig
from kvjax.results import read_json, write_json
from kvjax.trained import trained, widened

PRESETS = Path(__file__).parents[1] / "notebooks" / "results" / "presets"
WIDE = {
    label: Config(attention, DecoderConfig(width=512)) for label, attention in attention_variants(512, 8).items()
}


def row(run, attention, perplexity=10.0, bits=1.0, rate=1e-3, seed=0, **decoder):
    config = Config(attention, DecoderConfig(**decoder), optimizer=OptimizerConfig(peak_lr=rate), seed=seed)
    figures = {"perplexity": perplexity, "perplexity_se": 2.0, "bits_per_byte": bits, "bits_per_byte_se": 0.5}
    return {"run": run, "config": to_dict(config), "documents": 9, **figures}


MHA, GQA2 = Config(Grouped(8, 8, 24)), Config(Grouped(8, 2, 24))


def test_presets_are_found_by_their_variant_at_another_width():
    found = trained(WIDE, [read_json(path) | {"run": path.stem} for path in sorted(PRESETS.glob("*.json"))])
    names = {"MHA": "mha", "GQA-4": "gqa4", "GQA-2": "gqa2", "MQA": "mqa", "low rank": "low_rank", "MLA": "mla"}
    for label, name in names.items():
        own = read_json(PRESETS / f"{name}.json")
        assert found[label]["runs"] == [name]
        for figure in ("perplexity", "perplexity_se", "bits_per_byte", "bits_per_byte_se"):
            assert found[label][figure] == own[figure]


@pytest.mark.parametrize(
    ("attention", "at_512"),
    [
        (Latent(8, 64, 16, 24, 24, query_rank=48), Latent(8, 170, 42, 64, 64, query_rank=128)),
        (LowRank(8, 24, rank=None, rank_k=12, rank_v=60), LowRank(8, 64, rank=None, rank_k=32, rank_v=160)),
        (Grouped(8, 8, 6), Grouped(8, 8, 16)),  # a control of small heads, which is not MHA of usual ones
        (Grouped(4, 4, 48, window=5), Grouped(4, 4, 128, window=5)),
    ],
)
def test_sizes_grow_with_the_width(attention, at_512):
    assert widened(Config(attention), 512) == at_512


def test_a_run_needs_the_heads_and_the_share_of_the_width():
    rows = [
        row("small", Grouped(8, 8, 6)),
        row("four", Grouped(4, 4, 48)),
        row("normed", Grouped(8, 8, 24, qk_norm=True)),
        row("blocks", Latent(8, 64, 16, rope_blocks=4)),  # at 512, 42 rotary features are not four even parts
    ]
    assert trained({"MHA": WIDE["MHA"], "MLA": WIDE["MLA"]}, rows) == {"MHA": None, "MLA": None}


def test_seeds_are_averaged_at_the_rate_that_is_best_by_shared_seeds():
    rows = [
        row("a", MHA.attention, 12.0, 1.2, 1e-3, 0),
        row("b", MHA.attention, 10.0, 1.0, 3e-3, 0),
        row("c", MHA.attention, 17.0, 1.7, 3e-3, 1),  # by the mean of all seeds, 1e-3 would be better
        row("d", MHA.attention, None, None, 9e-3, 0),
    ]
    found = trained({"MHA": MHA, "GQA-2": GQA2}, rows)
    assert found["GQA-2"] is None and found["MHA"] is not None
    best = found["MHA"]
    assert (best["runs"], best["peak_lr"]) == (["b", "c"], 3e-3)
    assert (best["perplexity"], best["bits_per_byte"]) == (13.5, 1.35)
    assert best["perplexity_se"] == 2.0, "seeds read the same documents"
    assert best["perplexity_by_seed"] == {"0": 10.0, "1": 17.0}


def test_a_loss_without_a_number_has_none():
    found = trained({"MHA": MHA}, [row("a", MHA.attention, None, None)])
    assert found["MHA"] is not None and found["MHA"]["perplexity"] is None


def changed(old, run, **fields):
    new = copy.deepcopy(old) | {"run": run}
    for name, value in fields.items():
        section, _, field = name.partition("__")
        new["config"][section][field] = value
    return new


MHA_ROW, GQA2_ROW = row("a", MHA.attention), row("g", GQA2.attention)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "runs=the rows given must hold results of training"),
        ([{"run": "codec", "rows": []}], "must hold results of training"),
        ([{k: v for k, v in MHA_ROW.items() if k != "run"}], "must hold the name of its run in every row"),
        (
            [MHA_ROW, changed(MHA_ROW, "b", decoder__mlp_width=600)],
            "runs a and b differ in decoder.mlp_width, 512 and 600; both are of one variant",
        ),
        (
            [MHA_ROW, changed(GQA2_ROW, "b", train__steps=9000)],
            "runs a and b differ in train.steps, 2000 and 9000; compare runs that share it",
        ),
        ([MHA_ROW, changed(GQA2_ROW, "b", data__context=64)], "differ in data.context, 256 and 64"),
        ([MHA_ROW, changed(MHA_ROW, "b")], "seed=0 is there twice"),
    ],
)
def test_unfair_comparisons(rows, message):
    with pytest.raises(ValueError, match=message):
        trained({"MHA": MHA, "GQA-2": GQA2}, rows)


def test_what_does_not_matter_may_differ():
    """A matched MLP and another rate, between variants; how often a run looked at itself."""
    other = changed(GQA2_ROW, "b", decoder__mlp_width=600, optimizer__peak_lr=2e-3, train__eval_every=7)
    found = trained({"MHA": MHA, "GQA-2": GQA2}, [MHA_ROW, changed(other, "c", data__data_dir="elsewhere")])
    assert all(found.values())


def test_a_directory_of_runs(tmp_path):
    with pytest.raises(ValueError, match=r"runs='.*none' must hold results of training"):
        trained({"MHA": MHA}, tmp_path / "none")
    stored = dict(row("first", MHA.attention))
    del stored["run"]
    (tmp_path / "first").mkdir()
    write_json(tmp_path / "first" / "result.json", stored)
    found = trained({"MHA": dataclasses.replace(MHA, seed=5)}, tmp_path)
    assert found["MHA"] is not None and found["MHA"]["runs"] == ["first"]
    assert str(tmp_path) not in str(found), "rows name runs, not places"
    # Weights that began as another model, were trained on, and would win.
    (tmp_path / "converted").mkdir()
    better = dict(row("converted", MHA.attention, 5.0, 0.5, rate=3e-3))
    del better["run"]
    write_json(tmp_path / "converted" / "result.json", better)
    write_json(tmp_path / "converted" / "conversion.json", {})
    assert trained({"MHA": MHA}, tmp_path) == found
