"""Accuracy in downstream tasks: `python -m experiments.downstream --run runs/gqa4 --tasks hellaswag lambada`.

The model is a trained run or a pretrained one (`--model`); every figure has its standard error. `--limit`
takes a random part of each task, the same for every model of equal `--seed`.
"""

import argparse
import math
from collections.abc import Sequence

from experiments import cli
from experiments.evaluate import THROUGH
from kvjax import host, results
from kvjax.checks import at_least
from kvjax.progress import track
from kvjax.tasks import TASKS, draw, load_items

WIDTHS = "{:11} {:>15} {:>7} {:>17} {:>17} {:>19}"
MOST_DEVICES = 4  # a batch has a row of each at least


def run(argv: Sequence[str]) -> int:
    """Evaluate, and print a line for each task."""
    options = arguments(argv)
    host.prepare(MOST_DEVICES if options.run else 1)  # every device holds the weights
    from kvjax.downstream import LikelihoodScorer, evaluate_task

    model = cli.open_model(options)
    items = {task: load_items(task) for task in options.tasks}
    totals = {task: len(all_items) for task, all_items in items.items()}
    if options.limit is not None:
        for task, total in totals.items():
            if options.limit > total:
                raise ValueError(f"--limit={options.limit} must be at most {total}, the items of {task}")
            items[task] = draw(items[task], options.limit, options.seed)
    model, codec = cli.open_codec(options, model)
    split = model.graphdef, model.params
    scorer = LikelihoodScorer(*split, model.tokenizer, options.cache, codec, max_len=model.max_len)
    rows = {}
    for task in options.tasks:
        bar = lambda batches, task=task: track(task, batches)
        rows[task] = evaluate_task(scorer, task, items[task], bar).row() | {"items_in_all": totals[task]}
    print(table(model.name, options, rows))
    if options.json is not None:
        header = {
            "model": model.name,
            "cache": options.cache,
            "codec": options.codec,
            "limit": options.limit,
            "seed": options.seed,
        }
        results.write_json(options.json, header | {"tasks": rows, "environment": results.environment()})
    return 0


def table(name: str, options: argparse.Namespace, rows: dict[str, dict]) -> str:
    """The rows as text, with what they were measured on."""
    taken = "all items" if options.limit is None else f"items drawn at random with seed {options.seed}"
    lines = [f"{name}, {THROUGH[options.cache]}, {taken}; per character: log-likelihood over the answer's length"]
    heads = ("task", "items", "chance", "accuracy", "per character", "perplexity")
    lines.append(WIDTHS.format(*heads))
    for task, row in rows.items():
        count = f"{row['items']:,} of {row['items_in_all']:,}"
        chance = "-" if row["chance"] is None else f"{row['chance']:.4f}"
        figures = [_figure(row, name) for name in ("accuracy", "accuracy_norm", "perplexity")]
        lines.append(WIDTHS.format(task, count, chance, *figures))
    return "\n".join(lines)


def _figure(row, name) -> str:
    value, error = row[name], row[f"{name}_se"]
    if value is None:
        return "-"
    digits = 4 if value < 10 else 2
    return f"{value:.{digits}f} +- {math.nan if error is None else error:.{digits}f}"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Options of this command, checked."""
    parser = cli.parser("experiments.downstream", __doc__)
    cli.add_model(parser)
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), help="default: all")
    parser.add_argument("--limit", type=int, metavar="N", help="take N items of each task at random")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default: 0)")
    parser.add_argument("--cache", choices=tuple(THROUGH), default="prefill", help="as in experiments.evaluate")
    cli.add_codec(parser)
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="write the rows here")
    options = parser.parse_args(argv)
    if options.limit is not None:
        at_least("--limit", options.limit, 1)
    at_least("--seed", options.seed, 0)
    if options.codec is not None and options.cache == "none":
        raise ValueError("--codec stores a cache; leave out --cache none")
    options.tasks = list(dict.fromkeys(options.tasks))
    return options


if __name__ == "__main__":
    cli.main(run)
