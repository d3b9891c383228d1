"""Attention variants side by side: `python -m experiments.compare [--runs runs] [--expected]`.

One model shape, random weights: parameters, cache bytes of the arrays, FLOPs and bytes of a decoding step, and
times of prefill and decoding in rounds that the variants take in turns (median and range; compilation apart).
`--runs` adds what trained runs of the same variants reached, of whatever width. `--expected` puts the two tables
that a widely copied project prints beside these figures.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from kvjax import host, results
from kvjax.checks import multiple
from kvjax.progress import track

Rows = dict[str, dict[str, Any]]
"""Files of rows, by name."""

# Quoted from the project ("Expected Results"), which names no hardware, no text, and of models "LLaMA-7B scale".
CLAIMED_MB = {"MHA": (32, 1024), "GQA-8": (8, 256), "GQA-4": (4, 128), "MQA": (1, 32)}
"""KV heads, and MB of cache at 2K tokens, by its formula with 4 bytes a number."""
CLAIMED_QUALITY = {"MHA": (10.5, 1.0), "GQA-8": (10.6, 1.2), "GQA-4": (10.8, 1.3), "MQA": (11.5, 1.5)}
"""Perplexity, and times as fast."""
LLAMA_7B = {"num_layers": 32, "num_heads": 32, "d_k": 128, "seq_len": 2048}


def run(argv: Sequence[str]) -> int:
    """Measure, print, and write the results."""
    options = arguments(argv)
    host.prepare(1)
    from kvjax.compare import attention_variants, compare_attention_variants

    rows = compare_attention_variants(
        options.width,
        options.num_heads,
        **{name: getattr(options, name) for name in ("depth", "vocab_size", "context", "batch", "dtype")},
        **{name: getattr(options, name) for name in ("rounds", "tokens", "runs")},
        variants=attention_variants(options.width, options.num_heads, options.variants),
        track=track,
    )
    made: dict[str, Any] = {"rows": rows, "environment": results.environment()}
    print(comparison_table({"": made}))
    if options.runs is not None and not any(row["trained"] for row in rows):
        print(f"No run in {options.runs} has the heads of a variant, and sizes in proportion to the width.")
    if options.expected:
        made["memory"] = memory()
        print("\n" + expected_table({"": made}))
    if options.json is not None:
        results.write_json(options.json, made)
    return 0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Options of this command, checked."""
    parser = cli.parser("experiments.compare", __doc__)
    parser.add_argument(
        "--variants",
        default="mha,gqa4,gqa2,mqa,low_rank,mla",
        metavar="A,B",
        help="mha, gqaN (N KV heads), mqa, low_rank, mla; speed is relative to the first (default: %(default)s)",
    )
    for name, default, what in (
        ("width", 512, "features of the residual stream"),
        ("num-heads", 8, "query heads"),
        ("depth", 4, "layers"),
        ("vocab-size", 4096, "tokens of the vocabulary"),
        ("batch", 8, "rows"),
        ("context", 1024, "tokens a row in the cache"),
        ("rounds", 5, "rounds of timing"),
        ("tokens", 32, "tokens decoded a row and round"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: {default})")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="default: float32 on CPU, bfloat16 elsewhere",
    )
    parser.add_argument("--runs", type=Path, metavar="DIR", help="directory of trained runs, one directory each")
    parser.add_argument("--expected", action="store_true", help="also the project's expected tables beside ours")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write everything here")
    options = parser.parse_args(argv)
    cli.require_positive(options, "width", "num_heads", "depth", "batch", "context", "rounds", "tokens")
    multiple("--width", options.width, "--num-heads", options.num_heads)
    options.variants = options.variants.split(",")
    for number, name in enumerate(options.variants):
        if name in options.variants[:number]:
            raise ValueError(f"--variants names {name} twice; leave one out")
    if options.expected and options.variants[0] != "mha":
        raise ValueError(
            f"--variants={','.join(options.variants)} must begin with mha: --expected is relative to it"
        )
    return options


