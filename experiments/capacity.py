"""What a memory holds: `python -m experiments.capacity --config gqa4 --memory 80GiB [--context 4096 ...]`.

How long a context one sequence can have, and how large a batch a context, beside the model's weights: for a
preset (fields are options, as in experiments.train) or a published shape, for every variant of the same heads, and
for every codec (`kvjax.recipes` has their grammar; those that are fitted count by their ranks). Bytes are those of
the arrays that decoding would use, as shapes: nothing is allocated. Activations and temporaries come on top.
`--claims` instead recomputes what widely copied labs and projects say of memory.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from experiments import cli
from kvjax import host, results
from kvjax.checks import one_of

CODECS = ("bf16", "fp8", "int8", "nvfp4", "int4:g32:asym")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LINE = "{:2}{:12} {:26} {:>13} {:>14} {:>16} {:>14}"


def run(argv: Sequence[str]) -> int:
    """Print the table, and write its rows."""
    options, rest = arguments(argv)
    host.prepare(1)
    if options.claims:
        from experiments.claims import documents
        from kvjax.progress import track

        rows: dict[str, Any] = {"rows": documents(lambda groups: track("documents", groups))}
        for row in rows["rows"]:
            print(
                f"{row['document']}: {row['claim']}: {row['claimed']}\n    {row['measured']}\n    {row['remark']}"
            )
    else:
        rows = table(options, rest)
    if options.json is not None:
        results.write_json(options.json, rows)
    return 0


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of this command, and the rest, which are fields of the preset or shape."""
    parser = cli.parser("experiments.capacity", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="NAME", help=f"preset: {', '.join(cli.presets())}")
    what.add_argument("--model-shape", metavar="NAME", help="published: llama-7b, llama2-70b or llama2-70b-mha")
    what.add_argument("--claims", action="store_true", help="recompute what widely copied documents say")
    parser.add_argument("--memory", metavar="SIZE", help="for weights and cache, as 80GiB, 24GB or 512MiB")
    parser.add_argument("--context", type=int, help="tokens of the sequences of a batch (default: the model's)")
    parser.add_argument("--batch", type=int, help="also say what so many sequences of the context take")
    parser.add_argument("--weights-dtype", metavar="NAME", help="fp32, bf16 or fp16 (default: bf16)")
    parser.add_argument("--codec", action="extend", nargs="+", metavar="TEXT", help=f"default: {' '.join(CODECS)}")
    parser.add_argument(
        "--against", metavar="NAMES", help="only these variants besides, as mha,gqa8,mla (default: all)"
    )
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write the rows here")
    options, rest = cli.part(parser, argv)
    cli.require_positive(options, "context", "batch")
    own = ("memory", "context", "batch", "weights_dtype", "codec", "against")
    if options.claims:
        for given in [f"--{name.replace('_', '-')}" for name in own if getattr(options, name) is not None] + rest:
            raise ValueError(f"{given} does not go with --claims; leave it out")
    elif options.memory is None and "--help" not in rest and "-h" not in rest:
        raise ValueError("--memory must be given, as --memory 80GiB")
    options.weights_dtype = options.weights_dtype or "bf16"
    one_of("--weights-dtype", options.weights_dtype, DTYPES)
    return options, rest


