"""Perplexity and bits per byte of a model: `python -m experiments.evaluate --run runs/gqa4`.

By default the whole validation split is scored twice, by the training form and through the cache,
token by token; the two must agree. `--model smollm2 --data sotu` takes a pretrained model, by name or
directory, and any text: a TFDS dataset, or a file in UTF-8, which is one document.
"""

import argparse
from collections.abc import Sequence

from experiments import cli
from kvjax import host, results
from kvjax.progress import track

THROUGH = {"none": "no cache", "prefill": "cache, one pass", "decode": "cache, token by token"}


def run(argv: Sequence[str]) -> int:
    """Evaluate, and print a line for each way."""
    options = arguments(argv)
    host.prepare(options.batch_size if options.run else 1)  # every device holds the weights
    import jax

    from kvjax import sharding
    from kvjax.data.batches import first_tokens
    from kvjax.evaluate import evaluate, make_scorer

    mesh = sharding.make_mesh(options.batch_size, "--batch-size")
    model = cli.open_model(options)
    context = cli.context(options, model)
    data, corpus = cli.text(options, model, "validation")
    if options.tokens is not None:
        corpus = first_tokens(corpus, model.tokenizer, options.tokens)
    params = sharding.replicate(model.params, mesh)
    scores = {}
    for way in options.cache:
        scorer = make_scorer(model.graphdef, mesh, way)
        bar = lambda batches, way=way: track(THROUGH[way], batches)
        scores[way] = evaluate(scorer, params, corpus, context, options.batch_size, mesh, bar)
    at_step = "" if model.step is None else f", step {model.step}"
    for way, score in scores.items():
        print(
            f"{THROUGH[way]:22} perplexity {score.perplexity:.4f} +- {score.perplexity_se:.4f}, "
            f"{score.bits_per_byte:.6f} +- {score.bits_per_byte_se:.6f} bits/byte "
            f"({len(score.nats)} documents, {score.tokens.sum():,} tokens in windows of {context}{at_step})"
        )
    if options.json is not None:
        rows = {way: score.row() for way, score in scores.items()}
        header = {"model": model.name, "data": data, "context": context}
        header |= {"step": model.step, "dtype": jax.tree.leaves(model.params)[0].dtype.name}
        results.write_json(options.json, header | {"scores": rows, "environment": results.environment()})
    return 0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Options of this command, checked."""
    parser = cli.parser("experiments.evaluate", __doc__)
    cli.add_model(parser)
    cli.add_text(parser, "validation", ("validation", "test"))
    parser.add_argument("--tokens", type=int, metavar="N", help="score only the first N tokens")
    parser.add_argument(
        "--cache",
        nargs="+",
        choices=tuple(THROUGH),
        default=("none", "decode"),
        help="ways to score: none (training form), prefill (written and read at once), decode (token by token)",
    )
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="write the scores here")
    options = parser.parse_args(argv)
    options.batch_size = cli.batch_size(options)
    return options


if __name__ == "__main__":
    cli.main(run)
