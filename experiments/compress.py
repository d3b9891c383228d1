"""What codecs cost a model: `python -m experiments.compress --run runs/gqa4 --codec int8 --codec "k=pca18,v=fp8"`.

Every document is scored through a cache that stores it so, written and read back; what each token reads is
what decoding token by token reads. A row a codec goes to the result store, and a row that is there is not
computed again: perplexity against the exact cache with a paired 95 % interval over documents, KL divergence,
top-1 agreement, bytes a token from the stored arrays, and the time of a decoding step's layers. The codecs'
grammar stands in `kvjax.recipes`; `mix:int8|nvfp4|int4@30%` gives each array of each layer one of several, by
what each costs on training text, within a budget.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from kvjax import host, results
from kvjax.progress import track

LINE = "{:34} {:>9} {:>6} {:>11} {:>28} {:>9} {:>7}"
HEADS = ("codec", "B/token", "ratio", "perplexity", "against exact (95 %)", "KL nats", "top-1")
TRAINING_WINDOWS = 8  # of which sensitivities are measured


def run(argv: Sequence[str]) -> int:
    """Score every codec that the store lacks, and print the table."""
    options = arguments(argv)
    host.prepare(1)
    import jax

    from kvjax.codec_rows import Bench, Plan
    from kvjax.compress import Comparer
    from kvjax.data.batches import first_of_each

    plans = [Plan.of(text) for text in dict.fromkeys(options.codec)]
    model = cli.open_model(options)
    context, batch_size = cli.context(options, model), cli.batch_size(options)
    data, corpus = cli.text(options, model, "validation")
    if options.tokens is not None:
        corpus = first_of_each(corpus, model.tokenizer, options.tokens)
    directory, statistics = cli.open_calibration(options)
    header = {"model": model.name, "step": model.step, "data": data, "context": context}
    header |= {"tokens": options.tokens, "dtype": jax.tree.leaves(model.params)[0].dtype.name}
    if statistics is not None:
        about = {name: getattr(statistics, name) for name in ("data", "tokens", "context")}
        about["sha256"] = results.read_json(directory / "statistics.json")["sha256"]
        header |= {"calibration": about}
    store = options.store or cli.own_folder(options, "codecs")
    bar = lambda what: lambda steps: track(what, steps)
    rows, bench = [], None
    for number, plan in enumerate(plans, 1):
        identity = header | {"codec": plan.text}
        place = store / _name(identity)
        if (place / "result.json").exists():
            rows.append(results.read_json(place / "result.json"))
            continue
        with results.RunLock(place):
            if bench is None:
                comparer = Comparer(model.graphdef, model.params, corpus, context, batch_size, bar("exact"))
                training_text = _training_text(options, model, context)
                bench = Bench(comparer, statistics, context, batch_size, training_text, bar)
            row = identity | bench.measure(plan, f"{number}/{len(plans)} {plan.text}")
            row |= {"environment": results.environment()}
            results.write_result(place, row)
        rows.append(row)
        print(_line(row), flush=True)
    print(table(rows))
    if options.json is not None:
        results.write_json(options.json, {"rows": rows})
    if options.plot is not None:
        from kvjax.plots import pareto, save

        save(pareto(rows, f"{model.name}, {data}"), options.plot)
    return 0


def _training_text(options: argparse.Namespace, model: Any, context: int) -> Callable[[], Any]:
    """Windows of the split that codecs may be fitted to."""

    def draw():
        from kvjax.calibrate import draw_windows

        own = argparse.Namespace(**{**vars(options), "data": None, "split": None})
        return draw_windows(cli.text(own, model, "train")[1], context, TRAINING_WINDOWS * context, seed=0)

    return draw


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows by bytes, largest first; a star marks what no other row beats in both bytes and perplexity."""
    from kvjax.compress import on_front

    first = rows[0]
    lines = [f"{first['model']}, {first['data']}, {first['documents']} documents, {first['tokens']:,} tokens"]
    lines.append("  " + LINE.format(*HEADS))
    front = on_front([(row["cache_bytes"]["per_token"], row["perplexity"]) for row in rows])
    for row, best in sorted(zip(rows, front), key=lambda pair: -pair[0]["cache_bytes"]["per_token"]):
        lines.append(("* " if best else "  ") + _line(row))
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    low, high = row["perplexity_percent_low"], row["perplexity_percent_high"]
    interval = "" if low is None else f" ({low:+.2f} to {high:+.2f})"
    size = row["cache_bytes"]
    return LINE.format(
        row["codec"],
        f"{size['per_token']:,.0f}",
        f"{size['times_smaller_than_bf16']:.2f}x",
        f"{row['perplexity']:.3f}",
        f"{row['perplexity_percent']:+.2f} %{interval}",
        f"{row['kl_nats_per_token']:.5f}",
        f"{row['top1_agreement']:.2%}",
    )


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Options of this command, checked."""
    parser = cli.parser("experiments.compress", __doc__)
    cli.add_model(parser)
    parser.add_argument(
        "--codec", action="append", required=True, metavar="TEXT", help="a codec; as many as wanted"
    )
    cli.add_calibration(parser)
    cli.add_text(parser, "validation", ("validation", "test"))
    parser.add_argument("--tokens", type=int, metavar="N", help="score N tokens, the first of every document")
    parser.add_argument("--store", type=Path, metavar="DIR", help="of result rows (default: codecs in the run's)")
    parser.add_argument("--plot", type=Path, metavar="NAME", help="draw NAME.svg and NAME.png (extra: figures)")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write the rows here")
    options = parser.parse_args(argv)
    cli.batch_size(options)
    return options


def _name(identity: dict[str, Any]) -> str:
    """A row's directory: readable, and unique to what determines it."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    readable = "".join(c if c.isalnum() else "-" for c in identity["codec"])[:60].strip("-")
    return f"{readable}-{digest}"


if __name__ == "__main__":
    cli.main(run)
