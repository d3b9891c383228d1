"""What figures share: files, marks that need no colour, and labels beside what they name."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MARKERS = "os^Dv<>Phd*X"
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1))]
SHADES = ["0.0", "0.45", "0.65"]
"""Greys that stay apart in print."""
SIDES = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]
Point = tuple[float, float]
End = tuple[float, float, str]
Moved = tuple[float, float, float]
"""A point, and how far right of it something is drawn, in points of 1/72 inch."""
Label = tuple[float, float, str, float]
"""A point, a text, and how far right of the point its mark is drawn."""


def save(figure: Any, name: Path) -> None:
    """Writes NAME.svg and NAME.png."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "kvjax"
    for kind in ("svg", "png"):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(name.with_name(f"{name.name}.{kind}"), dpi=130, metadata=metadata)


def pyplot() -> Any:
    """matplotlib's, without a display; ValueError where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ValueError("figures need matplotlib: pip install -e '.[figures]'") from None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def bytes_axis(axis: Any, label: str, subs: Sequence[float] = (1,)) -> None:
    """A logarithmic x axis with ticks at powers of two times `subs`, in full."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set(xscale="log", xlabel=label)
    axis.xaxis.set_major_locator(LogLocator(base=2, subs=subs, numticks=99))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:,.0f}")


def perplexity_axis(axis: Any, pairs: Sequence[Point]) -> Any:
    """Perplexity at the right of an axis of bits per byte, given pairs of both.

    One is the other's exponential at a fixed number of bytes a token; None, and no axis, where pairs disagree
    on it: these are of several texts or tokenizers.
    """
    rates = [math.log(perplexity) / bits for bits, perplexity in pairs]
    if not rates or max(rates) > min(rates) * (1 + 1e-4):
        return None
    rate = float(np.median(rates))
    # Of a drawn axis; while limits are being set they may be anything.
    to_perplexity = lambda bits: np.exp(np.clip(rate * np.asarray(bits), -50, 50))
    to_bits = lambda perplexity: np.log(np.clip(perplexity, 1e-20, None)) / rate
    second = axis.secondary_yaxis("right", functions=(to_perplexity, to_bits))
    second.set_ylabel("perplexity")
    return second


def beside(axis: Any, points: float) -> Any:
    """The data's transform, moved sideways on paper: for marks that would lie on each other."""
    from matplotlib.transforms import offset_copy

    return offset_copy(axis.transData, axis.figure, x=points, units="points")


def place_labels(
    axis: Any, labels: Sequence[Label], avoid: Sequence[Moved], sides: Sequence[Point] = SIDES, size: float = 7.5
) -> None:
    """Writes texts beside their points, where they hide least; a thin line leads to one that is not close.

    To be called last, on a figure that its layout engine has laid out. `sides` come in order of preference.
    """
    unit, frame = axis.figure.dpi / 72, axis.get_window_extent()
    places = [(x, y, moved) for x, y, _, moved in labels] + list(avoid)
    points = np.array([axis.transData.transform((x, y)) + np.array([moved * unit, 0]) for x, y, moved in places])
    taken: list[tuple[float, float, float, float]] = []
    for (x, y, text, moved), point in zip(labels, points):
        drawn = axis.text(x, y, text, fontsize=size)
        extent = drawn.get_window_extent()
        drawn.remove()
        box_size = np.array([extent.width, extent.height])
        candidates = []
        for reach in (6, 13, 22, 34, 50):
            for order, side in enumerate(np.array(sides)):
                step = side * reach * unit / np.hypot(*side)
                corner = point + step + (side - 1) / 2 * box_size
                box = (*corner, *(corner + box_size))
                candidates.append((_hidden(box, points, taken, frame) + reach / 6 + order / 8, box, step / unit))
        _, box, step = min(candidates, key=lambda candidate: candidate[0])
        taken.append(box)
        arrow = {"arrowstyle": "-", "lw": 0.5, "color": "0.5", "shrinkA": 0, "shrinkB": 2}
        align = {"ha": _side(step[0], "right", "left"), "va": _side(step[1], "top", "bottom")}
        axis.annotate(
            text,
            (x, y),
            xytext=(step[0] + moved, step[1]),
            textcoords="offset points",
            fontsize=size,
            arrowprops=arrow if np.hypot(*step) > 8 else None,
            annotation_clip=False,
            zorder=5,
            **align,
        ).set_in_layout(False)


def label_ends(axis: Any, ends: Sequence[End], size: float = 8) -> None:
    """Writes texts right of the last points of lines, moved apart; to be called last, as `place_labels`."""
    unit = axis.figure.dpi / 72
    at = 0.0
    for x, y, text in sorted(ends, key=lambda end: end[1]):
        place = axis.transData.transform((x, y))[1] / unit
        at = max(place, at + 1.15 * size)
        arrow = {"arrowstyle": "-", "lw": 0.5, "color": "0.6", "shrinkA": 0, "shrinkB": 3}
        style = {"fontsize": size, "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axis.annotate(text, (x, y), xytext=(14, at - place), arrowprops=arrow, **style).set_in_layout(False)


def off_scale(axis: Any, points: Sequence[Point], top: float) -> None:
    """Says at the upper edge how many points lie above `top` at each place, and how high the highest is."""
    for x in sorted({x for x, y in points if y > top}):
        above = [y for place, y in points if place == x and y > top]
        text = f"↑ {above[0]:.2f}" if len(above) == 1 else f"↑ {len(above)}, up to {max(above):.2f}"
        axis.annotate(
            text,
            (x, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, -3),
            textcoords="offset points",
            rotation=90,
            ha="center",
            va="top",
            fontsize=6.5,
            color="0.35",
            bbox={"fc": "white", "ec": "none", "pad": 0.8},
        )


def _hidden(box, points, taken, frame) -> float:
    """How much a text in this box would hide, or be outside of the frame."""
    left, low, right, high = box
    x, y = points.T
    covered = ((x > left - 3) & (x < right + 3) & (y > low - 3) & (y < high + 3)).sum()
    crossed = sum(left < b[2] + 2 and b[0] < right + 2 and low < b[3] + 1 and b[1] < high + 1 for b in taken)
    outside = left < frame.x0 or right > frame.x1 or low < frame.y0 or high > frame.y1
    return 1.5 * covered + 60.0 * crossed + 200.0 * outside


def _side(step: float, before: str, after: str) -> str:
    return "center" if abs(step) < 1e-9 else after if step > 0 else before
