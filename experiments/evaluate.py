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
    host.prepare(options.batch_size if options.run else 1)  # every device holds the weights
    import jax

    from kvjax import sharding
    from kvjax.evaluate import evaluate, make_scorer

    mesh = sharding.make_mesh(options.batch_size, "--batch-size")
    model = cli.open_model(options)
    context = options.context or (model.config.data.context if model.config else min(1024, model.max_len or 1024))
    if model.max_len is not None and context > model.max_len:
        raise ValueError(f"--context={context} must be at most the model's max_len={model.max_len}")
    data, corpus = _corpus(options, model)
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
    parser.add_argument("--data", metavar="NAME_OR_FILE", help="text to score (default: the run's own, or sotu)")
    parser.add_argument("--context", type=int, help="tokens of a window (default: the run's, or 1024)")
    parser.add_argument("--tokens", type=int, metavar="N", help="score only the first N tokens")
    parser.add_argument("--split", choices=("validation", "test"), help="of a dataset (default: validation)")
    parser.add_argument(
        "--cache",
        nargs="+",
        choices=tuple(THROUGH),
        default=("none", "decode"),
        help="ways to score: none (training form), prefill (written and read at once), decode (token by token)",
    )
    parser.add_argument("--batch-size", type=int, help="windows at a time (default: 32; of a pretrained model 4)")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="write the scores here")
    options = parser.parse_args(argv)
    if options.batch_size is None:
        options.batch_size = 32 if options.run else 4
    cli.require_positive(options, "batch_size", "context", "tokens")
    return options


def _corpus(options: argparse.Namespace, model: Any) -> tuple[str, Any]:
    """The text's name, without its folder, and its tokens."""
    from kvjax.data import DataConfig, load_corpus
    from kvjax.data.batches import first_tokens, tokenize

    file = None if options.data is None else Path(options.data)
    if file is not None and file.is_file():
        if options.split is not None:
            raise ValueError(f"--split={options.split} goes with a dataset; {file} is a file")
        try:
            name, corpus = file.name, tokenize(model.tokenizer, [file.read_bytes()])
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    else:
        data = model.config.data if model.config else DataConfig()
        data = data if options.data is None else dataclasses.replace(data, name=options.data)
        split = options.split or "validation"
        name, corpus = f"{data.name} {split}", load_corpus(data, model.tokenizer, split)
    corpus = corpus if options.tokens is None else first_tokens(corpus, model.tokenizer, options.tokens)
    if len(corpus.ids) == len(corpus.num_bytes):
        raise ValueError(f"{name} has no text to score")
    return name, corpus


if __name__ == "__main__":
    cli.main(run)
