"""Writes the synthetic result rows that notebooks are tested on: `python tests/notebooks/store.py`.

No model made these numbers: losses are a formula of the bytes a token, with noise of a fixed seed.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

STORE = Path(__file__).parent / "store"
ATTENTION: dict[str, dict[str, Any]] = {
    "mha": {"num_heads": 8, "num_kv_heads": 8, "head_dim": 24},
    "gqa2": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 24},
    "mqa": {"num_heads": 8, "num_kv_heads": 1, "head_dim": 24},
    "mla": {"num_heads": 8, "rank": 64, "rope_dim": 16},
}
BYTES = {"smollm2": 46_080, "mha": 6144, "gqa2": 1536, "mqa": 768, "mla": 1280}  # float32, four layers
RATES = (1.5e-3, 3e-3, 6e-3)
SEEDS = 3
CODECS = {  # the part of float32's bytes, and of bits per byte lost
    "fp16": (0.5, 0.0),
    "int8": (0.271, 0.0004),
    "fp8": (0.25, 0.002),
    "nvfp4": (0.148, 0.015),
    "k=int4,v=fp16": (0.323, 0.05),
    "k=fp16,v=int4": (0.323, 0.01),
    "k=pca17+fp16,v=fp16": (0.383, 0.2),
    "k=fp16,v=pca17+fp16": (0.383, 0.4),
}
METHODS = {"gqa2": ("mean", "first"), "mla": ("whitened",)}
NATS = 2.9  # a token, for one bit a byte
ENVIRONMENT = {"source": "synthetic: tests/notebooks/store.py", "cpu_cores": 0}


def loss(label: str, rate: float, seed: int, noise: random.Random) -> float:
    by_seed = random.Random(seed).gauss(0, 0.01)  # that variants share
    return 1.4 + 20 / BYTES[label] + 0.02 * math.log2(rate / 3e-3) ** 2 + by_seed + noise.gauss(0, 0.002)


def figures(bits: float) -> dict[str, float]:
    return {"bits_per_byte": round(bits, 6), "perplexity": round(math.exp(NATS * bits), 4)}


def trained(noise: random.Random) -> list[dict[str, Any]]:
    runs = [("rates", label, rate, 0) for label in ATTENTION for rate in RATES]
    runs += [("seeds", label, 3e-3, seed) for label in ATTENTION for seed in range(1, SEEDS)]
    return [
        {"label": label, "matching": "params", "peak_lr": rate, "seed": seed, "stage": stage}
        | figures(loss(label, rate, seed, noise))
        | {"cache_bytes_per_token": float(BYTES[label]), "parameters": 2_557_632, "tokens_per_second": 4000.0}
        | {
            "wall_seconds": 250.0,
            "config": {"attention": ATTENTION[label], "decoder": {"mlp_width": 512}},
            "environment": ENVIRONMENT,
        }
        for stage, label, rate, seed in runs
    ]


def stored(label: str, codec: str, bits: float) -> dict[str, Any]:
    """What a codec costs a model of so many bits per byte."""
    part, lost = CODECS[codec]
    percent = 100 * math.expm1(NATS * lost)
    size = {"per_token": round(BYTES[label] * part, 1), "times_smaller_than_bf16": round(0.5 / part, 3)}
    return {
        "codec": codec,
        "cache_bytes": size,
        **figures(bits + lost),
        "perplexity_exact": figures(bits)["perplexity"],
        "perplexity_percent": round(percent, 4),
        "perplexity_percent_low": round(0.8 * percent - 0.01, 4),
        "perplexity_percent_high": round(1.2 * percent + 0.01, 4),
        "kl_nats_per_token": round(lost, 6),
        "top1_agreement": round(1 - lost, 4),
    }


def study() -> dict[str, Any]:
    noise = random.Random(0)
    rows = trained(noise)
    best = [row for row in rows if row["peak_lr"] == 3e-3]
    mha = next(row for row in best if row["label"] == "mha")["bits_per_byte"]
    named = ("label", "matching", "peak_lr", "seed")
    codecs = [
        {name: row[name] for name in named}
        | {"stage": "codecs"}
        | stored(row["label"], codec, row["bits_per_byte"])
        for row in best
        for codec in ("fp16", "int8", "nvfp4")
    ]
    conversions = [
        {"label": label, "method": method, "fraction": fraction, "seed": 0}
        | figures(mha + 0.6 * 2.0 ** (-60 * fraction) * (1 + place))
        | {"source_bits_per_byte": mha, "cache_bytes_per_token": float(BYTES[label])}
        | {"scratch_bits_per_byte": next(r["bits_per_byte"] for r in best if r["label"] == label)}
        for label, methods in METHODS.items()
        for place, method in enumerate(methods)
        for fraction in (0.0, 0.01, 0.1)
    ]
    curve = lambda label, t: round(8 * t**-0.2 + 60 / BYTES[label] + noise.gauss(0, 0.05), 4)
    curves = {label: [[t * 1e4, curve(label, t)] for t in range(1, 13)] for label in ATTENTION}
    return {"rows": rows, "codecs": codecs, "conversions": conversions, "curves": curves}


def decoding() -> list[dict[str, Any]]:
    steps = {
        (label, filled): 1e-3 + 1e-10 * BYTES[label] * filled
        for label in ATTENTION
        for filled in (256, 1024, 4096)
    }
    return [
        {"name": label, "batch": 8, "filled": filled}
        | {"seconds_per_token": {"median": middle, "min": 0.9 * middle, "max": 1.2 * middle}}
        for (label, filled), middle in steps.items()
    ]


def files() -> dict[str, str]:
    """Text of every file, by its path in the store."""
    values: dict[str, Any] = {"study/rows.json": study()}
    for label in ("smollm2", "mha", "gqa2", "mla"):
        bits = 1.0 if label == "smollm2" else 1.4 + 20 / BYTES[label]
        codecs = CODECS if label == "smollm2" else ("fp16", "int8", "nvfp4")
        values[f"codecs/{label}.json"] = {"rows": [stored(label, codec, bits) for codec in codecs]}
    values["decoding_growth/batch8.json"] = {"rows": decoding(), "environment": ENVIRONMENT}
    return {name: json.dumps(value) + "\n" for name, value in values.items()}


if __name__ == "__main__":
    for name, text in files().items():
        (STORE / name).parent.mkdir(parents=True, exist_ok=True)
        (STORE / name).write_text(text)
