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
import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.sweep_table import listing, report, standing, table
from kvjax import results, with_parent


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
    how.add_argument(
        "--slurm-hours", type=float, default=24.0, metavar="H", help="time limit of a Slurm job (default: 24)"
    )
    how.add_argument("--worker", action="store_true", help="be a worker: no table")
    how.add_argument("--cores", metavar="A,B", help="of a worker, to be pinned to")
    parser.add_argument("--retry", action="store_true", help="do this sweep's failed jobs again")
    parser.add_argument(
        "--dry-run", action="store_true", help="list the jobs known so far, and how well they match"
    )
    parser.add_argument("--status", action="store_true", help="work at nothing; show, and write, what is there")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="write results here at the end")
    known, rest = cli.part(parser, argv)
    cli.require_positive(known, "workers", "seeds", "together")
    if known.together > 1 and known.index is not None:
        raise ValueError(f"--together={known.together} goes with workers; --index={known.index} is one job")
    if not 0 < known.slurm_hours < math.inf:
        raise ValueError(f"--slurm-hours={known.slurm_hours} must be above 0 and finite")
    slurm_options(known.slurm_options)
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
        return one(options, store, numbered(store, jobs_of(), options.index))
    if options.retry and not options.status:
        store.forget_failures(jobs_of())
    store.record(jobs_of())
    if store.open(jobs_of()) and not options.status:
        again = [argument for argument in argv if argument != "--retry"]  # or every worker would forget anew
        (submitted if options.slurm else watched)(options, [*again, "--worker"], store, jobs_of)
        store.record(jobs_of())
    listed = jobs_of()
    gathered, failed = study_rows.gathered(store, listed, study.reference), store.failed(listed)
    print("\n".join([*table(gathered), *report(gathered), *standing(store, listed)]))
    if options.json is not None:
        results.write_json(options.json, gathered)
    left = [] if options.status or (options.slurm and options.cluster == "slurm") else store.open(listed)
    if left:
        print(f"{len(left)} jobs are left, though no worker is: the same command again goes on with them")
    return 1 if failed or left else 0


def one(options: argparse.Namespace, store: Any, job: Any) -> int:
    """Do this job alone; 75 (EX_TEMPFAIL) where it is left open, since another process is at it."""
    from kvjax import sweep

    if options.retry:
        store.forget_failures([job])
    sweep.attempt(store, [job])
    if store.failed([job]):
        return 1
    if store.open([job]):
        print(f"{job.name} is left: another process is at it", file=sys.stderr)
        return os.EX_TEMPFAIL
    return 0


def studied(options: argparse.Namespace, rest: Sequence[str]) -> Any:
    """The study that the options name or describe."""
    from kvjax.study import Study, labels

    if options.study is not None:
        study = cli.study(options.study)
        return dataclasses.replace(study, variants={k: anchored(v) for k, v in study.variants.items()})
    over: dict[str, list[str]] = {}
    spelled: set[str] = set()
    for text in options.over or ():
        name, equals, values = text.partition("=")
        if not (equals and name and values):
            raise ValueError(f"--over {text!r} must be FIELD=A,B, as attention.num-kv-heads=1,2,4,8")
        if name.replace("_", "-") in spelled:
            raise ValueError(f"--over {name} must be given once, not twice; write --over {name}=A,B")
        spelled.add(name.replace("_", "-"))
        over[name] = values.split(",")
    preset, prog = cli.preset(options.config), "python -m experiments.sweep"
    variants = {}
    for label, fields in labels(over):
        options_of = [part for name, value in fields.items() for part in (f"--{name}", value)]
        variants[label or options.config] = anchored(cli.override(preset, [*rest, *options_of], prog, ""))
    rates = () if options.peak_lrs is None else cli.numbers("--peak-lrs", options.peak_lrs)
    free = (options.free or "decoder.mlp_width").replace("-", "_")
    if (options.free or options.match) and free.replace("_", "-") in spelled:
        raise ValueError(f"--free {free} must not be one of the --over fields: matching would undo its values")
    reference = options.reference or list(variants)[-1]
    return Study(variants, reference, options.match or "fixed", free, tuple(rates), options.seeds or 1)


def anchored(config: Any) -> Any:
    """The configuration with data folders that mean the same in the store, where commands run."""
    absolute = {
        name: str(Path(folder).absolute())
        for name in ("data_dir", "manual_dir")
        if (folder := getattr(config.data, name)) and not Path(folder).expanduser().is_absolute()
    }
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **absolute)) if absolute else config


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


def slurm_options(text: str) -> dict[str, int | str]:
    """Options of Slurm by submitit's names; ValueError for a part without "="."""
    made: dict[str, int | str] = {}
    for part in text.split(",") if text else ():
        name, equals, value = part.partition("=")
        if not (name and equals):
            raise ValueError(f"--slurm-options has {part!r}, which must be A=B, as partition=gpu")
        made[f"slurm_{name}"] = int(value) if value.isdecimal() else value
    return made


def submitted(options: argparse.Namespace, again: Sequence[str], store: Any, jobs_of: Any) -> None:
    """Workers through submitit: Slurm's, or its local stand-in, which is waited for."""
    try:
        import submitit
    except ModuleNotFoundError:
        raise ValueError("--slurm needs submitit: pip install -e '.[slurm]'") from None
    executor = submitit.AutoExecutor(folder=str(store.root / "submitit"), cluster=options.cluster)
    # submitit's own time limit is five minutes.
    limit = {"timeout_min": math.ceil(options.slurm_hours * 60)}
    executor.update_parameters(**limit, **slurm_options(options.slurm_options))
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
    workers: list[Any] = []
    live = Live(console=Console(), auto_refresh=False) if sys.stdout.isatty() else None
    began, printed, before = time.monotonic(), 0.0, len(store.finished(jobs_of()))
    with _until_ended(workers, live):
        for share in shares:
            pinned = ["--cores", ",".join(map(str, share))] if share else []
            workers.append(with_parent.start(["experiments.sweep", *again, *pinned]))
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


@contextlib.contextmanager
def _until_ended(workers: list[Any], live: Any) -> Iterator[None]:
    """Ends the workers however the block ends, also by SIGTERM."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        if live is not None:
            live.stop()
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in workers:
            worker.wait()
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    cli.main(run)
