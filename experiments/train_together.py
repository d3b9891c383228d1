"""Train runs as one program: `python -m experiments.train_together --runs DIR DIR ...`.

Each directory holds a `config.json`; these differ in seed and peak learning rate alone. Each is left as
`experiments.train --run DIR` would leave it, and the same command again goes on where the runs stopped; finished
ones are not trained again. A run that diverges stops alone; the exit status then is 1, and 75 while
another process is at one of them. Where this pays is measured by `experiments.benchmark_ensemble`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from kvjax import host


def run(argv: Sequence[str]) -> int:
    """Train, and print a line for each run."""
    directories = arguments(argv)
    from kvjax.runs import load_config

    configs = [load_config(directory) for directory in directories]
    host.prepare(configs[0].train.batch_size // configs[0].train.accumulate)
    from kvjax.ensemble import run_together
    from kvjax.loop import Interrupted, NotFinite

    try:
        outcomes = run_together(configs, directories)
    except Interrupted as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 128 + error.signum
    status = 0
    for directory, outcome in zip(directories, outcomes):
        if isinstance(outcome, NotFinite):
            print(f"{directory} stopped: {outcome}")
            status = 1
        else:
            print(
                f"{directory}: perplexity {outcome['perplexity']:.2f}, {outcome['bits_per_byte']:.4f} bits/byte, "
                f"{outcome['tokens_per_second'] or float('nan'):,.0f} tokens/s, {outcome['wall_seconds']:.0f} s"
            )
    return status


def arguments(argv: Sequence[str]) -> list[Path]:
    """The directories; ValueError for one that is named twice."""
    parser = cli.parser("experiments.train_together", __doc__)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, metavar="DIR", help="directories of runs")
    directories = parser.parse_args(argv).runs
    resolved = [directory.resolve() for directory in directories]
    for directory, one in zip(directories, resolved):
        if resolved.count(one) > 1:
            raise ValueError(f"--runs {directory} must be named once, not {resolved.count(one)} times")
    return directories


if __name__ == "__main__":
    cli.main(run)
