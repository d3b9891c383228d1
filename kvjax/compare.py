"""Attention variants side by side at one shape: parameters, cache bytes, FLOPs, speed, and trained quality.

The functions that exercises on grouped-query attention ask for, under the names they give them.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from kvjax import accounting, primer, sharding
from kvjax.attention.base import AttentionConfig
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.benchmark import Spread, alternate
from kvjax.checks import at_least, even, multiple, positive
from kvjax.codecs.base import Exact
from kvjax.config import Config, TrainConfig, to_dict
from kvjax.data import Corpus, DataConfig, load_corpus
from kvjax.data.batches import tokenize
from kvjax.decode_benchmark import Case, DecodeWorkload
from kvjax.decoder import DecoderConfig
from kvjax.dry_run import vocabulary
from kvjax.evaluate import evaluate, make_scorer
from kvjax.model import Model, open_model
from kvjax.plots import plot_memory_savings
from kvjax.slots import nbytes
from kvjax.train import compute_dtype
from kvjax.trained import Rows, even_size, trained

Track = Callable[[str, list], Iterable]
"""What shows progress, as `kvjax.progress.track`."""

__all__ = [
    "attention_variants",
    "calculate_kv_cache_size",
    "compare_attention_variants",
    "evaluate_perplexity_vs_kv_heads",
    "plot_memory_savings",
    "sizes",
]

NAMES = ("mha", "gqa4", "gqa2", "mqa", "low_rank", "mla")
SPLITS = ("train", "validation", "test")


def attention_variants(
    d_model: int = 512, num_heads: int = 8, names: Sequence[str] = NAMES
) -> dict[str, AttentionConfig]:
    """Variants by label: "mha", "mqa", "gqaN" of N KV heads, "low_rank", "mla"; heads of d_model / num_heads.

    Latents are of the presets' share of the width: 1/2 in low rank, 1/3 (and 1/12 of rotary key) in MLA.
    ValueError for other names, and for shapes that a variant cannot have.
    """
    at_least("d_model", d_model, 1)
    at_least("num_heads", num_heads, 1)
    multiple("d_model", d_model, "num_heads", num_heads)
    made: dict[str, AttentionConfig] = {}
    head_dim = d_model // num_heads
    even("d_model / num_heads", head_dim)
    for name in names:
        group = re.fullmatch(r"gqa([1-9]\d*)", name, re.ASCII)
        if group:
            made[f"GQA-{group[1]}"] = Grouped(num_heads, int(group[1]), head_dim)
        elif name in ("mha", "mqa"):
            made[name.upper()] = Grouped(num_heads, num_heads if name == "mha" else 1, head_dim)
        elif name == "low_rank":
            made["low rank"] = LowRank(num_heads, head_dim, rank=even_size(d_model / 2))
        elif name == "mla":
            rank, rope_dim = even_size(d_model / 3), even_size(d_model / 12)
            made["MLA"] = Latent(num_heads, rank, rope_dim, nope_dim=head_dim, value_dim=head_dim)
        else:
            raise ValueError(f"variants={name!r} is unknown; choose from mha, gqaN (as gqa4), mqa, low_rank, mla")
    return made


def compare_attention_variants(
    d_model: int = 512,
    num_heads: int = 8,
    *,
    depth: int = 4,
    vocab_size: int = 4096,
    context: int = 1024,
    batch: int = 8,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    variants: Mapping[str, AttentionConfig] | None = None,
    rounds: int = 5,
    tokens: int = 32,
    runs: Path | str | Rows | None = None,
    track: Track = lambda what, items: items,
) -> list[dict[str, Any]]:
    """One row a variant (label -> attention; default `attention_variants`), in a decoder of this shape.

    Parameters, cache bytes (of the arrays), matrix-product FLOPs; prefill of `batch` x `context` tokens and
    decoding of `tokens` more from that cache, timed on random weights in rounds that the variants take in
    turns (median, min, max; compilation before and apart). `decode_speed_ratio` is the first variant's time
    over this one's, within each round. `runs` are result rows, or a directory of runs: see `kvjax.trained`.
    """
    for name, value in (("batch", batch), ("rounds", rounds), ("tokens", tokens)):
        at_least(name, value, 1)
    if variants is None:
        variants = attention_variants(d_model, num_heads)
    at_least("variants", len(variants), 1)
    decoder = DecoderConfig(d_model, depth, mlp_width=16 * max(1, round(d_model / 6)))
    data, train = DataConfig(vocab_size=vocab_size, context=context), TrainConfig(dtype=dtype)
    configs = {label: Config(attention, decoder, data, train=train) for label, attention in variants.items()}
    quality = dict.fromkeys(configs) if runs is None else trained(configs, runs)
    make = lambda item: (item[0], DecodeWorkload(Case(item[1], batch, context, tokens)))
    workloads = dict(map(make, track("compile", list(configs.items()))))
    sides = {f"decode {label}": w.seconds for label, w in workloads.items()}
    sides |= {f"prefill {label}": w.prefill_seconds for label, w in workloads.items()}
    seconds = [alternate(sides, 1) for _ in track("rounds", list(range(rounds)))]
    of = lambda side: [took[side][0] for took in seconds]
    first = of(f"decode {next(iter(configs))}")
    rows = []
    for label, workload in workloads.items():
        decode, prefill = of(f"decode {label}"), of(f"prefill {label}")
        times = {
            "decode_seconds_per_token": decode,
            "decode_speed_ratio": [base / now for base, now in zip(first, decode)],
            "prefill_tokens_per_second": [batch * context / now for now in prefill],
        }
        row = {"variant": label, "batch": batch, "context": context, "rounds": rounds, "tokens": tokens}
        row |= sizes(configs[label], batch)
        row |= {name: dataclasses.asdict(Spread.of(values)) for name, values in times.items()}
        for name in ("first_prefill_seconds", "first_round_seconds"):
            row[name] = getattr(workload, name)
        rows.append(row | {"trained": quality[label], "config": to_dict(configs[label])})
    return rows


def sizes(config: Config, batch: int) -> dict[str, Any]:
    """Parameters, FLOPs per token, and bytes of `batch` rows at the context: stored (of the arrays), and read."""
    about = vocabulary(config.data), batch, config.data.context, compute_dtype(config.train.dtype)
    vocab_size, _, context, dtype = about
    params, cache = accounting.abstract_params(config, vocab_size), accounting.abstract_cache(config, *about)
    layers = params["layers"].values()
    read = accounting.bytes_read(config, *about)
    return {
        "num_kv_heads": config.attention.num_kv_heads if isinstance(config.attention, Grouped) else None,
        "dtype": dtype.name,
        "parameters": accounting.num_parameters(params),
        "attention_parameters": sum(accounting.num_parameters(layer["attention"]) for layer in layers),
        "cache_bytes_per_token": cache.bytes_per_token(),
        "cache_bytes": nbytes(cache.memory),
        "forward_flops_per_token": accounting.flops_per_token(config, vocab_size, context, training=False),
        "decode_flops_per_token": accounting.decode_flops(config, vocab_size, context, absorbed=True),
        "weight_bytes_read_per_step": read.weights,
        "cache_bytes_read_per_step": read.cache,
    }


def calculate_kv_cache_size(
    num_layers: int, num_kv_heads: int, seq_len: int, d_k: int, batch_size: int = 1, itemsize: float = 4
) -> int:
    """Bytes of keys and values: those of the arrays in a kvjax cache of this shape.

    `itemsize` is bytes a number: 4 in float32, 2 in bfloat16.
    """
    for name, value in list(locals().items()):
        positive(name, value)
    return primer.compute_kv_cache_size(seq_len, num_layers, num_kv_heads, d_k, itemsize, batch_size)


def evaluate_perplexity_vs_kv_heads(
    model_variants: Mapping[str | int, Path | str | Model],
    test_data: Path | str | Corpus,
    *,
    context: int | None = None,
    batch_size: int = 32,
    track: Track = lambda what, items: items,
) -> list[dict[str, Any]]:
    """Perplexity and bits per byte of models (label or KV heads -> directory of a run, or model), by KV heads.

    Scored through the cache, token by token, in windows of `context` tokens (by default the models'). `test_data`
    is a text file, a split of the models' own data, or tokens. ValueError for models without KV heads, of a
    number other than their key, of different contexts or tokenizers: their perplexities could not be compared.
    """
    at_least("model_variants", len(model_variants), 1)
    mesh = sharding.make_mesh(batch_size)
    opened = {key: _opened(value) for key, value in model_variants.items()}
    heads = {key: _num_kv_heads(key, model) for key, model in opened.items()}
    _require_one("tokenizer", {key: model.tokenizer.digest for key, model in opened.items()})
    if context is None:
        windows = {
            key: model.config.data.context if model.config else model.max_len for key, model in opened.items()
        }
        context = _require_one("context", windows)
        at_least("context", context or 0, 1)
    rows = []
    for key in sorted(opened, key=lambda key: heads[key]):
        model, scorer = opened[key], make_scorer(opened[key].graphdef, mesh, "decode")
        params = sharding.replicate(model.params, mesh)
        bar = lambda batches, key=key: track(str(key), batches)
        score = evaluate(scorer, params, _corpus(test_data, model), context, batch_size, mesh, bar)
        empty = lambda model=model: nnx.merge(model.graphdef, model.params).init_cache(1, context, Exact())
        about = {"variant": str(key), "num_kv_heads": heads[key], "context": context}
        about["cache_bytes_per_token"] = jax.eval_shape(empty).bytes_per_token()
        rows.append(about | score.row())
    return rows


def _opened(variant: Path | str | Model) -> Model:
    return variant if isinstance(variant, Model) else open_model(Path(variant), None)


def _num_kv_heads(key: str | int, model: Model) -> int:
    attention = nnx.merge(model.graphdef, model.params).attention
    if not isinstance(attention, Grouped):
        raise ValueError(
            f"model_variants[{key!r}] has {type(attention).__name__} attention, which has no KV heads"
        )
    if isinstance(key, int) and key != attention.num_kv_heads:
        raise ValueError(f"model_variants[{key}] must be a model of {key} KV heads, not {attention.num_kv_heads}")
    return attention.num_kv_heads


def _require_one(what: str, values: dict) -> Any:
    """The value that all models have."""
    first, *others = values
    for other in others:
        if values[other] != values[first]:
            raise ValueError(
                f"model_variants {first!r} and {other!r} must have the same {what}, not {values[first]} and "
                f"{values[other]}"
            )
    return values[first]


def _corpus(test_data: Path | str | Corpus, model: Model) -> Corpus:
    if isinstance(test_data, Corpus):
        corpus, vocab_size = test_data, model.tokenizer.vocab_size
        if corpus.ids.max() >= vocab_size:
            raise ValueError(
                f"test_data holds token {corpus.ids.max()}; it must be below the vocabulary {vocab_size}"
            )
    elif Path(test_data).is_file():
        try:
            corpus = tokenize(model.tokenizer, [Path(test_data).read_bytes()])
        except ValueError as error:
            raise ValueError(f"{test_data}: {error}") from error
    elif test_data in SPLITS:
        corpus = load_corpus(model.config.data if model.config else DataConfig(), model.tokenizer, str(test_data))
    else:
        raise ValueError(f"test_data={str(test_data)!r} must be a file of text, or one of {', '.join(SPLITS)}")
    if len(corpus.ids) == len(corpus.num_bytes):
        raise ValueError("test_data has no text to read")
    return corpus
