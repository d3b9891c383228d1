"""What trained runs of a variant reached: the right rows, and only such as may be compared."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvjax import results
from kvjax.attention.base import AttentionConfig
from kvjax.config import Config, from_dict, to_dict
from kvjax.paired import at_best_rate
from kvjax.runs import CONVERSION, differences

Rows = Sequence[Mapping[str, Any]]

SIZES = ("head_dim", "rank", "rank_k", "rank_v", "rope_dim", "nope_dim", "value_dim", "query_rank")
"""Fields of attention that grow with the width."""
IN_A_ROW = {"config", "perplexity", "perplexity_se", "bits_per_byte", "bits_per_byte_se", "documents"}
"""What tells the row of a training run from others."""
NO_MATTER = {"data.data_dir", "data.manual_dir", "decoder.scan", "decoder.remat"} | {
    f"train.{name}" for name in ("accumulate", "eval_every", "eval_batch_size", "checkpoint_every")
}
NO_MATTER |= {"train.log_every", "train.sample_tokens"}
"""Fields that do not change what a run reaches."""
OF_A_RUN = {"seed", "optimizer.peak_lr"}


class Trained(NamedTuple):
    """A run's result row and its configuration."""

    row: Mapping[str, Any]
    config: Config


def trained(configs: Mapping[str, Config], runs: Path | str | Rows) -> dict[str, dict[str, Any] | None]:
    """Perplexity and bits per byte of the runs of each variant, None where there is none.

    `runs` are result rows with their `run`, or a directory of runs, of which those that began as another model
    are left out. A run is of a variant if it has its heads, and its sizes in proportion to the width. Of several
    learning rates the best one counts; runs of several seeds are averaged. `_se` is the standard error over
    documents, which more seeds do not lower: all read the same ones. ValueError for runs of one variant that
    differ in more than rate and seed, and for runs of two that differ in more than that, their attention and the
    MLP's width.
    """
    every, chosen = _training_runs(runs), {}
    for label, config in configs.items():
        of = [run for run in every if _is_of(run, config)]
        chosen[label] = _best(of) if of else []
    found = [run for best in chosen.values() for run in best]
    for run in found[1:]:
        for field in _differences(found[0], run):
            if field not in OF_A_RUN | {"decoder.mlp_width"} and not field.startswith("attention."):
                raise ValueError(_message(found[0], run, field, "compare runs that share it"))
    return {label: _summary(best) if best else None for label, best in chosen.items()}


def _is_of(run: Trained, config: Config) -> bool:
    try:
        return widened(run.config, config.decoder.width) == config.attention
    except ValueError:  # its attention has no such shape at that width
        return False


def widened(config: Config, width: int) -> AttentionConfig:
    """The attention of a configuration, with the sizes that it would have in a decoder of another width."""
    attention, ratio = config.attention, width / config.decoder.width
    sizes = {name: getattr(attention, name, None) for name in SIZES}
    changes: dict[str, Any] = {name: even_size(size * ratio) for name, size in sizes.items() if size is not None}
    return dataclasses.replace(attention, **changes)


def even_size(size: float) -> int:
    """The nearest even number, at least 2."""
    return max(2, 2 * round(size / 2))


def _training_runs(runs) -> list[Trained]:
    where = f"{str(runs)!r}" if isinstance(runs, Path | str) else "the rows given"
    rows = results.read_results(Path(runs)) if isinstance(runs, Path | str) else runs
    # A store of a study has rows of other kinds, too, and conversions that were trained on.
    found = [row for row in rows if row.keys() >= IN_A_ROW]
    if isinstance(runs, Path | str):
        found = [row for row in found if not (Path(runs) / row["run"] / CONVERSION).exists()]
    if not found:
        raise ValueError(f"runs={where} must hold results of training, as experiments.train writes them")
    if any("run" not in row for row in found):
        raise ValueError(
            f"runs={where} must hold the name of its run in every row, as results.read_results gives it"
        )
    return [Trained(row, from_dict(row["config"])) for row in found]


def _best(of: list[Trained]) -> list[Trained]:
    """The runs of the best learning rate, a seed each."""
    rows = []
    for run in of:
        for field in _differences(of[0], run):
            if field not in OF_A_RUN:
                raise ValueError(_message(of[0], run, field, "both are of one variant; give the rows of one"))
        about = {"label": of[0].row["run"], "matching": "fixed", "peak_lr": run.config.optimizer.peak_lr}
        about |= {"seed": run.config.seed, "bits_per_byte": run.row["bits_per_byte"]}
        rows.append(about | {"trained": run})
    return [row["trained"] for row in at_best_rate(rows).values()]


def _summary(runs: list[Trained]) -> dict[str, Any]:
    config, made = runs[0].config, {}
    for name in ("perplexity", "perplexity_se", "bits_per_byte", "bits_per_byte_se"):
        values = [run.row[name] for run in runs]
        made[name] = None if None in values else statistics.fmean(values)
    return made | {
        "runs": [run.row["run"] for run in runs],
        "perplexity_by_seed": {str(run.config.seed): run.row["perplexity"] for run in runs},
        "documents": runs[0].row["documents"],
        "peak_lr": config.optimizer.peak_lr,
        **{name: getattr(config.decoder, name) for name in ("width", "depth", "mlp_width")},
        **{name: getattr(config.train, name) for name in ("steps", "batch_size")},
        "data": config.data.name,
        "context": config.data.context,
    }


def _message(a: Trained, b: Trained, field: str, rule: str) -> str:
    ours, theirs = _differences(a, b)[field]
    return f"runs {a.row['run']} and {b.row['run']} differ in {field}, {ours} and {theirs}; {rule}"


def _differences(a: Trained, b: Trained) -> dict[str, tuple[Any, Any]]:
    """Fields that matter in which two runs' configurations differ."""
    found = dict(differences(to_dict(a.config), to_dict(b.config)))
    return {name: pair for name, pair in found.items() if name not in NO_MATTER}
