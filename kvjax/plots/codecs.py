"""What codecs cost: perplexity against bytes."""

from collections.abc import Sequence
from typing import Any

from kvjax.compress import on_front
from kvjax.plots.figure import MARKERS, pyplot


def pareto(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """Perplexity against bytes a token, one point a codec with its paired 95 % interval; a line joins the best."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    points = [(row["cache_bytes"]["per_token"], row["perplexity"]) for row in rows]
    best = sorted(point for point, front in zip(points, on_front(points)) if front)
    axis.step(*zip(*best), where="post", color="0.7", zorder=0, label="no codec is better in both")
    for number, (row, (size, perplexity)) in enumerate(zip(rows, points)):
        exact = row["perplexity_exact"]
        bounds = [row[f"perplexity_percent_{side}"] for side in ("low", "high")]
        spread = None
        if None not in bounds:
            low, high = (exact * (1 + bound / 100) for bound in bounds)
            spread = [[max(0.0, perplexity - low)], [max(0.0, high - perplexity)]]
        marker, shade = MARKERS[number % len(MARKERS)], str(0.6 * (number // len(MARKERS) % 2))
        axis.errorbar(
            size, perplexity, spread, fmt=marker, color=shade, mfc="white", capsize=2, label=row["codec"]
        )
    axis.axhline(rows[0]["perplexity_exact"], color="0.7", ls=":", label="exact")
    axis.set(
        title=title, xlabel="bytes a cached token, all layers", ylabel="perplexity", xscale="log", yscale="log"
    )
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=6, ncols=1 + len(rows) // 24, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


KINDS = {
    "quantized": ("o", "black", "black"),
    "truncated": ("^", "0.45", "white"),
    "truncated, first token exact": ("v", "0.45", "0.45"),
    "truncated and quantized": ("s", "0.45", "white"),
}
"""Marker, edge and face of what a codec does."""
LINES = ["-o", "--s", "-.^", ":D", "-v", "--P"]


def codecs(model: Sequence[dict[str, Any]], variants: dict[str, Sequence[dict[str, Any]]], title: str) -> Any:
    """What codecs cost one model, by kind; and trained variants under the same formats, in one plot."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    for kind, (marker, edge, face) in KINDS.items():
        rows = [row for row in model if _kind(row["codec"]) == kind and row["perplexity_percent"] > FLOOR]
        size = [row["cache_bytes"]["per_token"] for row in rows]
        loss = [row["perplexity_percent"] for row in rows]
        spread = [[0.0] * len(rows), [0.0] * len(rows)]
        for i, row in enumerate(rows):
            low, high = row["perplexity_percent_low"], row["perplexity_percent_high"]
            spread[0][i], spread[1][i] = loss[i] - max(low, FLOOR / 2), high - loss[i]
        style = {"fmt": marker, "color": edge, "mfc": face, "capsize": 2, "lw": 0.7}
        left.errorbar(size, loss, spread, label=kind, **style)
    for row in model:
        if row["codec"] in LABELS and row["perplexity_percent"] > FLOOR:
            label, right_of = LABELS[row["codec"]]
            place = row["cache_bytes"]["per_token"], row["perplexity_percent"]
            style = {"fontsize": 7, "textcoords": "offset points", "ha": "left" if right_of else "right"}
            left.annotate(label, place, xytext=(6 if right_of else -6, -3), **style)
    left.set(title=title, xlabel="bytes a cached token, all layers", yscale="log")
    left.set_ylabel("perplexity above the exact cache's (%)")
    for line, (name, rows) in zip(LINES, variants.items()):
        found = {row["codec"]: row for row in rows}
        points = [found[codec] for codec in FORMATS if codec in found]
        size = [row["cache_bytes"]["per_token"] for row in points]
        right.plot(size, [row["bits_per_byte"] for row in points], line, color="black", mfc="white", label=name)
    right.set(title="Trained variants, each as " + ", ".join(FORMATS), xlabel="bytes a cached token, all layers")
    right.set(ylabel="bits per byte", xscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    return figure


FLOOR = 0.005  # percent below which a difference is not drawn
FORMATS = ("fp16", "int8", "nvfp4")
LABELS = {
    "int8": ("INT8", True),
    "fp8": ("FP8", False),
    "nvfp4": ("NVFP4", True),
    "mxfp4": ("MXFP4", True),
    "int4:g32:asym": ("INT4, groups of 32", True),
    "k=int4:channel32,v=int4:g32:asym": ("KIVI-4", True),
    "k=int2:channel32:r128,v=int2:g32:asym": ("KIVI-2", True),
}
"""Codecs named in the plot, and whether on their right."""


def _kind(codec: str) -> str:
    fitted = any(name in codec for name in ("pca", "query", "output", "random"))
    if not fitted:
        return "quantized"
    if any(name in codec for name in ("+int", "+nvfp4", "+fp8", "+mx")):
        return "truncated and quantized"
    return "truncated, first token exact" if "sinks=" in codec else "truncated"
