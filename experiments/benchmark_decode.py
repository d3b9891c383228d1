"""Time decoding: `python -m experiments.benchmark_decode [--growth | --codec int8 --against exact]`.

The first form times one token a row at four cases, random weights, greedy, in rounds that take turns with
Hugging Face's `generate` if `--against hf` (dynamic and static cache; the better one counts). The second
times presets at growing cache lengths and batches: what a smaller cache gains. The third times a small
model, or a preset, whose cache is stored by codecs (`kvjax.recipes` has their grammar), in turns with the
exact cache in the compute dtype, and says what they take and what fits a memory. Compilation and prefill
are outside of the timing; medians (and ranges) over rounds.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from experiments import cli
from kvjax import host, results
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.config import Config, to_dict
from kvjax.data.config import DataConfig
from kvjax.decoder import DecoderConfig

SMALL = Config(
    Grouped(8, 2, head_dim=32), DecoderConfig(width=256, depth=6, mlp_width=1024), DataConfig(tokenizer="bytes")
)
SMOLLM2 = Config(
    Grouped(9, 3, head_dim=64),
    DecoderConfig(width=576, depth=30, mlp_width=1536),
    DataConfig(vocab_size=49_152),
)
CASES = {
    "w256-b1": (SMALL, 1, 64),
    "w256-b8": (SMALL, 8, 64),
    "smollm2-b1": (SMOLLM2, 1, 64),
    "smollm2-b4-1024": (SMOLLM2, 4, 1024),
}
PRESETS = ("mha", "gqa4", "gqa2", "mqa", "low_rank", "mla")
# Little besides the cache.
CACHE_MODEL = Config(
    Grouped(8, 2, head_dim=64), DecoderConfig(width=128, depth=2, mlp_width=128), DataConfig(tokenizer="bytes")
)
DEFAULTS = {
    "": {"case": tuple(CASES), "against": None},
    "--growth": {"config": PRESETS, "lengths": "256,512,1024,2048,4096,8192", "batches": "1,8"},
    "--codec": {"against": None, "config": None, "batch": 8, "filled": 4064, "memory": "8GiB"},
}
"""Of every form, the options that it takes besides those of all."""


def run(argv: Sequence[str]) -> int:
    """Time, print, and write the results."""
    options = arguments(argv)
    host.prepare()
    if options.codec:
        rows = codecs(options)
    elif options.growth:
        lengths, batches = (cli.integers(f"--{n}", getattr(options, n)) for n in ("lengths", "batches"))
        configs = {name: cli.preset(name) for name in options.config}
        cases = [(batch, length) for batch in batches for length in lengths]
        rows = [row for case in cases for row in growth(configs, *case, options.rounds, options.tokens)]
    else:
        rows = [time_case(name, options.against, options.rounds, options.tokens) for name in options.case]
    if options.json is not None:
        results.write_json(options.json, {"rows": rows, "environment": results.environment()})
    return 0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Options of this command, checked."""
    parser = cli.parser("experiments.benchmark_decode", __doc__)
    parser.add_argument("--case", nargs="+", choices=tuple(CASES), help="default: all")
    parser.add_argument("--against", choices=["hf", "exact"], help="also time this peer (hf: extra peers)")
    parser.add_argument("--growth", action="store_true", help="presets at growing lengths")
    parser.add_argument("--codec", action="append", metavar="TEXT", help="a codec; any number of times")
    parser.add_argument("--config", nargs="+", metavar="NAME", help="presets with --growth, one with --codec")
    parser.add_argument("--lengths", help="tokens in the cache, with --growth (default: 256,512,...,8192)")
    parser.add_argument("--batches", help="rows, with --growth (default: 1,8)")
    parser.add_argument("--batch", type=int, help="rows, with --codec (default: 8)")
    parser.add_argument("--filled", type=int, help="tokens in the cache, with --codec (default: 4064)")
    parser.add_argument("--memory", metavar="SIZE", help="for weights and cache, with --codec (default: 8GiB)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens a row and round (default: 32)")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write the results here")
    options = parser.parse_args(argv)
    cli.require_positive(options, "rounds", "tokens", "batch")
    form = "--codec" if options.codec else "--growth" if options.growth else ""
    if options.codec and options.growth:
        raise ValueError("--growth does not go with --codec; leave one out")
    for name in dict.fromkeys(name for defaults in DEFAULTS.values() for name in defaults):
        if getattr(options, name) is None:
            setattr(options, name, DEFAULTS[form].get(name))
        elif name not in DEFAULTS[form]:
            forms = [other or "the cases" for other, defaults in DEFAULTS.items() if name in defaults]
            raise ValueError(f"--{name} goes with {' or '.join(forms)}" + (f"; leave out {form}" if form else ""))
    if options.against == ("hf" if form else "exact"):
        goes, out = ("the cases", f"leave out {form}") if form else ("--codec", "as --codec int8")
        raise ValueError(f"--against {options.against} goes with {goes}; {out}")
    return options


