"""Another cache for a trained model: `python -m experiments.convert --run DIR --to gqa2 --method mean --out NEW`.

Makes the weights of a run of grouped attention (MHA, GQA, MQA) those of the attention of a preset, and writes
them as a run at step 0: `experiments.evaluate`, `compress` and `generate` take it as it is, and
`experiments.train --run NEW` trains it on, in the same trainer, for --fraction of the source's steps. All but
the cache stays the source's: sizes, text, optimizer but for a fifth of its peak learning rate, as a whole second
warm-up would undo what the source's decay gained; the seed is the next one, for another order of the text.
Both models' scores on the validation split are printed, and kept in conversion.json.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from kvjax import host, results
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.checks import positive
from kvjax.config import Config, to_dict
from kvjax.progress import track

TOKENS = 65_536
SOURCES = {
    "mean": "mean of a group's kv heads (Ainslie et al. 2023, arXiv 2305.13245)",
    "first": "first kv head of a group (Ainslie et al. 2023, arXiv 2305.13245)",
    "random": "one kv head of a group at random (Ainslie et al. 2023, arXiv 2305.13245)",
    "repeat": "every kv head several times, which is exact",
    "svd": "singular values of the projections of keys and values",
    "whitened": "singular values of keys and values of text (SVD-LLM, arXiv 2403.07378)",
}
EPILOG = """Fields of the target's attention, of its optimizer and its training are options, too, as
--attention.rank 48 --optimizer.peak-lr 1e-3 --train.eval-every 10, and so is --seed."""


def run(argv: Sequence[str]) -> int:
    """Convert, score, and write the run."""
    options, source_config, config = arguments(argv)
    host.prepare(config.train.eval_batch_size)
    import jax

    from kvjax import accounting, sharding
    from kvjax.checkpoint import digest
    from kvjax.convert import write_run
    from kvjax.data import load_corpus
    from kvjax.evaluate import evaluate, make_scorer
    from kvjax.runs import load_run
    from kvjax.train import cast, compute_dtype, graphdef_of

    source = load_run(options.run)
    for line in source.damaged:
        print(f"damaged checkpoint passed over: {line}")
    tokenizer, dtype = source.tokenizer, compute_dtype(config.train.dtype)
    split = graphdef_of(source_config, tokenizer.vocab_size), source.params
    made = _converted(options, config, split, tokenizer)
    mesh = sharding.make_mesh(config.train.eval_batch_size, "train.eval_batch_size")
    corpus = load_corpus(config.data, tokenizer, "validation")
    context, rows = config.data.context, {}
    for name, (graphdef, params), its in (("source", split, source_config), ("converted", made, config)):
        params = sharding.replicate(jax.jit(cast, static_argnums=1)(params, dtype), mesh)
        bar = lambda batches, name=name: track(name, batches)
        scorer, batch_size = make_scorer(graphdef, mesh), config.train.eval_batch_size
        score = evaluate(scorer, params, corpus, context, batch_size, mesh, bar)
        cache = accounting.abstract_cache(its, tokenizer.vocab_size, 1, context, dtype)
        sizes = {"cache_bytes_per_token": cache.bytes_per_token()}
        rows[name] = {**score.row(), **sizes, "parameters": accounting.num_parameters(params)}
        print(
            f"{name:10} perplexity {score.perplexity:.4f} +- {score.perplexity_se:.4f}, {score.bits_per_byte:.6f} "
            f"+- {score.bits_per_byte_se:.6f} bits/byte, {cache.bytes_per_token():,.0f} cache bytes per token"
        )
    row = {
        "source": {
            **{"run": str(options.run), "step": source.step, "digest": digest(source.params)},
            "config": to_dict(source_config),
        },
        **{"to": options.to, "method": options.method, "about": SOURCES[options.method]},
        **{"similar": options.similar, "balance": options.balance, "tokens": options.tokens},
        **{"config": to_dict(config), "scores": rows, "dtype": dtype.name, "environment": results.environment()},
    }
    write_run(options.out, config, tokenizer, made[1], row)
    print(
        f"{options.out}: step 0 of {config.train.steps}; experiments.train --run {options.out} goes on from here"
    )
    if options.json is not None:
        results.write_json(options.json, row)
    return 0


def _converted(options: argparse.Namespace, config: Config, split: Any, tokenizer: Any) -> Any:
    """Structure and parameters of the converted model."""
    from kvjax.convert import input_moments, to_grouped, to_latent, to_low_rank
    from kvjax.data import load_corpus

    (graphdef, params), attention, moments = split, config.attention, None
    if isinstance(attention, Grouped):
        return to_grouped(graphdef, params, attention, options.method, similar=options.similar, seed=config.seed)
    if options.method == "whitened":
        corpus = load_corpus(config.data, tokenizer, "train")
        moments = input_moments(
            graphdef,
            params,
            corpus,
            config.data.context,
            options.tokens,
            config.train.eval_batch_size,
            track=lambda batches: track("inputs of layers", batches),
            seed=config.seed,
        )
    if isinstance(attention, LowRank):
        return to_low_rank(graphdef, params, attention, moments, balance=options.balance)
    assert isinstance(attention, Latent)
    return to_latent(graphdef, params, attention, moments, balance=options.balance)


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, Config, Config]:
    """Options of this command, the source's configuration, and that of the run to write; nothing is computed."""
    parser = cli.parser("experiments.convert", __doc__)
    parser.epilog = EPILOG
    parser.add_argument("--run", type=Path, metavar="DIR", required=True, help="trained run of grouped attention")
    parser.add_argument(
        "--to", metavar="NAME", required=True, help=f"preset whose attention to make: {', '.join(cli.presets())}"
    )
    parser.add_argument(
        "--method",
        required=True,
        help="to grouped attention: mean, first, random, or repeat for more kv heads; to low_rank and mla: svd, "
        "whitened",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="new directory to write")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="steps to train afterwards")
    length.add_argument(
        "--fraction", type=float, default=0.05, help="of the source's steps to train afterwards (default: 0.05)"
    )
    parser.add_argument("--similar", action="store_true", help="pool kv heads of similar weights, not neighbours")
    parser.add_argument("--balance", action="store_true", help="weigh keys and values alike in a joint latent")
    parser.add_argument("--tokens", type=int, metavar="N", help=f"training text of whitened (default: {TOKENS:,})")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write conversion.json here")
    options, rest = parser.parse_known_args(argv)
    from kvjax.convert import target
    from kvjax.convert.run import require_new
    from kvjax.runs import load_config

    cli.require_positive(options, "steps", "tokens")
    require_new(options.out)
    source = load_config(options.run)
    attention = target(source.attention, cli.preset(options.to).attention)
    _refuse_fixed_fields(rest)
    config = cli.override(_uptraining(options, source, attention), rest, "python -m experiments.convert", "")
    _check_method(options, source.attention, config.attention)
    return options, source, config


