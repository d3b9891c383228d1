"""Many runs, each once: `python -m experiments.sweep --config gqa4 --over attention.num-kv-heads=1,2,4 --seeds 5`.

Or a whole study of `configs/studies`: `--study NAME` (variants, matching, learning rates, seeds, codecs,
conversions). A run's directory is named by a digest of its configuration, so the same command again does what is
missing and nothing else, and studies may share a store. Workers claim runs, and take over what a dead one left:
`--workers N` starts local ones, more may join from other hosts by the same command; `--slurm` submits them through
submitit; `--index I` does one job, for `sbatch --array`, or anything that launches numbered tasks. SkyPilot:
`sky launch --num-nodes 4 'python -m experiments.sweep --study NAME --store DIR'`.

`--together N` trains up to N runs that differ in seed and peak learning rate alone as one program. Measured by
`experiments.benchmark_ensemble`, on a CPU of two cores this does not pay at the presets' size (gqa4: 0.91 to 1.03
times as fast as separate runs), but at tiny sizes (tiny: 1.50 times with 4). On a GPU whose time goes into
launches, the compiled program has N times fewer a run; that is not timed.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from kvjax import results


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of this command, and overrides of the preset."""
    parser = cli.parser("experiments.sweep", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="NAME", help=f"preset: {', '.join(cli.presets())}")
    source.add_argument("--study", metavar="NAME", help=f"of configs/studies: {', '.join(cli.studies())}")
    over = parser.add_argument_group("with --config")
    over.add_argument("--over", action="append", metavar="FIELD=A,B", help="values of a field; several: all pairs")
    over.add_argument("--seeds", type=int, help="paired runs of each (default: 1)")
    over.add_argument("--peak-lrs", metavar="A,B,C", help="rates to try first; each gets its best one")
    over.add_argument("--match", choices=("params", "kv_bytes", "train_flops"), help="what all have in common")
    over.add_argument("--free", metavar="FIELD", help="solved for to match (default: decoder.mlp_width)")
    over.add_argument("--reference", metavar="LABEL", help="matched to and compared with (default: the last)")
    parser.add_argument("--store", type=Path, metavar="DIR", help="of all runs (default: runs/sweep-NAME)")
    how = parser.add_argument_group("who works")
    how.add_argument("--workers", type=int, default=1, help="processes here, or Slurm jobs (default: 1)")
    how.add_argument(
        "--together", type=int, default=1, metavar="N", help="runs a worker trains as one program (default: 1)"
    )
    how.add_argument("--index", type=int, metavar="I", help="do job I of the manifest, which --status writes")
    how.add_argument("--slurm", action="store_true", help="submit the workers (extra: slurm)")
    how.add_argument("--cluster", choices=("slurm", "local"), default="slurm", help="submitit's (default: slurm)")
    how.add_argument("--slurm-options", metavar="A=B,C=D", default="", help="as partition=gpu,gpus_per_node=1")
    how.add_argument("--worker", action="store_true", help="be a worker: no table")
    how.add_argument("--cores", metavar="A,B", help="of a worker, to be pinned to")
    parser.add_argument("--retry", action="store_true", help="do failed jobs again")
    parser.add_argument(
        "--dry-run", action="store_true", help="list the jobs known so far, and how well they match"
    )
    parser.add_argument("--status", action="store_true", help="work at nothing; show, and write, what is there")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="write results here at the end")
    known, rest = cli.part(parser, argv)
    cli.require_positive(known, "workers", "seeds", "together")
    if known.together > 1 and known.index is not None:
        raise ValueError(f"--together={known.together} goes with workers; --index={known.index} is one job")
    if known.study is not None:
        given = ("over", "seeds", "peak_lrs", "match", "free", "reference")
        for name in given:
            if getattr(known, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} goes with --config; a study says it itself")
        if rest:
            raise ValueError(f"{rest[0]} goes with --config; a study's fields stand in its file")
    known.store = known.store or Path("runs") / f"sweep-{known.study or known.config}"
    return known, rest


def run(argv: Sequence[str]) -> int:
    """Do every job of the sweep, and print the table."""
    options, rest = arguments(argv)
    from kvjax import study as studies
    from kvjax import study_rows, sweep

    study = studied(options, rest)
    store = sweep.Store(options.store)
    if options.retry:
        store.forget_failures()
    first = studies.jobs(study, {})

    def jobs_of():
        """Results open new jobs: look until none does."""
        listed = first
        while True:
            more = studies.jobs(study, store.finished(listed), frozenset(store.failed(listed)))
            if len(more) == len(listed):
                return more
            listed = more

    if options.dry_run:
        print("\n".join(listing(study, jobs_of(), store)))
        return 0
    if options.worker or options.index is not None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        if options.cores is not None:
            os.sched_setaffinity(0, map(int, options.cores.split(",")))
        if options.index is None:
            sweep.work(store, jobs_of, together=options.together)
            return 0
        job = numbered(store, jobs_of(), options.index)
        sweep.attempt(store, [job])
        return 1 if store.failed([job]) else 0
    store.record(jobs_of())
    if store.open(jobs_of()) and not options.status:
        (submitted if options.slurm else watched)(options, [*argv, "--worker"], store, jobs_of)
        store.record(jobs_of())
    listed = jobs_of()
    gathered, failed = study_rows.gathered(store, listed, study.reference), store.failed(listed)
    print("\n".join([*table(gathered), *standing(store, listed)]))
    if options.json is not None:
        results.write_json(options.json, gathered)
    return 1 if failed else 0


