import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest

from configs.tiny import config as tiny
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.config import from_dict
from kvjax.study import Conversion, Study, jobs, labels, matched

ATTENTION = {
    "mha": Grouped(4, 4, head_dim=16),
    "mqa": Grouped(4, 1, head_dim=16),
    "low_rank": LowRank(4, head_dim=16, rank=24),
    "mla": Latent(4, rank=24, rope_dim=8, nope_dim=16, value_dim=16),
}
VARIANTS = {label: dataclasses.replace(tiny, attention=attention) for label, attention in ATTENTION.items()}
RATES = (1e-3, 2e-3, 4e-3)


def study(**options) -> Study:
    return Study(**{"variants": VARIANTS, "reference": "mha", "peak_lrs": RATES, "seeds": 3, **options})


def result(bits_per_byte: float) -> dict:
    return {"bits_per_byte": bits_per_byte}


def test_rates_come_first_and_the_best_one_gets_all_seeds():
    first = jobs(study(), {})
    assert [(job.about["label"], job.about["peak_lr"], job.about["seed"]) for job in first] == [
        (label, rate, 0) for rate in RATES for label in VARIANTS
    ]
    losses = {"mha": (1.3, 1.1, 1.2), "mqa": (1.1, 1.2, 1.3), "low_rank": (2.0, 2.0, 1.9)}
    rows = {
        job.name: result(losses[job.about["label"]][RATES.index(job.about["peak_lr"])])
        for job in first
        if job.about["label"] in losses
    }
    more = jobs(study(), rows)
    assert [job.name for job in more[:12]] == [job.name for job in first]
    # By seed, and seed 0 of each is among the rates; mla's rates have not ended.
    assert [(job.about["label"], job.about["peak_lr"], job.about["seed"]) for job in more[12:]] == [
        (label, rate, seed)
        for seed in (1, 2)
        for label, rate in (("mha", 2e-3), ("mqa", 1e-3), ("low_rank", 4e-3))
    ]
    assert len({job.name for job in more}) == len(more)


def test_a_rate_that_failed_is_not_the_best_and_one_that_is_missing_is_waited_for():
    first = [job for job in jobs(study(), {}) if job.about["label"] == "mqa"]
    rows = {first[0].name: result(1.5), first[2].name: result(1.4)}
    assert len(jobs(study(), rows)) == 12
    more = jobs(study(), rows, frozenset({first[1].name}))[12:]
    assert [(job.about["label"], job.about["peak_lr"], job.about["seed"]) for job in more] == [
        ("mqa", 4e-3, 1),
        ("mqa", 4e-3, 2),
    ]
    assert len(jobs(study(), {}, frozenset(job.name for job in first))) == 12


def test_several_seeds_a_rate_are_averaged():
    one = study(variants={"mha": VARIANTS["mha"]}, peak_lrs=RATES[:2], rate_seeds=2, seeds=3)
    first = jobs(one, {})
    losses = {(1e-3, 0): 1.0, (1e-3, 1): 1.4, (2e-3, 0): 1.1, (2e-3, 1): 1.2}
    rows = {job.name: result(losses[job.about["peak_lr"], job.about["seed"]]) for job in first}
    assert [job.about["peak_lr"] for job in jobs(one, rows)[len(first) :]] == [2e-3]


def test_a_job_is_named_by_its_whole_configuration():
    (job, *_) = jobs(study(seeds=1), {})
    assert job.config is not None
    config = from_dict(job.config)
    assert config == dataclasses.replace(
        VARIANTS["mha"], optimizer=dataclasses.replace(tiny.optimizer, peak_lr=1e-3)
    )
    assert jobs(study(seeds=7), {})[0].name == job.name
    longer = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, steps=21))
    other = study(variants={"mha": dataclasses.replace(longer, attention=ATTENTION["mha"])})
    assert jobs(other, {})[0].name != job.name


def test_matched_parameters_are_the_models():
    made = matched(study(matching="params"))
    count = lambda config: sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(lambda: _params(config)))
    )
    wanted = count(VARIANTS["mha"])
    per_unit = 3 * tiny.decoder.width * tiny.decoder.depth
    for label, (config, residual) in made.items():
        assert abs(count(config) - wanted) <= per_unit / 2
        assert residual == pytest.approx(count(config) / wanted - 1, abs=1e-12)
        assert dataclasses.replace(config, decoder=tiny.decoder) == VARIANTS[label]
    assert made["mqa"][0].decoder.mlp_width > tiny.decoder.mlp_width
    assert {config for config, _ in matched(study()).values()} == set(VARIANTS.values())


