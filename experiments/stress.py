"""Which formats survive large models' caches: `python -m experiments.stress --run runs/gqa4 --tokens 9216`.

A trained grouped-query model is given what breaks formats in large ones, by changes of its weights that leave
its predictions (nearly) as they are: an outlier channel, a bias on keys, attention sinks (`kvjax.stress`).
Each model is calibrated anew, and each codec compared with that model's own exact cache.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from kvjax import host, results
from kvjax.progress import track

CODECS = ["int8", "fp8", "nvfp4", "mxfp4", "int4", "k=int4:channel32,v=int4", "hadamard+int4", "pca75%+bf16"]
SINK = "."  # a token that every window has


def run(argv: Sequence[str]) -> int:
    """Score every model with every codec, and print a line each."""
    options = arguments(argv)
    host.prepare(1)
    from kvjax.calibrate import calibrate
    from kvjax.compress import Comparer
    from kvjax.data.batches import first_of_each
    from kvjax.recipe_build import build
    from kvjax.recipes import parse

    recipes = [parse(text) for text in options.codec or CODECS]
    model, batch_size = cli.open_model(options), cli.batch_size(options)
    context = cli.context(options, model)
    training, text = cli.text(options, model, "train"), cli.text(options, model, "validation")
    corpus = first_of_each(text[1], model.tokenizer, options.tokens)

    def statistics_of(graphdef: Any, params: Any, name: str) -> Any:
        sizes = context, options.calibrate, batch_size
        return calibrate(graphdef, params, training[1], *sizes, model=name, data=training[0])

    rows, plain = [], None
    models = stressed(model, statistics_of(model.graphdef, model.params, model.name))
    for name, (graphdef, params) in models.items():
        statistics = statistics_of(graphdef, params, name)
        comparer = Comparer(graphdef, params, corpus, context, batch_size)
        plain = plain or comparer.exact.perplexity
        row: dict[str, Any] = {"model": name, "perplexity_exact": comparer.exact.perplexity, "codecs": {}}
        change = row["perplexity_exact"] / plain - 1
        print(f"{name}: exact {row['perplexity_exact']:.3f}, {change:+.2%} by the change")
        for recipe in recipes:
            storages = build(
                recipe, comparer.entries, statistics, context=context, frequencies=comparer.frequencies
            )
            bar = lambda batches, name=name, recipe=recipe: track(f"{name}, {recipe.text}", batches)
            row["codecs"][recipe.text] = found = comparer.compare(
                storages, recipe.keys == "before_rope", bar
            ).row()
            print(f"  {recipe.text:28} {found['perplexity_percent']:+.2f} %, KL {found['kl_nats_per_token']:.4f}")
        rows.append(row)
    if options.json is not None:
        header = {"run": model.name, "step": model.step, "data": text[0], "context": context}
        header |= {"tokens": options.tokens, "calibration_tokens": options.calibrate}
        results.write_json(options.json, header | {"rows": rows, "environment": results.environment()})
    return 0


def stressed(model: Any, statistics: Any) -> dict[str, Any]:
    """The model as it is, and with each of the changes, at sizes that change its perplexity by less than 1 %."""
    from kvjax.stress import key_bias, outlier_channels, sink_token

    split = model.graphdef, model.params
    token = int(model.tokenizer.encode(SINK)[0])
    return {
        "as trained": split,
        "outlier channel x 32": outlier_channels(*split, factor=32.0),
        "key bias, 64 x rms": key_bias(*split, statistics, size=64.0),
        f"sink at every {SINK!r}, 32 x rms": sink_token(*split, statistics, token, size=32.0),
    }


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Options of this command, checked."""
    parser = cli.parser("experiments.stress", __doc__)
    parser.add_argument("--run", type=Path, metavar="DIR", required=True, help="directory of a run")
    parser.add_argument("--codec", action="append", metavar="TEXT", help=f"default: {', '.join(CODECS)}")
    parser.add_argument(
        "--tokens", type=int, default=9216, help="scored, the first of every document (default: 9216)"
    )
    parser.add_argument("--calibrate", type=int, default=65536, metavar="N", help="tokens (default: 65536)")
    parser.add_argument("--batch-size", type=int, help="windows at a time (default: 32)")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write the rows here")
    options = parser.parse_args(argv)
    cli.require_positive(options, "calibrate")
    options.model = options.data = options.split = options.context = None
    cli.batch_size(options)
    return options


if __name__ == "__main__":
    cli.main(run)
