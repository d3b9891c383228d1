"""Rows of a study from a store of files written here: what runs, `compress` and `convert` leave, numbers by hand."""

import dataclasses
import json
from pathlib import Path

import pytest

from configs.tiny import config as tiny
from kvjax.attention.grouped import Grouped
from kvjax.results import write_json
from kvjax.study import Conversion, Job, Study, jobs
from kvjax.study_rows import gathered
from kvjax.sweep import Store

STEPS, TOKENS = 500, 10_000
BITS = {  # by label, rate and seed; of mha the lower rate is best, of mqa the higher one
    ("mha", 1e-3, 0): 1.50,
    ("mha", 2e-3, 0): 1.60,
    ("mha", 1e-3, 1): 1.52,
    ("mqa", 1e-3, 0): 1.75,
    ("mqa", 2e-3, 0): 1.70,
    ("mqa", 2e-3, 1): 1.72,
}
RECORDS = {"mha": 250, "mqa": 100}  # of training, a run
train = dataclasses.replace(tiny.train, steps=STEPS)
STUDY = Study(
    {
        "mha": dataclasses.replace(tiny, train=train, attention=Grouped(4, 4, head_dim=16)),
        "mqa": dataclasses.replace(tiny, train=train, attention=Grouped(4, 1, head_dim=16)),
    },
    reference="mha",
    peak_lrs=(1e-3, 2e-3),
    seeds=2,
    codecs=("exact", "int8"),
    conversions=(Conversion("mqa", "mqa", ("mean",), (0.0, 0.5)),),
)


def environment(name: str) -> dict:
    return {"jax": "0.10.2", "made": name}


def figures(bits: float) -> dict[str, float]:
    return {"bits_per_byte": bits, "bits_per_byte_se": bits / 100, "perplexity": 40 * bits}


def trained(folder: Path, config, bits: float, records: int, size: float) -> None:
    """Every other step up to the last has a record, the i-th of which (from 1) has a loss of i / 2 + bits."""
    row = {**figures(bits), "cache_bytes_per_token": size, "training_tokens": TOKENS, "config": config}
    row |= {"dtype": "float32", "parameters": int(1000 * size)}
    write_json(folder / "result.json", row | {"sample": f"read {folder}", "environment": environment(folder.name)})
    step = STEPS // records
    lines = [{"step": step * i, "kind": "train", "loss": i / 2 + bits} for i in range(1, records + 1)]
    lines.insert(10, {"step": step * 10, "kind": "validation", "bits_per_byte": 9.0})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def stored(folder: Path, job: Job) -> None:
    names = {"exact": 512.0, "int8": 144.0}
    rows = [
        {"model": job.about["source"], "codec": codec, "cache_bytes": {"per_token": size}, **figures(1.5)}
        for codec, size in names.items()
    ]
    write_json(folder / "result.json", {"rows": rows})


def converted(folder: Path, job: Job) -> None:
    scores = {"source": {**figures(1.5), "cache_bytes_per_token": 512.0}}
    scores["converted"] = {**figures(3.0), "documents": 9, "cache_bytes_per_token": 128.0, "parameters": 777}
    source = {"run": str(folder.parent / job.about["source"]), "step": STEPS}
    row = {
        "source": source,
        "to": "mqa",
        "method": "mean",
        "scores": scores,
        "environment": environment("convert"),
    }
    write_json(folder / "conversion.json", row)


def finish(store: Store, job: Job) -> None:
    folder = store.root / job.name
    if job.stage == "codecs":
        stored(folder, job)
    elif job.stage == "conversions":
        converted(folder, job)
        if job.about["fraction"] > 0:
            trained(folder, {}, 1.6, 10, 128.0)
    else:
        about = job.about
        size = {"mha": 512.0, "mqa": 128.0}[about["label"]]
        trained(
            folder,
            job.config,
            BITS[about["label"], about["peak_lr"], about["seed"]],
            RECORDS[about["label"]],
            size,
        )


def listed(store: Store) -> list[Job]:
    known = jobs(STUDY, {})
    while len(more := jobs(STUDY, store.finished(known))) > len(known):
        known = more
    return known


@pytest.fixture
def store(tmp_path) -> Store:
    """All is done."""
    store = Store(tmp_path)
    while remaining := store.open(listed(store)):
        for job in remaining:
            finish(store, job)
    return store


def test_trained_runs(store):
    rows = gathered(store, listed(store))["rows"]
    found = {(row["label"], row["peak_lr"], row["seed"]): row for row in rows}
    assert {run: row["bits_per_byte"] for run, row in found.items()} == BITS and len(rows) == len(BITS)
    assert [found["mha", 1e-3, seed]["stage"] for seed in (0, 1)] == ["rates", "seeds"]
    for row in rows:
        assert (row["matching"], row["residual"], row["training_tokens"]) == ("fixed", 0.0, TOKENS)
        assert row["config"]["seed"] == row["seed"] and row["environment"] == environment(row["job"])
        assert row["cache_bytes_per_token"] == {"mha": 512.0, "mqa": 128.0}[row["label"]]


