"""Time training: `python -m experiments.benchmark_train --config gqa4 [--decoder.width 256 ...]`.

The real training step on random tokens: donated state, batches sent from NumPy within the timing,
compilation and warm-up outside it; medians (and ranges) over rounds. With `--against torch` the
same model, batch and precision in PyTorch, in rounds that take turns with ours.
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from experiments import cli
from kvjax import host, results
from kvjax.config import Config, to_dict

PEAK_RUNS = 3
WARM_UP_STEPS = 6


def arguments(argv: Sequence[str]) -> tuple[Any, Config]:
    """Options of this command, and the configuration after overrides."""
    parser = cli.parser("experiments.benchmark_train", __doc__)
    parser.add_argument("--config", metavar="NAME", required=True, help=f"preset: {', '.join(cli.presets())}")
    parser.add_argument("--against", choices=["torch"], help="also time this peer (extra: peers)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--round-steps", type=int, default=3, help="steps a round (default: 3)")
    parser.add_argument("--context-sweep", metavar="T,T,...", help="cost per token at these contexts instead")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write the results here")
    options, rest = cli.part(parser, argv)
    cli.require_positive(options, "rounds", "round_steps")
    if options.against and options.context_sweep:
        raise ValueError("--against compares one context; leave out --context-sweep")
    default = cli.preset(options.config)
    description = f"Fields of the preset {options.config}."
    return options, cli.override(default, rest, "python -m experiments.benchmark_train", description)


def run(argv: Sequence[str]) -> int:
    """Time, print, and write the results."""
    options, config = arguments(argv)
    if options.context_sweep:
        row = sweep(
            config, cli.integers("--context-sweep", options.context_sweep), options.rounds, options.round_steps
        )
    else:
        host.prepare(config.train.batch_size // config.train.accumulate)
        row = compare(config, options.against, options.rounds, options.round_steps)
    if options.json is not None:
        shared = {"config": to_dict(config), "environment": results.environment()}
        results.write_json(options.json, row | shared)
    return 0


def compare(config: Config, against: str | None, rounds: int, steps: int) -> dict[str, Any]:
    """Print and return speed, compile time and memory of training, the peer's beside them if asked for."""
    from kvjax import accounting, benchmark
    from kvjax.benchmark import Spread
    from kvjax.train import compute_dtype

    with contextlib.ExitStack() as stack:
        worker = None
        if against:
            from kvjax import peers

            worker = stack.enter_context(peers.Worker(config))
        ours = benchmark.TrainingWorkload(config)
        dtype = compute_dtype(config.train.dtype)
        speed = lambda side: lambda: ours.tokens_per_step * steps / side.seconds(steps)
        sides = {"peak": lambda: accounting.matmul_peak(dtype, runs=PEAK_RUNS), "kvjax": speed(ours)}
        if worker is not None:
            sides["torch"] = speed(worker)
            worker.seconds(WARM_UP_STEPS)
        ours.seconds(WARM_UP_STEPS)
        values = benchmark.alternate(sides, rounds)
        spreads = {name: Spread.of(v) for name, v in values.items()}
        row = {
            "tokens_per_step": ours.tokens_per_step,
            "training_flops_per_token": ours.flops_per_token,
            "round_steps": steps,
            "rounds": values,
            "tokens_per_second": dataclasses.asdict(spreads["kvjax"]),
            "matmul_peak_flops": dataclasses.asdict(spreads["peak"]),
            "share_of_matmul_peak": spreads["kvjax"].median * ours.flops_per_token / spreads["peak"].median,
            **dataclasses.asdict(ours.cost),
            "peak_resident_bytes": benchmark.peak_resident_bytes(),
        }
        if worker is not None:
            row["torch"] = dataclasses.asdict(spreads["torch"]) | worker.description
            row["torch"]["peak_resident_bytes"] = worker.peak_resident_bytes
            row["ratio_to_torch"] = spreads["kvjax"].median / spreads["torch"].median
    _print(row)
    return row


def _print(row: dict[str, Any]) -> None:
    mib = lambda name: f"{row[name] / 2**20:,.0f} MiB"
    flops = row["training_flops_per_token"] / 1e9
    rounds = f"{len(row['rounds']['kvjax'])} rounds of {row['round_steps']} steps"
    print(f"{row['tokens_per_step']:,} tokens a step, {rounds}")
    for name, spread in (("kvjax", row["tokens_per_second"]), ("torch", row.get("torch"))):
        if spread is not None:
            print(
                f"{name}: {spread['median']:,.0f} tokens/s ({spread['min']:,.0f} to {spread['max']:,.0f}), "
                f"{spread['median'] * flops:,.1f} model GFLOP/s"
            )
    peak = row["matmul_peak_flops"]["median"] / 1e9
    share = f"{row['share_of_matmul_peak']:.0%}"
    print(f"{share} of the {peak:,.0f} GFLOP/s of a matrix product, measured between rounds")
    print(f"compilation: {row['trace_seconds']:.1f} s to trace, {row['compile_seconds']:.1f} s to compile")
    print(
        f"memory of a device: {mib('argument_bytes')} arguments, {mib('temporary_bytes')} temporaries; "
        f"of the process at most {mib('peak_resident_bytes')}"
    )
    if "torch" in row:
        peer = row["torch"]
        print(
            f"kvjax / torch: {row['ratio_to_torch']:.2f} (torch {peer['torch']}, transformers "
            f"{peer['transformers']}, {peer['threads']} threads)"
        )


def sweep(config: Config, contexts: list[int], rounds: int, steps: int) -> dict[str, Any]:
    """Print and return the cost per token at growing contexts, with the tokens of a step fixed."""
    from kvjax import benchmark

    # One number of devices for all contexts: what divides every batch.
    host.prepare(math.gcd(*benchmark.batch_sizes(config, contexts)))
    print("context  batch  step us/token  attention us/token (all layers, forward and backward)  per slot ns")
    costs = []
    for cost in benchmark.context_costs(config, contexts, rounds, steps):
        costs.append(cost)
        attention = cost.attention.median
        print(
            f"{cost.context:7}  {cost.batch_size:5}  {cost.step.median * 1e6:13.1f}  {attention * 1e6:18.2f}  "
            f"{attention * 1e9 / cost.context:11.2f}",
            flush=True,
        )
    return {"round_steps": steps, "contexts": [dataclasses.asdict(cost) for cost in costs]}


if __name__ == "__main__":
    cli.main(run)
