"""Statistics for fitting codecs: `python -m experiments.calibrate --run runs/gqa4 --tokens 131072`.

One pass over windows of the evaluation's length, drawn at random from a split that is never evaluated, gathers
means and second moments of all that the cache would hold, of the queries that read it, and of the output
projections. They are written as a new directory: by default `calibration` in the run's, or
`$KVJAX_DATA/calibration/NAME` for a pretrained model.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from kvjax import host, results
from kvjax.checks import at_least
from kvjax.progress import track

EVALUATED = ("validation", "test")


def run(argv: Sequence[str]) -> int:
    """Calibrate, and print a line of what was written."""
    options = arguments(argv)
    host.prepare(options.batch_size if options.run else 1)  # every device holds the weights
    import jax

    from kvjax.benchmark import peak_resident_bytes
    from kvjax.calibrate import calibrate, num_bytes
    from kvjax.statistics_file import save_statistics

    model = cli.open_model(options)
    context = cli.context(options, model)
    data, corpus = cli.text(options, model, "train")
    start = time.monotonic()
    statistics = calibrate(
        model.graphdef,
        model.params,
        corpus,
        context,
        options.tokens,
        options.batch_size,
        model=model.name,
        data=data,
        track=lambda batches: track("calibration", batches),
        seed=options.seed,
    )
    seconds = time.monotonic() - start
    save_statistics(statistics, options.out)
    file_bytes = sum(path.stat().st_size for path in options.out.iterdir())
    kept = num_bytes(statistics)
    print(
        f"{options.out}: {options.tokens:,} tokens of {data} in windows of {context}, {seconds:.1f} s, "
        f"statistics of {kept / 2**20:.1f} MiB ({file_bytes / 2**20:.1f} MiB written)"
    )
    if options.json is not None:
        header = {"model": model.name, "data": data, "context": context, "tokens": options.tokens}
        header |= {"seed": options.seed, "step": model.step, "dtype": jax.tree.leaves(model.params)[0].dtype.name}
        header |= {"seconds": seconds, "statistics_bytes": kept, "written_bytes": file_bytes}
        header |= {"peak_resident_bytes": peak_resident_bytes()}
        results.write_json(options.json, header | {"environment": results.environment()})
    return 0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Options of this command, checked."""
    parser = cli.parser("experiments.calibrate", __doc__)
    cli.add_model(parser)
    parser.add_argument("--tokens", type=int, metavar="N", required=True, help="tokens to gather statistics of")
    cli.add_text(parser, "train")
    parser.add_argument("--seed", type=int, default=0, help="of the windows' choice (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new directory to write")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write a summary here")
    options = parser.parse_args(argv)
    options.batch_size = cli.batch_size(options)
    at_least("--seed", options.seed, 0)
    if options.split in EVALUATED:
        raise ValueError(
            f"--split={options.split} must not be a split that is evaluated: a codec fitted to the text that "
            "scores it would score too well; choose train"
        )
    if options.out is None:
        options.out = cli.own_folder(options, "calibration")
    if options.out.exists():
        raise ValueError(f"--out={options.out} exists; choose a new directory")
    return options


if __name__ == "__main__":
    cli.main(run)