def memory() -> list[dict[str, Any]]:
    """Of the project's memory table, the bytes of the arrays in a cache of that shape, in 4 and in 2 bytes."""
    import jax
    import jax.numpy as jnp

    from kvjax.accounting import abstract_cache
    from kvjax.attention.grouped import Grouped
    from kvjax.config import Config
    from kvjax.decoder import DecoderConfig
    from kvjax.slots import nbytes

    heads, d_k, seq_len = (LLAMA_7B[name] for name in ("num_heads", "d_k", "seq_len"))
    rows = []
    for label, (num_kv_heads, _) in CLAIMED_MB.items():
        config = Config(Grouped(heads, num_kv_heads, d_k), DecoderConfig(heads * d_k, LLAMA_7B["num_layers"]))
        cache = abstract_cache(config, config.data.vocab_size, 1, seq_len, jnp.dtype(jnp.float32))
        row: dict[str, Any] = {"variant": label, "num_kv_heads": num_kv_heads, **LLAMA_7B}
        for dtype in ("float32", "bfloat16"):
            row[f"{dtype}_bytes"] = nbytes(
                jax.tree.map(lambda a, dtype=dtype: jax.ShapeDtypeStruct(a.shape, dtype), cache.memory)
            )
        rows.append(row)
    return rows


def comparison_table(rows: Rows) -> str:
    """One line a variant; a block a file of rows."""
    return "\n\n".join(_comparison(file) for file in rows.values())


def _comparison(file: dict[str, Any]) -> str:
    rows, first = file["rows"], file["rows"][0]
    heads = ["variant", "parameters (attention)", "cache bytes/token", "cache MiB"]
    heads += ["MFLOPs/token, forward", "MFLOPs/token, decoding", "weights + cache read a step, MiB"]
    heads += ["prefill tokens/s", "decode ms/token", f"times as fast as {first['variant']}"]
    quality = any(row["trained"] for row in rows)
    heads += ["trained perplexity", "bits/byte"] if quality else []
    cells = []
    for row in rows:
        read = [row[f"{what}_bytes_read_per_step"] / 2**20 for what in ("weight", "cache")]
        cells.append(
            [
                row["variant"],
                f"{row['parameters'] / 1e6:.2f} M ({row['attention_parameters'] / 1e6:.2f} M)",
                f"{row['cache_bytes_per_token']:,.0f}",
                f"{row['cache_bytes'] / 2**20:.1f}",
                f"{row['forward_flops_per_token'] / 1e6:.2f}",
                f"{row['decode_flops_per_token'] / 1e6:.2f}",
                f"{read[0]:.1f} + {read[1]:.1f}",
                _range(row["prefill_tokens_per_second"], ",.0f"),
                _range(row["decode_seconds_per_token"], ".2f", 1e3),
                _range(row["decode_speed_ratio"], ".2f"),
                *([_figure(row["trained"], "perplexity", ".2f")] if quality else []),
                *([_figure(row["trained"], "bits_per_byte", ".4f")] if quality else []),
            ]
        )
    about = first["config"]
    lines = [
        f"Width {about['decoder']['width']}, depth {about['decoder']['depth']}, "
        f"{about['attention']['num_heads']} query heads, MLP {about['decoder']['mlp_width']}, "
        f"vocabulary {about['data']['vocab_size']:,}, {first['dtype']}; batch {first['batch']}, "
        f"context {first['context']:,}; {file['environment']['device_kind']}, median (range) of {first['rounds']} "
        "rounds."
    ]
    lines += [_runs_used(rows)] if quality else []
    return "\n".join([*lines, "", _markdown(heads, cells)])


def expected_table(rows: Rows) -> str:
    """Of files made with --expected: the project's memory beside the arrays' bytes, its quality beside ours."""
    files = [file for file in rows.values() if "memory" in file]
    tables = [_expected_memory(files[0]["memory"])] if files else []
    return "\n\n".join(tables + [_expected_quality(file["rows"]) for file in files])


def _expected_memory(rows: list[dict[str, Any]]) -> str:
    heads = [
        "architecture",
        "KV heads",
        "expected",
        "arrays, float32",
        "arrays, 2 bytes a number",
        "expected savings",
        "savings",
    ]
    cells = []
    for row in rows:
        claimed = CLAIMED_MB[row["variant"]][1]
        size = lambda dtype, row=row: f"{row[dtype] / 1e6:,.1f} MB = {row[dtype] / 2**20:,.0f} MiB"
        parts = claimed / CLAIMED_MB["MHA"][1], row["float32_bytes"] / rows[0]["float32_bytes"]
        sizes = [f"{claimed:,} MB", size("float32_bytes"), size("bfloat16_bytes")]
        shown = [f"{1 - part:.1%}" for part in parts]
        cells.append([row["variant"], str(row["num_kv_heads"]), *sizes, *shown])
    return _markdown(heads, cells)


