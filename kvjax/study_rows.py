"""A study's results as flat rows, for tables, plots and SQL."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvjax.metrics import read_metrics
from kvjax.paired import at_best_rate
from kvjax.results import read_json
from kvjax.runs import CONVERSION
from kvjax.study import Job
from kvjax.sweep import Store

LEFT_OUT = ("sample",)  # a run's text is no figure
CURVE_POINTS = 100


def gathered(store: Store, jobs: Sequence[Job], reference: str | None = None) -> dict[str, Any]:
    """Rows of trained runs, of codecs on them and of conversions, and training curves of the runs of seed 0.

    Runs at the rate that was chosen for all seeds are marked `best`, as soon as there is one. ValueError where
    runs were computed in several dtypes (`auto` on a CPU and a GPU): their pairs would not be.
    """
    finished = store.finished(list(jobs))
    done = [job for job in jobs if job.name in finished]
    of = lambda stage: [job for job in done if job.stage == stage]
    chosen = {job.about["label"]: job.about["peak_lr"] for job in jobs if job.stage == "seeds"}
    trained = [_trained(job, finished[job.name], chosen) for job in done if job.config is not None]
    dtypes = sorted({row["dtype"] for row in trained})
    if len(dtypes) > 1:
        raise ValueError(f"train.dtype='auto' became {' and '.join(dtypes)} in {store.root}: name one of them")
    best = _best(trained)
    return {
        "reference": reference,
        "rows": trained,
        "codecs": [_about(job) | row for job in of("codecs") for row in finished[job.name]["rows"]],
        "conversions": [_converted(job, finished[job.name], best, store) for job in of("conversions")],
        "curves": _curves(store.root, best),
    }


def _about(job):
    return {"job": job.name, "stage": job.stage, **job.about}


def _trained(job, row, chosen):
    figures = {name: value for name, value in row.items() if name not in LEFT_OUT}
    rate = chosen.get(job.about["label"])
    return _about(job) | ({} if rate is None else {"best": job.about["peak_lr"] == rate}) | figures


def _best(trained) -> dict[str, dict[int, Mapping[str, Any]]]:
    """By label and seed, the runs at each label's best rate."""
    by_label: dict[str, list[Mapping[str, Any]]] = {}
    for row in trained:
        by_label.setdefault(row["label"], []).append(row)
    return {label: at_best_rate(rows) for label, rows in by_label.items()}


def _converted(job, row, best, store):
    """A conversion's figures: of the last step where it was trained on, else of the weights as they are."""
    made = read_json(store.root / job.name / CONVERSION)
    score = row if job.about["fraction"] > 0 else made["scores"]["converted"]
    scratch = best.get(job.about["label"], {}).get(job.about["seed"])
    return _about(job) | {
        **{name: score[name] for name in ("bits_per_byte", "bits_per_byte_se", "perplexity")},
        "source_bits_per_byte": made["scores"]["source"]["bits_per_byte"],
        "scratch_bits_per_byte": scratch and scratch["bits_per_byte"],
        **{name: made["scores"]["converted"][name] for name in ("cache_bytes_per_token", "parameters")},
        "scratch_parameters": scratch and scratch["parameters"],
        "environment": row["environment"],
    }


def _curves(root: Path, best) -> dict[str, list[list[float]]]:
    """Tokens and training loss (nats a token) of each label's first run at its best rate, thinned by averaging."""
    curves = {}
    for label, runs in best.items():
        row = next(iter(runs.values()))
        records = [m for m in read_metrics(root / row["job"] / "metrics.jsonl") if m["kind"] == "train"]
        tokens = row["training_tokens"] / row["config"]["train"]["steps"]
        every = -(-len(records) // CURVE_POINTS)
        parts = [records[i : i + every] for i in range(0, len(records), every)]
        mean = lambda part: sum(record["loss"] for record in part) / len(part)
        curves[label] = [[part[-1]["step"] * tokens, mean(part)] for part in parts]
    return curves
