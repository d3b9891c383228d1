"""Perplexity and bits per byte of a trained run: `python -m experiments.evaluate --run runs/gqa4`.

By default the whole validation split is scored twice, by the training form and through the cache,
token by token; the two must agree.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from kvjax import host, results
from kvjax.progress import track

THROUGH = {"none": "no cache", "prefill": "cache, one pass", "decode": "cache, token by token"}


def run(argv: Sequence[str]) -> int:
    """Evaluate, and print a line for each way."""
    options = arguments(argv)
    host.prepare(options.batch_size)
    from kvjax import sharding
    from kvjax.data import load_corpus
    from kvjax.decoder import decodable
    from kvjax.evaluate import evaluate, make_scorer
    from kvjax.runs import load_run
    from kvjax.train import cast, compute_dtype, graphdef_of

    mesh = sharding.make_mesh(options.batch_size, "--batch-size")
    trained = load_run(options.run)
    for line in trained.damaged:
        print(f"damaged checkpoint passed over: {line}")
    config = trained.config
    dtype = compute_dtype(config.train.dtype)
    corpus = load_corpus(config.data, trained.tokenizer, options.split)
    graphdef = graphdef_of(config, trained.tokenizer.vocab_size)
    graphdef, params = decodable(graphdef, cast(trained.params, dtype))
    params = sharding.replicate(params, mesh)
    scores = {}
    for way in options.cache:
        scorer = make_scorer(graphdef, mesh, way)
        bar = lambda batches, way=way: track(THROUGH[way], batches)
        scores[way] = evaluate(scorer, params, corpus, config.data.context, options.batch_size, mesh, bar)
    for way, score in scores.items():
        print(
            f"{THROUGH[way]:22} perplexity {score.perplexity:.4f} +- {score.perplexity_se:.4f}, "
            f"{score.bits_per_byte:.6f} +- {score.bits_per_byte_se:.6f} bits/byte "
            f"({len(score.nats)} documents, {score.tokens.sum():,} tokens, step {trained.step})"
        )
    if options.json is not None:
        rows = {way: score.row() for way, score in scores.items()}
        header = {"run": str(options.run), "split": options.split, "step": trained.step, "dtype": dtype.name}
        results.write_json(options.json, header | {"scores": rows, "environment": results.environment()})
    return 0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Options of this command, checked."""
    parser = cli.parser("experiments.evaluate", __doc__)
    parser.add_argument("--run", type=Path, metavar="DIR", required=True, help="directory of a run")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument(
        "--cache",
        nargs="+",
        choices=tuple(THROUGH),
        default=("none", "decode"),
        help="ways to score: none (training form), prefill (written and read at once), decode (token by token)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="windows at a time (default: 32)")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="write the scores here")
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        raise ValueError(f"--batch-size={options.batch_size} must be at least 1")
    return options


if __name__ == "__main__":
    cli.main(run)