def table(options: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    """Print every variant and codec, most bytes first, and return them as rows."""
    from kvjax.capacity import SHAPES, Shape, bytes_text, parse_bytes

    name, prog = options.config or options.model_shape, "python -m experiments.capacity"
    if options.config is not None:
        shape = Shape.of(cli.override(cli.preset(name), rest, prog, f"Fields of the preset {name}."))
    else:
        one_of("--model-shape", name, SHAPES)
        shape = cli.override(SHAPES[name], rest, prog, f"Fields of the shape {name}.")
    memory, context = parse_bytes("--memory", options.memory), options.context or shape.context
    rows, refused, weights = fits(options, shape, memory, context)
    print(
        f"{name}: {bytes_text(memory)}, of which weights in {options.weights_dtype} take {bytes_text(weights)}; "
        f"sequences of {context:,} tokens"
    )
    heads = ("", "variant", "codec", "bytes/token", "one sequence", "longest context", "largest batch")
    print(LINE.format(*heads) + (f"  batch of {options.batch:,}" if options.batch else ""))
    for row in sorted(rows, key=lambda row: -row["bytes_per_token"]):
        print(_line(row, bytes_text))
    for line in refused:
        print(f"left out: {line}")
    print(ranks(shape.attention) + ".")
    print("* the one asked for. Longest context: of one sequence. Activations and temporaries come on top.")
    about = {"name": name, "memory_bytes": memory, "context": context, "weights_dtype": options.weights_dtype}
    return {**about, "rows": rows, "left_out": refused}


def fits(
    options: argparse.Namespace, shape: Any, memory: int, context: int
) -> tuple[list[dict[str, Any]], list[str], int]:
    """Rows, what was left out and why, and the weights' bytes; ValueError if its own do not do."""
    import jax.numpy as jnp

    from kvjax.capacity import Sizes, bytes_text, enough, variants
    from kvjax.progress import track
    from kvjax.recipes import parse

    recipes = list({recipe.text: recipe for recipe in map(parse, options.codec or CODECS)}.values())
    dtype, every = jnp.dtype(DTYPES[options.weights_dtype]), variants(shape.attention)
    own = next(name for name, attention in every.items() if attention == shape.attention)
    wanted = list(every) if options.against is None else [own, *options.against.split(",")]
    for name in wanted:
        one_of("--against", name, every)
    sizes = Sizes(shape, dtype)
    if sizes.weight_bytes >= memory:
        raise ValueError(
            f"--memory={options.memory} must be more than the weights' {bytes_text(sizes.weight_bytes)} in "
            f"{options.weights_dtype}; nearest: --memory {enough(sizes.weight_bytes)}"
        )
    layers = {recipe.text: sizes.layers(recipe) for recipe in recipes}  # of the model itself, all must work
    pairs = [(name, recipe) for name in dict.fromkeys([own, *wanted]) for recipe in recipes]
    rows, refused, known = [], [], {own: sizes}
    for name, recipe in track("sizes", pairs):
        if name not in known:
            known[name] = Sizes(dataclasses.replace(shape, attention=every[name]), dtype)
        sizes = known[name]
        try:
            stored = layers[recipe.text] if name == own else sizes.layers(recipe)
            fit = sizes.fit(stored, memory, context)
        except ValueError as error:
            if name == own:
                raise
            refused.append(f"{name} {recipe.text}: {error}")
            continue
        row = {"variant": name, "own": name == own, "codec": recipe.text, "weight_bytes": sizes.weight_bytes}
        row |= fit._asdict()
        if options.batch:
            row |= {"batch": options.batch, "batch_bytes": sizes.cache_bytes(stored, options.batch, context).total}
        rows.append(row)
    return rows, refused, known[own].weight_bytes


def ranks(attention: Any) -> str:
    """What the variants of a configuration's heads leave that have latents."""
    from kvjax.attention.latent import Latent
    from kvjax.attention.low_rank import LowRank
    from kvjax.capacity import variants

    made = variants(attention)
    low_rank, mla = made["low_rank"], made["mla"]
    assert isinstance(low_rank, LowRank) and isinstance(mla, Latent)
    latents = " and ".join(f"{rank}" for rank in low_rank.ranks.values())
    return f"low_rank: latent of {latents}; mla: latent of {mla.rank} and rotary key of {mla.rope_dim}"


def _line(row: dict[str, Any], bytes_text: Any) -> str:
    longest = "any (window)" if row["longest_context"] is None else f"{row['longest_context']:,}"
    cells = (row["variant"], row["codec"], f"{row['bytes_per_token']:,.0f}", bytes_text(row["sequence_bytes"]))
    line = LINE.format("* " if row["own"] else "", *cells, longest, f"{row['largest_batch']:,}")
    return line + (f"  {bytes_text(row['batch_bytes']):>14}" if "batch" in row else "")


def claims_table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of `documents`' rows."""
    lines = ["| document | claim | claimed | from the arrays' shapes | remark |", "|---|---|---:|---:|---|"]
    for row in rows:
        lines.append(
            "| " + " | ".join(row[n] for n in ("document", "claim", "claimed", "measured", "remark")) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.main(run)
