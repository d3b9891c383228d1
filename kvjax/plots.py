"""Figures of result rows: titled, with units, legible in black and white; SVG and PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvjax.compress import on_front

MARKERS = "os^Dv<>Phd*X"


def save(figure: Any, name: Path) -> None:
    """Writes NAME.svg and NAME.png."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "kvjax"
    for kind in ("svg", "png"):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(name.with_name(f"{name.name}.{kind}"), dpi=130, metadata=metadata)


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


def pyplot() -> Any:
    """matplotlib's, without a display; ValueError where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ValueError("figures need matplotlib: pip install -e '.[figures]'") from None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
