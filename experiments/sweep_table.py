"""What `experiments.sweep` prints."""

from collections.abc import Sequence
from typing import Any


def listing(study: Any, jobs: Sequence[Any], store: Any) -> list[str]:
    """What is matched, and every job so far."""
    from kvjax.study import matched

    lines = [f"{len(jobs)} jobs in {store.root}; a variant's seeds follow from its rates' results"]
    if study.matching != "fixed":
        lines.append(f"{study.matching} as {study.reference} by {study.free}; residuals:")
        lines += [f"  {label:20} {residual:+.3%}" for label, (_, residual) in matched(study).items()]
    return lines + [f"{job.stage:11} {job.name}" for job in jobs]


def standing(store: Any, jobs: Sequence[Any], before: int = 0, seconds: float = 0.0) -> list[str]:
    """Done, left and under way; with the time left, at the pace since there were `before` results."""
    from kvjax.sweep import progress

    finished, failed, claimed = store.finished(jobs), store.failed(jobs), store.claimed()
    ended = len(finished) + len(failed)
    lines, parts = [f"failed: {name}: {failure['message']}" for name, failure in failed.items()], 0.0
    for job in jobs:
        if job.name in claimed and job.name not in finished and job.name not in failed:
            made = progress(store.root, job)
            step = "" if made is None else f" step {made[0]}/{made[1]}"
            parts += 0.0 if made is None else made[0] / made[1]
            lines.append(f"  {job.stage:11} {job.name}{step}, heard of {claimed[job.name]:.0f} s ago")
    done = len(finished) - before + parts
    left = f", {(len(jobs) - ended - parts) * seconds / done / 60:.0f} min left" if done and seconds > 30 else ""
    failures = f", {len(failed)} failed" if failed else ""
    return [f"{ended} of {len(jobs)} jobs known so far{failures}{left}", *lines]


def table(gathered: dict[str, Any]) -> list[str]:
    """Trained runs side by side, and conversions of these."""
    form = "{:34} {:>8} {:>4} {:>11} {:>8} {:>9} {:>10}"
    lines: list[str] = [form.format("run", "lr", "seed", "parameters", "B/token", "bits/byte", "perplexity")]
    for row in gathered["rows"]:
        sizes = f"{row['parameters']:,}", f"{row['cache_bytes_per_token']:,.0f}"
        quality = f"{row['bits_per_byte']:.4f}", f"{row['perplexity']:.2f}"
        lines.append(form.format(row["job"], f"{row['peak_lr']:.2g}", row["seed"], *sizes, *quality))
    for row in gathered["conversions"]:
        what = f"{row['source']} to {row['label']} by {row['method']}, {row['fraction']:.0%} of the steps"
        lines.append(f"{what}: {row['bits_per_byte']:.4f} bits/byte")
    return [*lines, f"{len(gathered['codecs'])} rows of codecs on these"]


def report(gathered: dict[str, Any]) -> list[str]:
    """Variants side by side with paired differences to the reference, once both have runs."""
    labels = {row["label"] for row in gathered["rows"]}
    if len(labels) < 2 or gathered["reference"] not in labels:
        return []
    from experiments.study_tables import variants

    try:
        return ["", *variants({"": gathered}).splitlines()]
    except ValueError as error:  # as of runs that share no seed yet, or of one that diverged
        return ["", f"no paired differences: {error}"]