def test_the_studys_own_choice_of_rate_is_marked(store):
    """As soon as all rates have ended, also on the runs that were made to find it."""
    known = listed(store)
    rows = gathered(store, known)["rows"]
    assert {(row["label"], row["peak_lr"]) for row in rows if row["best"]} == {("mha", 1e-3), ("mqa", 2e-3)}
    (store.root / next(job for job in known if job.about["label"] == "mha").result).unlink()
    rows = gathered(store, listed(store))["rows"]
    assert {row["label"]: "best" in row for row in rows} == {"mha": False, "mqa": True}


def test_runs_in_several_dtypes_are_refused(store):
    known = listed(store)
    place = store.root / known[0].result
    write_json(place, json.loads(place.read_text()) | {"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="'auto' became bfloat16 and float32"):
        gathered(store, known)


def test_codecs_are_of_the_first_run_at_the_best_rate(store):
    rows = gathered(store, listed(store))["codecs"]
    assert [
        (row["label"], row["peak_lr"], row["seed"], row["codec"], row["cache_bytes"]["per_token"]) for row in rows
    ] == [
        ("mha", 1e-3, 0, "exact", 512.0),
        ("mha", 1e-3, 0, "int8", 144.0),
        ("mqa", 2e-3, 0, "exact", 512.0),
        ("mqa", 2e-3, 0, "int8", 144.0),
    ]
    assert all(row["model"] == row["source"] and row["stage"] == "codecs" for row in rows)


def test_conversions_as_converted_and_trained_on(store):
    """Where it was not trained on, figures are of the weights as converted; else of the last step."""
    made, trained_on = gathered(store, listed(store))["conversions"]
    assert (made["fraction"], trained_on["fraction"]) == (0.0, 0.5)
    both = {"label": "mqa", "method": "mean", "seed": 0, "peak_lr": 1e-3, "cache_bytes_per_token": 128.0}
    both |= {"source_bits_per_byte": 1.5, "scratch_bits_per_byte": 1.7}  # mqa's own best rate, seed 0
    both |= {"parameters": 777, "scratch_parameters": 128_000}
    for row, bits in ((made, 3.0), (trained_on, 1.6)):
        assert {name: row[name] for name in both} == both
        assert {name: row[name] for name in figures(bits)} == figures(bits)
    assert made["environment"] == environment("convert")
    assert trained_on["environment"] == environment(trained_on["job"])


def test_curves_keep_mean_loss_and_tokens(store):
    """250 records in parts of 3, of runs at the best rate with the lowest seed; 100 are as they were."""
    curves = gathered(store, listed(store))["curves"]
    assert list(curves) == ["mha", "mqa"]
    assert len(curves["mha"]) == 84
    # A record every 2 of 500 steps, of 20 tokens; losses 1.5 + 0.5, 1.5 + 1, 1.5 + 1.5; the last part has one.
    assert curves["mha"][0] == [120.0, pytest.approx(2.5)] and curves["mha"][1] == [240.0, pytest.approx(4.0)]
    assert curves["mha"][-1] == [TOKENS, pytest.approx(126.5)]
    whole = sum(3 * loss for _, loss in curves["mha"][:-1]) + curves["mha"][-1][1]
    assert whole / 250 == pytest.approx(1.5 + 251 / 4)
    assert curves["mqa"] == [[100.0 * i, pytest.approx(i / 2 + 1.7)] for i in range(1, 101)]


def test_what_is_not_finished_is_left_out(store):
    """A rate of mha's, codecs of mqa, and the training of a conversion, whose other files are there."""
    known = listed(store)
    unfinished = [
        next(job for job in known if job.about["label"] == "mha" and job.about["peak_lr"] == 2e-3),
        next(job for job in known if job.stage == "codecs" and job.about["label"] == "mqa"),
        next(job for job in known if job.stage == "conversions" and job.about["fraction"] > 0),
    ]
    for job in unfinished:
        (store.root / job.result).unlink()
    found = gathered(store, known)
    names = {kind: [row["job"] for row in found[kind]] for kind in ("rows", "codecs", "conversions")}
    assert len(names["rows"]) == 5 and {*names["codecs"]} == {
        job.name for job in known if job.stage == "codecs" and job.about["label"] == "mha"
    }
    assert len(names["conversions"]) == 1
    assert not {job.name for job in unfinished} & {name for of_kind in names.values() for name in of_kind}


def test_a_conversion_may_come_before_the_variant_it_becomes(store):
    known = listed(store)
    for job in known:
        if job.about["label"] == "mqa" and job.config is not None:
            (store.root / job.result).unlink()
    found = gathered(store, known)
    assert [row["scratch_bits_per_byte"] for row in found["conversions"]] == [None, None]
    assert list(found["curves"]) == ["mha"]


def test_a_new_store_has_no_rows(tmp_path):
    assert gathered(Store(tmp_path), jobs(STUDY, {}), "mha") == {
        "reference": "mha",
        "rows": [],
        "codecs": [],
        "conversions": [],
        "curves": {},
    }


def test_rows_hold_no_path_of_this_machine(store):
    """Conversions and samples do; models are named as the commands name runs, below the store."""
    known = listed(store)
    (job,) = (job for job in known if job.stage == "conversions" and job.about["fraction"] == 0)
    assert str(store.root) in (store.root / job.result).read_text()
    text = json.dumps(gathered(store, known))
    assert str(store.root) not in text and '"/' not in text
    arguments = [argument for job in known for step in job.steps for argument in step.arguments]
    assert not any(Path(argument).is_absolute() for argument in arguments)