def studied(options: argparse.Namespace, rest: Sequence[str]) -> Any:
    """The study that the options name or describe."""
    from kvjax.study import Study, labels

    if options.study is not None:
        return cli.study(options.study)
    over: dict[str, list[str]] = {}
    for text in options.over or ():
        name, equals, values = text.partition("=")
        if not (equals and name and values):
            raise ValueError(f"--over {text!r} must be FIELD=A,B, as attention.num-kv-heads=1,2,4,8")
        over[name] = values.split(",")
    preset, prog = cli.preset(options.config), "python -m experiments.sweep"
    variants = {}
    for label, fields in labels(over):
        options_of = [part for name, value in fields.items() for part in (f"--{name}", value)]
        variants[label or options.config] = cli.override(preset, [*rest, *options_of], prog, "")
    rates = () if options.peak_lrs is None else cli.numbers("--peak-lrs", options.peak_lrs)
    free = (options.free or "decoder.mlp_width").replace("-", "_")
    reference = options.reference or list(variants)[-1]
    return Study(variants, reference, options.match or "fixed", free, tuple(rates), options.seeds or 1)


def listing(study: Any, jobs: Sequence[Any], store: Any) -> list[str]:
    """What is matched, and every job so far."""
    from kvjax.study import matched

    lines = [f"{len(jobs)} jobs in {store.root}; a variant's seeds follow from its rates' results"]
    if study.matching != "fixed":
        lines.append(f"{study.matching} as {study.reference} by {study.free}; residuals:")
        lines += [f"  {label:20} {residual:+.3%}" for label, (_, residual) in matched(study).items()]
    return lines + [f"{job.stage:11} {job.name}" for job in jobs]


def numbered(store: Any, jobs: Sequence[Any], index: int) -> Any:
    """The job of that place in the manifest, which does not change as jobs are added to it."""
    names, known = store.listed(), {job.name: job for job in jobs}
    if not 0 <= index < len(names):
        raise ValueError(
            f"--index={index} must be at least 0 and below {len(names)}, the jobs in {store.root}'s manifest; "
            "--status adds those known by now"
        )
    if names[index] not in known:
        raise ValueError(f"--index={index} is {names[index]}, which is not of this sweep")
    return known[names[index]]


def submitted(options: argparse.Namespace, again: Sequence[str], store: Any, jobs_of: Any) -> None:
    """Workers through submitit: Slurm's, or its local stand-in, which is waited for."""
    try:
        import submitit
    except ModuleNotFoundError:
        raise ValueError("--slurm needs submitit: pip install -e '.[slurm]'") from None
    executor = submitit.AutoExecutor(folder=str(store.root / "submitit"), cluster=options.cluster)
    given = dict(part.split("=", 1) for part in options.slurm_options.split(",") if "=" in part)
    executor.update_parameters(**{f"slurm_{k}": int(v) if v.isdecimal() else v for k, v in given.items()})
    command = submitit.helpers.CommandFunction([sys.executable, "-m", "experiments.sweep", *again], verbose=False)
    with executor.batch():
        submissions = [executor.submit(command) for _ in range(options.workers)]
    print(f"submitted {', '.join(job.job_id for job in submissions)}; --status shows how they stand")
    if options.cluster == "local":
        for job in submissions:
            job.result()


def watched(options: argparse.Namespace, again: Sequence[str], store: Any, jobs_of: Any) -> None:
    """Workers here, the cores shared out among them, until none has anything left to do."""
    from rich.console import Console
    from rich.live import Live

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = [cores[i :: options.workers] for i in range(options.workers)]
    workers = [_worker(again, share) for share in shares]
    live = Live(console=Console(), auto_refresh=False) if sys.stdout.isatty() else None
    began, printed, before = time.monotonic(), 0.0, len(store.finished(jobs_of()))
    try:
        if live is not None:
            live.start()
        while any(worker.poll() is None for worker in workers):
            time.sleep(1.0)
            now = time.monotonic()
            if live is None and now - printed < 30.0:
                continue
            printed = now
            lines = standing(store, jobs_of(), before, now - began)
            if live is not None:
                live.update("\n".join(lines), refresh=True)
            else:
                print("\n".join(lines), flush=True)
    finally:
        if live is not None:
            live.stop()
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in workers:
            worker.wait()


def _worker(again, share):
    pinned = ["--cores", ",".join(map(str, share))] if share else []
    return subprocess.Popen([sys.executable, "-m", "experiments.sweep", *again, *pinned])


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


if __name__ == "__main__":
    cli.main(run)
