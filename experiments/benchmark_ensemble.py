"""Time runs trained as one program: `python -m experiments.benchmark_ensemble --config tiny --members 1,2,4,8`.

The step of `kvjax.ensemble` for M seeds on random tokens, against the step of a run alone, M of which
are trained one after the other: donated states, batches sent from NumPy within the timing, compilation
and warm-up outside it. All sides take turns in every round, and ratios are taken within rounds.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import jax

from experiments import cli
from kvjax import host, results, sharding
from kvjax.benchmark import Spread, TrainingWorkload, alternate, peak_resident_bytes, random_batches
from kvjax.config import Config, to_dict
from kvjax.ensemble import Batches, Members, init_states, make_step

WARM_UP_STEPS = 3
MIB = 2**20


def arguments(argv: Sequence[str]) -> tuple[Any, Config]:
    """Options of this command, and the configuration after overrides."""
    parser = cli.parser("experiments.benchmark_ensemble", __doc__)
    parser.add_argument("--config", metavar="NAME", required=True, help=f"preset: {', '.join(cli.presets())}")
    parser.add_argument(
        "--members", metavar="M,M,...", default="1,2,4,8", help="runs of a program (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--round-steps", type=int, default=3, help="steps a round (default: 3)")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write the results here")
    options, rest = cli.part(parser, argv)
    cli.require_positive(options, "rounds", "round_steps")
    options.members = sorted(set(cli.integers("--members", options.members)))
    default = cli.preset(options.config)
    description = f"Fields of the preset {options.config}."
    return options, cli.override(default, rest, "python -m experiments.benchmark_ensemble", description)


class Together(TrainingWorkload):
    """The step of `number` seeds of a configuration, timed as that of one is."""

    def __init__(self, alone: TrainingWorkload, config: Config, number: int):
        self.mesh, vocab_size = alone.mesh, alone.vocab_size
        self.tokens_per_step = number * alone.tokens_per_step
        members = Members(config, tuple(range(number)), (config.optimizer.peak_lr,) * number)
        rows = Batches([random_batches(config, vocab_size, seed) for seed in members.seeds])
        self.batches = [rows[i] for i in range(len(alone.batches))]
        self._state = sharding.replicate(init_states(members, vocab_size), self.mesh)
        started = time.perf_counter()
        batch = sharding.split(self.batches[0], self.mesh)
        self._step = make_step(members, vocab_size, self.mesh).lower(self._state, batch).compile()
        self.compile_seconds = time.perf_counter() - started
        memory = self._step.memory_analysis()
        assert memory is not None, "this backend does not report the memory of compiled programs"
        self.program_bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes


def run(argv: Sequence[str]) -> int:
    """Time, print, and write the results."""
    options, config = arguments(argv)
    host.prepare(config.train.batch_size // config.train.accumulate)
    row = compare(config, options.members, options.rounds, options.round_steps)
    if options.json is not None:
        shared = {"config": to_dict(config), "environment": results.environment()}
        results.write_json(options.json, row | shared)
    return 0


def compare(config: Config, numbers: list[int], rounds: int, steps: int) -> dict[str, Any]:
    """Print and return tokens per second of runs together, and how many times those of runs alone that is."""
    alone = TrainingWorkload(config)
    together = {number: Together(alone, config, number) for number in numbers}
    speed = lambda side: lambda: side.tokens_per_step * steps / side.seconds(steps)
    sides = {"alone": alone} | {str(number): side for number, side in together.items()}
    for side in sides.values():
        side.seconds(WARM_UP_STEPS)
    values = alternate({name: speed(side) for name, side in sides.items()}, rounds)
    cost = alone.cost
    row: dict[str, Any] = {
        "tokens_per_step": alone.tokens_per_step,
        "training_flops_per_token": alone.flops_per_token,
        "devices": jax.device_count(),
        "round_steps": steps,
        "rounds": values,
        "alone": {
            "tokens_per_second": asdict(Spread.of(values["alone"])),
            "compile_seconds": cost.trace_seconds + cost.compile_seconds,
            "program_bytes": cost.argument_bytes + cost.temporary_bytes,
        },
        "together": [
            {
                "members": number,
                "tokens_per_second": asdict(Spread.of(values[str(number)])),
                "ratio_to_alone": asdict(Spread.of([a / b for a, b in zip(values[str(number)], values["alone"])])),
                "compile_seconds": side.compile_seconds,
                "program_bytes": side.program_bytes,
            }
            for number, side in together.items()
        ],
        "peak_resident_bytes": peak_resident_bytes(),
    }
    _print(row)
    return row


def _print(row: dict[str, Any]) -> None:
    print(
        f"{row['tokens_per_step']:,} tokens a step and member, {row['devices']} devices, "
        f"{len(row['rounds']['alone'])} rounds of {row['round_steps']} steps"
    )
    print(" members  tokens/s  times alone      (range)  to compile  memory of a device")
    for side in [row["alone"], *row["together"]]:
        ratio = side.get("ratio_to_alone", {"median": 1.0, "min": 1.0, "max": 1.0})
        rate = side["tokens_per_second"]["median"]
        print(
            f"{side.get('members', 'alone'):>8}  {rate:8,.0f}  {ratio['median']:11.2f}  "
            f"{ratio['min']:4.2f} to {ratio['max']:4.2f}  {side['compile_seconds']:8.1f} s  "
            f"{side['program_bytes'] / MIB:10,.1f} MiB"
        )
    print(f"memory of the process, all programs loaded: at most {row['peak_resident_bytes'] / MIB:,.0f} MiB")


def ensemble_table(files: dict[str, dict[str, Any]]) -> str:
    """Markdown of committed results, by file: a line for each number of members."""
    lines = [
        "| configuration | members | times as fast as alone: median (range) | MiB of a device |",
        "|---|---:|---:|---:|",
    ]
    for name, row in files.items():
        train, context = row["config"]["train"], row["config"]["data"]["context"]
        size = f"`{name}`: batch {train['batch_size']}, context {context}"
        lines.append(f"| {size} | alone | 1 | {row['alone']['program_bytes'] / MIB:,.1f} |")
        for side in row["together"]:
            ratio = side["ratio_to_alone"]
            lines.append(
                f"| {size} | {side['members']} | {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) "
                f"| {side['program_bytes'] / MIB:,.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.main(run)