def codecs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return the figures of codecs, and of the exact cache if asked for, side by side."""
    from kvjax.capacity import parse_bytes
    from kvjax.codec_benchmark import CodecBench
    from kvjax.decode_benchmark import Case
    from kvjax.recipes import parse

    texts = (["exact"] if options.against else []) + options.codec
    recipes = list({recipe.text: recipe for recipe in map(parse, texts)}.values())
    memory = parse_bytes("--memory", options.memory)
    if options.filled < 2:
        raise ValueError(f"--filled={options.filled} must be at least 2")
    if options.config and len(options.config) > 1:
        raise ValueError(f"--config must be one preset with --codec; leave out {' '.join(options.config[1:])}")
    config = cli.preset(options.config[0]) if options.config else CACHE_MODEL
    case = Case(config, options.batch, options.filled, options.tokens)
    about: dict[str, Any] = {
        "batch": case.batch,
        "filled": case.filled,
        "tokens": case.tokens,
        "memory_bytes": memory,
    }
    about["config"] = to_dict(config)
    rows = [row | about for row in CodecBench(case, memory).rows(recipes, options.rounds)]
    for row in rows:
        if options.against:
            row["ratio_to_exact"] = rows[0]["seconds_per_token"]["median"] / row["seconds_per_token"]["median"]
        print(_codec_line(row), flush=True)
    return rows


def _codec_line(row: dict[str, Any]) -> str:
    times = {name: seconds * 1e3 for name, seconds in row["seconds_per_token"].items()}
    ratio = f", {row['ratio_to_exact']:.2f} times as fast as exact" if "ratio_to_exact" in row else ""
    context = "" if row["longest_context"] is None else f" or context {row['longest_context']:,}"
    return (
        f"{row['codec']:24} {times['median']:7.2f} ms/token ({times['min']:.2f} to {times['max']:.2f}){ratio}; "
        f"{row['cache_bytes_per_token']:,.0f} B/token; encode {row['encode_seconds_per_token'] * 1e6:.0f} us; "
        f"temporaries {row['temporary_part_of_exact_cache']:.1%} of the exact cache; "
        f"{row['memory_bytes'] / 2**30:g} GiB fit batch {row['largest_batch']:,}{context}"
    )


def time_case(name: str, against: str | None, rounds: int, tokens: int) -> dict[str, Any]:
    """Print and return one case's times, the peer's beside them if asked for."""
    from kvjax.benchmark import Spread, alternate
    from kvjax.decode_benchmark import Case, DecodeWorkload, read_bandwidth

    config, batch, filled = CASES[name]
    with contextlib.ExitStack() as stack:
        sides: dict[str, Any] = {"bandwidth": read_bandwidth}
        if against:
            from kvjax import peers

            for kind in ("dynamic", "static"):
                worker = peers.Worker(config, batch=batch, filled=filled, tokens=tokens, implementation=kind)
                stack.enter_context(worker)
                sides[kind] = lambda worker=worker: worker.seconds(1)
        ours = DecodeWorkload(Case(config, batch, filled, tokens))
        sides["kvjax"] = ours.seconds
        alternate(sides, 1)
        values = alternate(sides, rounds)
    spread = {side: Spread.of(v) for side, v in values.items()}
    total, seconds = ours.weight_bytes + ours.cache_bytes, spread["kvjax"].median
    row = {
        "case": name,
        "batch": batch,
        "filled": filled,
        "tokens": tokens,
        "seconds_per_token": {side: dataclasses.asdict(s) for side, s in spread.items() if side != "bandwidth"},
        "read_bandwidth": dataclasses.asdict(spread["bandwidth"]),
        "weight_bytes": ours.weight_bytes,
        "cache_bytes": ours.cache_bytes,
        "share_of_bandwidth": total / seconds / spread["bandwidth"].median,
        "first_prefill_seconds": ours.first_prefill_seconds,
        "first_round_seconds": ours.first_round_seconds,
        "config": to_dict(config),
    }
    line = f"{name:16} {seconds * 1e3:7.2f} ms/token, {row['share_of_bandwidth']:.0%} of the read bandwidth"
    if against:
        row["ratio_to_hf"] = min(spread["dynamic"].median, spread["static"].median) / seconds
        theirs = ", ".join(f"{kind} {spread[kind].median * 1e3:.2f}" for kind in ("dynamic", "static"))
        line += f"; Hugging Face {theirs} ms/token: {row['ratio_to_hf']:.2f} times as fast"
    print(line, flush=True)
    return row


def growth(configs: dict[str, Config], batch: int, filled: int, rounds: int, tokens: int) -> list[dict[str, Any]]:
    """Print and return the times of presets at one batch and length, side by side."""
    from kvjax.benchmark import Spread, alternate
    from kvjax.decode_benchmark import Case, DecodeWorkload

    workloads = {name: DecodeWorkload(Case(config, batch, filled, tokens)) for name, config in configs.items()}
    for name, config in configs.items():
        if isinstance(config.attention, Latent):
            workloads[f"{name} expanded"] = DecodeWorkload(Case(config, batch, filled, tokens), expanded=True)
    values = alternate({name: w.seconds for name, w in workloads.items()}, rounds)
    prefill = alternate({name: w.prefill_seconds for name, w in workloads.items()}, 3)
    alternate({name: w.whole_seconds for name, w in workloads.items()}, 1)
    whole = alternate({name: w.whole_seconds for name, w in workloads.items()}, 3)
    rows = []
    for name, workload in workloads.items():
        time = Spread.of(values[name])
        speed = batch * filled / Spread.of(prefill[name]).median
        rows.append(
            {
                "name": name,
                "batch": batch,
                "filled": filled,
                "seconds_per_token": dataclasses.asdict(time),
                "seconds_per_token_without_cache": dataclasses.asdict(Spread.of(whole[name])),
                "prefill_tokens_per_second": speed,
                "weight_bytes": workload.weight_bytes,
                "cache_bytes": workload.cache_bytes,
                "cache_bytes_per_token": workload.bytes_per_token,
            }
        )
        print(
            f"batch {batch} length {filled:5} {name:14} {time.median * 1e3:8.2f} ms/token, "
            f"cache {workload.cache_bytes / 2**20:7.1f} MiB, prefill {speed:8,.0f} tokens/s",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    cli.main(run)
