"""Train one configuration: `python -m experiments.train --config gqa4 [--attention.num-kv-heads 2 ...]`.

The run's directory, `runs/NAME`, holds the resolved configuration, metrics, checkpoints, samples
and at last the result. The same command again goes on where the run stopped; while another process is at it, the
exit status is 75.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from kvjax import host, results
from kvjax.config import Config


def arguments(argv: Sequence[str]) -> tuple[Any, Config]:
    """Options of this command, and the configuration after overrides."""
    parser = cli.parser("experiments.train", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="NAME", help=f"preset: {', '.join(cli.presets())}")
    source.add_argument("--run", metavar="DIR", type=Path, help="go on with, or repeat, the run in this directory")
    parser.add_argument("--name", help="name of the run below --root (default: the preset's)")
    parser.add_argument("--root", type=Path, help="directory of all runs (default: runs)")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write the result row here")
    parser.add_argument("--dry-run", action="store_true", help="print sizes, FLOPs and memory; train nothing")
    known, rest = cli.part(parser, argv)
    if known.run is not None:
        from kvjax.runs import load_config

        for option in ("name", "root"):
            if getattr(known, option) is not None:
                raise ValueError(f"--{option} goes with --config; --run names its directory")
        default = load_config(known.run)
        known.directory = known.run
    else:
        default = cli.preset(known.config)
        known.directory = (known.root or Path("runs")) / results.run_name(
            known.config if known.name is None else known.name
        )
    description = f"Fields of the preset {known.config}." if known.config else ""
    return known, cli.override(default, rest, "python -m experiments.train", description)


def run(argv: Sequence[str]) -> int:
    """Train, and print the result."""
    options, config = arguments(argv)
    host.prepare(config.train.batch_size // config.train.accumulate)
    from kvjax import loop

    if options.dry_run:
        from kvjax.dry_run import report

        print("\n".join(report(config)))
        return 0
    try:
        row = loop.run(config, options.directory)
    except loop.NotFinite as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except loop.Interrupted as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 128 + error.signum
    print(
        f"\n{options.directory}: perplexity {row['perplexity']:.2f}, {row['bits_per_byte']:.4f} bits/byte, "
        f"{row['cache_bytes_per_token']:,.0f} cache bytes per token, "
        f"{row['tokens_per_second'] or float('nan'):,.0f} tokens/s, {row['wall_seconds']:.0f} s\n"
        f"sample: {row['sample']}"
    )
    if options.json is not None:
        results.write_json(options.json, row)
    return 0


if __name__ == "__main__":
    cli.main(run)
