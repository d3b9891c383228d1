"""Tables of what codecs cost, from committed rows; which codecs belong to which study.

A study names codecs as `experiments.compress` takes them. Rows that were not run are left out.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kvjax.recipes import parse

Rows = dict[str, dict[str, Any]]

RANKS = ("60", "56", "48", "32")
PLUGIN = [
    "fp16",
    *(f"k=fp16,v=pca{rank}+fp16" for rank in RANKS),
    *(f"k=fp16,v=pca{rank}+fp16,sinks=1" for rank in RANKS),
    *(f"k=fp16,v=pca{rank}+int8" for rank in RANKS),
    "k=fp16,v=pca60+int8,sinks=1",
    "k=fp16,v=random56+fp16",
    "k=fp16,v=random32+fp16",
    "k=fp16,v=random56+fp16,sinks=1",
    *(f"k=pca{rank}+fp16,v=fp16" for rank in RANKS),
    "k=fp16,v=int8",
    "k=fp16,v=fp8",
    "int8",
    "fp8",
]
LAB = [
    *("fp16", "int8", "fp8", "fp8:scale1", "fp8:b128", "mxfp8"),
    *("nvfp4", "hadamard+nvfp4", "mxfp4", "int4", "int4:g32:asym", "kivi4", "kivi2"),
]
TRUNCATIONS = [  # what of, text with rank and options
    ("K after RoPE", "k=pca{}+fp16,v=fp16"),
    ("K before RoPE", "k=pca{}+fp16,v=fp16,keys=before_rope"),
    ("K after RoPE, weighted by queries", "k=query{}+fp16,v=fp16"),
    ("V", "k=fp16,v=pca{}+fp16"),
    ("V, weighted through W_O", "k=fp16,v=output{}+fp16"),
]
QUANTIZED = [
    ("K after RoPE", "k={},v=fp16"),
    ("K before RoPE", "k={},v=fp16,keys=before_rope"),
    ("V", "k=fp16,v={}"),
]
VARIANTS = ("mha", "gqa4", "gqa2", "mqa", "low_rank", "mla")


def listed(codecs: Sequence[str], model: str, rows: Rows) -> str:
    """One line a codec, in the study's order."""
    lines = [
        "| codec | bytes/token | against bf16 | perplexity | against exact (95 %) | KL, nats | same top token |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    found = _by_codec(rows[model]) if model in rows else {}
    for codec in codecs:
        row = found.get(parse(codec).text)
        if row is not None:
            size = row["cache_bytes"]
            lines.append(
                f"| `{codec}` | {size['per_token']:,.0f} | {size['times_smaller_than_bf16']:.2f}x "
                f"| {row['perplexity']:.2f} | {change(row)} | {row['kl_nats_per_token']:.4f} "
                f"| {row['top1_agreement']:.1%} |"
            )
    return "\n".join(lines)


def fragility(rows: Rows) -> str:
    """Truncation and quantization of keys and of values at equal bytes of the array."""
    lines = [
        "| array | how | 8.25 bits | 8.25 bits, first token exact | 4.25 bits | 4.25 bits, first token exact |",
        "|---|---|---:|---:|---:|---:|",
    ]
    found = _by_codec(rows["smollm2"]) if "smollm2" in rows else {}

    def line(array, how, text, sizes):
        texts = [text.format(size) + sinks for size in sizes for sinks in ("", ",sinks=1")]
        cells = [found.get(parse(text).text) for text in texts]
        if any(cells):
            lines.append(
                f"| {array} | {how} | " + " | ".join("" if c is None else change(c) for c in cells) + " |"
            )

    for array, text in QUANTIZED:
        line(array, "quantized, INT8 and INT4", text, ("int8", "int4"))
    for array, text in TRUNCATIONS:
        line(array, "truncated to 33 and 17 of 64 dimensions", text, ("33", "17"))
        line(array, "truncated, no mean subtracted", text, ("33:nomean", "17:nomean"))
    return "\n".join(lines)


def variants(rows: Rows) -> str:
    """One line a codec, a column a trained variant: bytes a token, and what perplexity loses."""
    models = [name for name in VARIANTS if name in rows]
    found = {name: _by_codec(rows[name]) for name in models}
    lines = ["| codec | " + " | ".join(models) + " |", "|---|" + "---:|" * len(models)]
    codecs = dict.fromkeys(row["codec"] for name in models for row in rows[name]["rows"])
    for codec in codecs:
        cells = [found[name].get(codec) for name in models]
        if sum(cell is not None for cell in cells) > 1:
            texts = [
                "" if c is None else f"{c['cache_bytes']['per_token']:,.0f} B, {c['perplexity_percent']:+.2f} %"
                for c in cells
            ]
            lines.append(f"| `{codec}` | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def latents(rows: Rows) -> str:
    """Codecs that treat an MLA's latent and rotary key apart."""
    if "mla" not in rows:
        return ""
    codecs = [row["codec"] for row in rows["mla"]["rows"]]
    return listed([codec for codec in codecs if "=" in codec or codec in ("fp16", "int8", "nvfp4")], "mla", rows)


def stress(rows: Rows) -> str:
    """One line a stressed model, a column a codec: what perplexity loses against its own exact cache."""
    if "stress" not in rows:
        return ""
    models = rows["stress"]["rows"]
    codecs = list(models[0]["codecs"])
    lines = ["| model | exact | " + " | ".join(f"`{codec}`" for codec in codecs) + " |"]
    lines.append("|---|---:|" + "---:|" * len(codecs))
    for model in models:
        cells = [change(model["codecs"][codec]) for codec in codecs]
        lines.append(f"| {model['model']} | {model['perplexity_exact']:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed(rows: Rows) -> str:
    """One line a codec, timed in turns with the exact cache."""
    heads = ("codec", "cache bytes/token", "ms a token", "times as fast as exact", "encoding, us a token")
    heads += ("temporaries, of the float32 cache", "batch of this context in 8 GiB")
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * 6]
    for row in (row for file in rows.values() for row in file["rows"]):
        middle, low, high = (row["seconds_per_token"][name] * 1e3 for name in ("median", "min", "max"))
        cells = [
            f"`{row['codec']}`",
            f"{row['cache_bytes_per_token']:,.0f}",
            f"{middle:.1f} ({low:.1f} to {high:.1f})",
            f"{row['ratio_to_exact']:.2f}",
            f"{row['encode_seconds_per_token'] * 1e6:,.0f}",
            f"{row['temporary_part_of_exact_cache']:.1%}",
            f"{row['largest_batch']:,}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def change(row: dict[str, Any]) -> str:
    """Percent of perplexity against the exact cache, with its interval."""
    low, high = row["perplexity_percent_low"], row["perplexity_percent_high"]
    text = _percent(row["perplexity_percent"])
    return text + " %" if low is None else f"{text} % ({_percent(low)}, {_percent(high)})"


def _percent(value: float) -> str:
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value + 0.0:+,.{digits}f}"


def _by_codec(file: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["codec"]: row for row in file["rows"]}


CODEC_TABLES: dict[str, Callable[[Rows], str]] = {
    "codecs_plugin": partial(listed, PLUGIN, "smollm2"),
    "codecs_fragility": fragility,
    "codecs_lab": partial(listed, LAB, "smollm2"),
    "codecs_variants": variants,
    "codecs_latents": latents,
    "codecs_stress": stress,
}
"""Tables whose rows are all in `notebooks/results/codecs`, a file a model."""