def _check_method(options: argparse.Namespace, source: Any, attention: Any) -> None:
    grouped = isinstance(attention, Grouped)
    methods = ("svd", "whitened")
    if grouped:
        methods = ("mean", "first", "random") if attention.num_kv_heads <= source.num_kv_heads else ("repeat",)
    elif not isinstance(attention, LowRank | Latent):
        raise ValueError(f"--to={options.to} must be grouped, low-rank or latent attention")
    if options.method not in methods:
        raise ValueError(f"--method={options.method!r} must be one of {', '.join(methods)} with --to {options.to}")
    if options.similar and (not grouped or options.method == "repeat"):
        raise ValueError("--similar goes with mean, first and random")
    if options.balance and grouped:
        raise ValueError("--balance goes with svd and whitened")
    if options.tokens is not None and options.method != "whitened":
        raise ValueError(f"--tokens={options.tokens} goes with --method whitened")
    if options.method == "whitened":
        options.tokens = options.tokens or TOKENS


def _uptraining(options: argparse.Namespace, source: Config, attention: Any) -> Config:
    """The source's configuration with another attention, fewer steps at a lower rate, and intervals that fit."""
    from kvjax.runs import uptraining_peak_lr

    positive("--fraction", options.fraction)
    before = source.train.steps
    steps = options.steps or round(options.fraction * before)
    if not 1 <= steps <= 10**9:
        raise ValueError(
            f"--fraction={options.fraction} of {before} steps must be at least 1 step; a converted model can be "
            "evaluated without any"
        )
    intervals = {name: min(getattr(source.train, name), steps) for name in ("eval_every", "checkpoint_every")}
    peak_lr = uptraining_peak_lr(source.optimizer.peak_lr)
    warmup_steps = min(source.optimizer.warmup_steps * steps // before, steps - 1)
    return dataclasses.replace(
        source,
        attention=attention,
        decoder=dataclasses.replace(source.decoder, scan=False),  # layers are converted, and written, one by one
        optimizer=dataclasses.replace(source.optimizer, peak_lr=peak_lr, warmup_steps=warmup_steps),
        train=dataclasses.replace(source.train, steps=steps, **intervals),
        seed=source.seed + 1,
    )


def _refuse_fixed_fields(rest: Sequence[str]) -> None:
    for argument in rest:
        section = argument.removeprefix("--").partition(".")[0]
        if argument.startswith("--") and section in ("decoder", "data"):
            raise ValueError(
                f"{argument.partition('=')[0]} must be left out: a conversion keeps the source's {section}"
            )


if __name__ == "__main__":
    cli.main(run)