def _expected_quality(rows: list[dict[str, Any]]) -> str:
    """Joined by the share of MHA's cache: a project's GQA-8 of 32 heads is a GQA-2 of 8."""
    first = rows[0]
    if first["variant"] != "MHA":
        raise ValueError(
            f"rows[0] is {first['variant']} and must be MHA, which the expected figures are relative to"
        )
    heads = ["share of MHA's cache", "expected for", "expected perplexity (/ MHA's)", "expected speed"]
    heads += ["measured", "perplexity / MHA's", "decoding speed"]
    whole, base = CLAIMED_MB["MHA"][1], CLAIMED_QUALITY["MHA"][0]
    claimed = {size / whole: label for label, (_, size) in CLAIMED_MB.items()}
    ours: dict[float, list[Any]] = {}
    for row in rows:
        ours.setdefault(row["cache_bytes_per_token"] / first["cache_bytes_per_token"], []).append(row)
    cells = []
    for share in sorted({*claimed, *ours}, reverse=True):
        theirs = [""] * 3
        if share in claimed:
            perplexity, speed = CLAIMED_QUALITY[claimed[share]]
            theirs = [f"{claimed[share]} of 32 heads", f"{perplexity} ({perplexity / base:.3f})", f"{speed}x"]
        for row in ours.get(share, [None]):
            measured = [""] * 3
            if row is not None:
                speed = f"{row['decode_speed_ratio']['median']:.2f}x"
                measured = [row["variant"], _quality_ratio(row, first), speed]
            cells.append([f"{share:.1%}", *theirs, *measured])
    return _markdown(heads, cells)


def _quality_ratio(row: dict[str, Any], first: dict[str, Any]) -> str:
    """Geometric mean over the seeds that both have; from two seeds on with its paired 95 % interval."""
    if not row["trained"] or not first["trained"]:
        return ""
    from kvjax.paired import t_interval

    ours, base = (side["trained"]["perplexity_by_seed"] for side in (row, first))
    pairs = [(ours[seed], base[seed]) for seed in ours if seed in base]
    if not pairs or any(None in pair for pair in pairs):
        return "no seed in common" if not pairs else "not finite"
    logs = [math.log(a / b) for a, b in pairs]
    interval = t_interval(logs) if row is not first else None
    text = f"{math.exp(statistics.fmean(logs)):.3f}"
    return text if interval is None else f"{text} ({math.exp(interval[0]):.3f} to {math.exp(interval[1]):.3f})"


def _runs_used(rows: list[dict[str, Any]]) -> str:
    """Which runs the figures of quality are of."""
    first = next(row["trained"] for row in rows if row["trained"])
    named = [f"{row['variant']} {', '.join(row['trained']['runs'])}" for row in rows if row["trained"]]
    missing = [row["variant"] for row in rows if not row["trained"]]
    return (
        f"Trained at width {first['width']}, depth {first['depth']}, {first['steps']:,} steps on {first['data']}, "
        f"± over {first['documents']} documents; runs: {'; '.join(named)}"
        + (f"; none of {', '.join(missing)}." if missing else ".")
    )


def _range(spread: dict[str, float], form: str, scale: float = 1.0) -> str:
    middle, low, high = (format(scale * spread[name], form) for name in ("median", "min", "max"))
    return f"{middle} ({low} to {high})"


def _figure(trained: dict[str, Any] | None, name: str, form: str) -> str:
    if trained is None:
        return ""
    value, error = trained[name], trained[f"{name}_se"]
    if value is None:
        return "not finite"
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")


def _markdown(heads: list[str], cells: list[list[str]]) -> str:
    """A table whose columns line up as text, too."""
    widths = [max(map(len, column)) for column in zip(heads, *cells)]
    line = lambda row: "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(heads), rule, *map(line, cells)])


if __name__ == "__main__":
    cli.main(run)