def _params(config):
    from kvjax.train import init_state

    return init_state(config, 257).params


def test_seeds_are_paired():
    """Variants of one seed share every weight of equal shape but the MLP's, and another seed's differ."""
    made = {label: _params(dataclasses.replace(VARIANTS[label], seed=3)) for label in ("mha", "mqa", "mla")}
    paths = {
        label: {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(params)}
        for label, params in made.items()
    }
    # What starts at a constant says nothing: gains, and projections that start at zero.
    drawn = {name: a for name, a in paths["mha"].items() if a.std() > 0}
    shared = {name for name in drawn if name in paths["mqa"] and paths["mqa"][name].shape == drawn[name].shape}
    assert {name.split("'")[-2] for name in shared} >= {"embedding_VD", "q_DNH"}
    assert all(np.array_equal(paths["mqa"][name], drawn[name]) for name in shared)
    alike = {name for name in drawn if name in paths["mla"] and "attention" not in name}
    assert alike and all(np.array_equal(paths["mla"][name], drawn[name]) for name in alike)
    other = _params(dataclasses.replace(VARIANTS["mha"], seed=4))
    assert not np.array_equal(np.asarray(other["embedding_VD"][...]), made["mha"]["embedding_VD"][...])


def test_codecs_and_conversions_follow_the_runs_that_they_need():
    conversions = (Conversion("mqa", "mqa", ("mean", "first"), (0.0, 0.1)),)
    whole = study(peak_lrs=(), seeds=2, codecs=("int8", "nvfp4"), codec_seeds=2, conversions=conversions)
    trained = jobs(whole, {})
    assert {job.stage for job in trained} == {"rates", "seeds"} - {"seeds"}
    rows = {job.name: result(1.0) for job in trained}
    rows |= {job.name: result(1.0) for job in jobs(whole, rows) if job.stage == "seeds"}
    after = [job for job in jobs(whole, rows) if job.stage in ("codecs", "conversions")]
    stored = [job for job in after if job.stage == "codecs"]
    assert [(job.about["label"], job.about["seed"]) for job in stored] == [
        (label, seed) for seed in (0, 1) for label in VARIANTS
    ]
    assert all(job.about["source"] in rows and job.about["source"] in job.steps[0].arguments for job in stored)
    turned = [job for job in after if job.stage == "conversions"]
    assert [(job.about["method"], job.about["fraction"]) for job in turned] == [
        (method, fraction) for method in ("mean", "first") for fraction in (0.0, 0.1)
    ]
    assert [len(job.steps) for job in turned] == [1, 2, 1, 2]
    rate = trained[0].about["peak_lr"] / 5
    asked = [dict(itertools.pairwise(job.steps[0].arguments)).get("--optimizer.peak-lr") for job in turned]
    assert asked == [None, str(rate), None, str(rate)]
    assert [job.about.get("uptraining_peak_lr") for job in turned] == [None, rate, None, rate]
    assert {job.about["source"] for job in turned} == {trained[0].name}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "mha2"}, "reference='mha2' is unknown; did you mean 'mha'?"),
        ({"matching": "flops"}, "matching='flops' is unknown"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
        ({"peak_lrs": (1e-3, 1e-3)}, "must differ"),
        ({"codecs": ("int8",), "codec_seeds": 4}, "codec_seeds=4 must be at most seeds=3"),
        ({"variants": {"a b": VARIANTS["mha"]}, "reference": "a b"}, "must hold only letters"),
        ({"conversions": (Conversion("gqa", "gqa2", ("mean",)),)}, "conversions.label='gqa' is unknown"),
    ],
)
def test_what_cannot_be_studied_is_refused(options, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?").replace("(", r"\(")):
        study(**options)


def test_every_combination_of_values_has_a_label():
    over = {"attention.num-kv-heads": ["1", "2"], "seed": ["7"]}
    assert dict(labels(over)) == {
        "num-kv-heads-1_seed-7": {"attention.num-kv-heads": "1", "seed": "7"},
        "num-kv-heads-2_seed-7": {"attention.num-kv-heads": "2", "seed": "7"},
    }
    assert list(labels({})) == [("", {})]
