"""Draw the committed rows: `python -m experiments.figures` (extra: figures).

Every figure is written to `notebooks/figures` as SVG and PNG, legible in black and white.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.codec_tables import VARIANTS
from experiments.report import read_rows
from kvjax import plots
from kvjax.plots.memory import LLAMA_7B

FIGURES = Path("notebooks/figures")
FASTER = [("gqa2", "GQA-2"), ("mqa", "MQA"), ("mla", "MLA")]
DARK = 0.7  # share of the way from black to the middle below which text is white
STYLES = ["-o", "--s", "-.^", ":D", "-v", "--P", "-.X"]


def decoding(rows: list[dict[str, Any]], device: str) -> Any:
    """Time of a token against what is in the cache, with it and without; and against the bytes a step reads."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["name"] for row in rows))
    style = dict(zip(names, STYLES, strict=True))
    batches = [1, 8]
    figure, axes = plt.subplots(1, 1 + len(batches), figsize=(5 * (1 + len(batches)), 4.2), layout="constrained")
    of = lambda name, batch: [row for row in rows if row["name"] == name and row["batch"] == batch]
    for name, label in (("mha", "MHA"), ("gqa2", "GQA, 2 kv heads"), ("mla", "MLA")):
        series = of(name, 1)
        lengths = [row["filled"] for row in series]
        times = lambda key, series=series: [row[key]["median"] * 1e3 for row in series]
        cached, whole = times("seconds_per_token"), times("seconds_per_token_without_cache")
        axes[0].plot(lengths, whole, style[name], color="black", mfc="white", label=f"{label}, no cache")
        axes[0].plot(lengths, cached, style[name], color="0.45", label=f"{label}, cached")
    axes[0].set(title="One sequence, with and without its cache", xlabel="position (tokens)", yscale="log")
    for axis, batch in zip(axes[1:], batches):
        for name in names:
            series = of(name, batch)
            read = [(row["weight_bytes"] + row["cache_bytes"]) / 2**20 for row in series]
            axis.plot(read, [row["seconds_per_token"]["median"] * 1e3 for row in series], style[name], label=name)
        axis.set(title=f"Batch {batch}", xlabel="weights and cache read by a step (MiB)", yscale="log")
    for axis, ticks in zip(axes, [sorted({row["filled"] for row in rows})] + [[10, 20, 40, 80]] * len(batches)):
        axis.set(xscale="log", ylabel="time of a token for every row (ms)")
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    figure.suptitle(f"Decoding on {device}, float32", fontsize=10)
    return figure


def decoding_map(rows: list[dict[str, Any]], device: str) -> Any:
    """How many times as fast another cache decodes, at every batch and length: black on white where it pays."""
    import matplotlib.pyplot as plt
    import numpy as np

    seconds = {(row["name"], row["batch"], row["filled"]): row["seconds_per_token"]["median"] for row in rows}
    batches, lengths = (sorted({row[key] for row in rows}) for key in ("batch", "filled"))
    panels = [("mha", name, f"MHA's time / {label}'s", 2.5) for name, label in FASTER]
    panels.append(("mla expanded", "mla", "MLA: expanded / absorbed", 20.0))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.2), layout="constrained", sharey=True
    )
    for axis, (slow, fast, title, most) in zip(axes, panels):
        ratio = np.full((len(batches), len(lengths)), np.nan)
        for i, batch in enumerate(batches):
            for j, length in enumerate(lengths):
                if (slow, batch, length) not in seconds:
                    axis.text(j, i, "not run", ha="center", va="center", color="0.6", fontsize=7)
                    continue
                ratio[i, j] = seconds[slow, batch, length] / seconds[fast, batch, length]
                color = "w" if np.log(ratio[i, j] * most) < np.log(most) * DARK else "k"
                axis.text(j, i, f"{ratio[i, j]:.2f}", ha="center", va="center", color=color)
        shades = {"vmin": -np.log(most), "vmax": np.log(most)}  # grey in the middle is 1
        axis.imshow(np.log(ratio), cmap="gray", **shades, aspect="auto", origin="lower")
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=8)
        axis.set_yticks(range(len(batches)), batches)
        axis.set(title=title, xlabel="tokens in the cache")
    axes[0].set_ylabel("rows of the batch")
    figure.suptitle(f"Times as fast a token as the other (above 1 the smaller or absorbed cache wins), {device}")
    return figure


def study() -> dict[str, Any]:
    """Figures of the study, of all that it has rows for."""
    files = list(read_rows("study").values())
    of = lambda kind: [row for file in files for row in file.get(kind, [])]
    trained, converted, coded = (of(kind) for kind in ("rows", "conversions", "codecs"))
    curves = {label: points for file in files for label, points in file.get("curves", {}).items()}
    title = "Which KV cache? Variants trained alike, of equal parameters"
    title += "; converted ones have fewer" if converted else ""
    figures = {}
    if trained:
        figures["study"] = plots.quality_against_bytes(trained, converted, coded, title)
        figures["study_kv_heads"] = plots.quality_against_kv_heads(trained)
        figures["study_rates"] = plots.rates(trained)
        figures["study_curves"] = plots.loss_curves(curves, window=10)
    if converted:
        figures["study_conversions"] = plots.recovery(converted)
    return figures


def run(argv: Sequence[str]) -> int:
    """Draw every figure."""
    cli.parser("experiments.figures", __doc__).parse_args(argv)
    plots.pyplot()
    FIGURES.mkdir(exist_ok=True)
    files = list(read_rows("decoding_growth").values())
    cores, model = files[0]["environment"]["cpu_cores"], files[0]["environment"]["cpu_model"]
    rows, device = [row for file in files for row in file["rows"]], f"{cores} CPU cores ({model}, shared)"
    measured = {name: file["rows"] for name, file in read_rows("codecs_variants").items()}
    variants = {name: measured[name] for name in VARIANTS if name in measured}
    figures = {
        "decoding": decoding(rows, device),
        "decoding_map": decoding_map(rows, device),
        "decode_time": plots.decode_time_against_context(rows, f"Time of a decode step, {device}"),
        "memory": plots.memory_against_context(LLAMA_7B),
        "codecs": plots.codecs(measured["smollm2"], variants, "SmolLM2-135M: what a codec costs"),
        **study(),
    }
    for name, figure in figures.items():
        plots.save(figure, FIGURES / name)
        print(f"wrote {FIGURES}/{name}.svg and .png")
    return 0


if __name__ == "__main__":
    cli.main(run)
