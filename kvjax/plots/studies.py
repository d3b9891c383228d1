"""How variants were trained: losses, learning rates, and what training on gives back to converted weights."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.paired import Row, mean_losses, rate_fit
from kvjax.plots.figure import DASHES, MARKERS, SHADES, End, Point, label_ends, pyplot
from kvjax.plots.quality import grouped, have_fewer_parameters

COLUMNS = 4
SCRATCH = "from scratch", "from scratch, more parameters"
Curves = Mapping[str, Sequence[Point]]


def loss_curves(
    curves: Curves,
    validation: Curves | None = None,
    window: int = 20,
    unit: str = "nats a token",
    title: str = "Training loss",
) -> Any:
    """Loss against training tokens, each point a mean of `window` logged ones; validation as hollow points.

    With several curves a second panel shows each less the first, at the steps both have: on paired data the
    batches' luck cancels, which is most of what moves a curve.
    """
    plt = pyplot()
    from matplotlib.ticker import EngFormatter

    several = len(curves) > 1
    figure, axes = plt.subplots(
        1, 1 + several, figsize=(6 + 5 * several, 4.6), layout="constrained", squeeze=False
    )
    reference = next(iter(curves), None)
    first = dict(curves[reference]) if reference is not None else {}
    written: list[list[End]] = [[], []]
    for place, (label, points) in enumerate(curves.items()):
        shade = SHADES[(place // 2 + place // len(DASHES)) % len(SHADES)]  # no two styles are alike
        style = {"ls": DASHES[place % len(DASHES)], "color": shade, "lw": 1.1}
        x, y = smoothed(points, window, label)
        axes[0][0].plot(x, y, label=label, **style)
        differences = [(tokens, loss - first[tokens]) for tokens, loss in points if tokens in first]
        if place and len(differences) >= window:
            x, y = smoothed(differences, window, label)
            axes[0][1].plot(x, y, **style)
            written[1].append((x[-1], y[-1], label))
        scored = (validation or {}).get(label, ())
        if scored:
            axes[0][0].plot(*zip(*scored), MARKERS[place % len(MARKERS)], color="black", mfc="white", ms=5)
    mean = f"mean of {window} logged steps" if window > 1 else "every logged step"
    axes[0][0].set(title=title, xlabel="training tokens", ylabel=f"loss ({unit}), {mean}", xscale="log")
    if curves:
        axes[0][0].legend(fontsize=8, title="hollow: validation" if validation else None, title_fontsize=8)
    if several:
        axes[0][1].axhline(0, color="0.6", lw=0.8)
        axes[0][1].set(title=f"less that of {reference}", xlabel="training tokens", ylabel=f"difference ({unit})")
        last = max(points[-1][0] for points in curves.values())
        axes[0][1].set_xlim(0, 1.3 * last)
    for axis in axes[0]:
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.grid(alpha=0.25, lw=0.6, which="both")
    figure.get_layout_engine().execute(figure)
    for axis, ends in zip(axes[0], written):
        label_ends(axis, ends)
    return figure


def smoothed(points: Sequence[Point], window: int, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Means of tokens and of losses over every run of `window` neighbours; ValueError for fewer points."""
    if not 1 <= window <= len(points):
        raise ValueError(f"window={window} must be from 1 to the {len(points)} points of {label}")
    x, y = np.asarray(points, np.float64).T
    mean = np.full(window, 1 / window)
    return np.convolve(x, mean, "valid"), np.convolve(y, mean, "valid")


def recovery(rows: Sequence[Row], title: str = "Converted weights, trained on") -> Any:
    """Bits per byte of conversions against the share of the source's steps they were trained on, by target.

    Above all of it, below the part near the source (dotted) and the same variant trained from scratch
    (dashed), whose label says where it has more parameters.
    """
    plt = pyplot()
    targets = grouped(rows, "label")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    width = max(1, len(targets))
    size = (3.1 * width + 1, 6.2)
    figure, axes = plt.subplots(
        2, width, figsize=size, layout="constrained", sharex=True, sharey="row", squeeze=False
    )
    near = []
    for column, ((label,), of_target) in enumerate(targets.items()):
        for line, (method, of_method) in enumerate(
            (m, [r for r in of_target if r["method"] == m]) for m in methods
        ):
            by_fraction = grouped(sorted(of_method, key=lambda row: row["fraction"]), "fraction")
            means = [(100 * f, float(np.mean([r["bits_per_byte"] for r in g]))) for (f,), g in by_fraction.items()]
            style = {
                "ls": DASHES[line % len(DASHES)],
                "color": SHADES[line % len(SHADES)],
                "mfc": "white",
                "ms": 6,
            }
            for axis in axes[:, column] if means else ():
                axis.plot(*zip(*means), marker=MARKERS[line], label=method, zorder=3, **style)
            near += [min(bits for _, bits in means)] if means else []
        scratch = SCRATCH[have_fewer_parameters(of_target)]
        for field, dash, name in (("source", ":", "source"), ("scratch", "--", scratch)):
            for bits in sorted({r[f"{field}_bits_per_byte"] for r in of_target} - {None}):
                near.append(bits)
                for axis in axes[:, column]:
                    axis.axhline(bits, color="0.55", ls=dash, lw=1.1, label=name, zorder=1)
        axes[0, column].set_title(f"to {label}", fontsize=10)
        axes[1, column].set_xticks(sorted({100 * row["fraction"] for row in of_target}))
    figure.supxlabel("steps trained on (% of the source's)", fontsize=10)
    axes[0, 0].set_ylabel("bits per byte, all")
    axes[1, 0].set_ylabel("bits per byte, near the source")
    if near:
        room = max(max(near) - min(near), 1e-3 * min(near))
        axes[1, 0].set_ylim(min(near) - 0.1 * room, max(near) + 0.5 * room)
    figure.suptitle(title)
    for axis in axes.flat:
        axis.grid(alpha=0.25, lw=0.6)
    drawn = {name: line for axis in axes[0] for line, name in zip(*axis.get_legend_handles_labels())}
    drawn = {name: drawn[name] for name in (*methods, "source", *SCRATCH) if name in drawn}
    if drawn:
        figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", fontsize=8)
    return figure


def rates(rows: Sequence[Row], title: str = "Learning rates") -> Any:
    """Bits per byte against peak learning rate, one panel a variant, with a parabola in log rate where three are.

    Points are means over the seeds that all rates of a variant have, dots every seed; a cross is the fitted
    optimum. A square and the title say where the best rate lies at an end of what was measured.
    """
    plt = pyplot()
    variants = grouped(rows, "label", "matching")
    several = len({matching for _, matching in variants}) > 1
    width, height = max(1, min(COLUMNS, len(variants))), max(1, math.ceil(len(variants) / COLUMNS))
    size = (3 * width + 0.6, 2.6 * height + 0.5)
    figure, axes = plt.subplots(
        height, width, figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for axis, ((label, matching), of_variant) in zip(axes.flat, variants.items()):
        told = _rates_of(axis, of_variant)
        name = f"{label} ({matching})" if several else label
        axis.set_title(f"{name}: {told}", fontsize=9)
        axis.set_xscale("log")
    measured = sorted({row["peak_lr"] for row in rows})
    for axis in axes.flat[: len(variants)]:
        axis.set_xticks(measured, [f"{rate:g}" for rate in measured], fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.25, lw=0.6)
    if rows:
        room = max(1.1, (measured[-1] / measured[0]) ** 0.12)
        axes[0, 0].set_xlim(measured[0] / room, measured[-1] * room)
    for axis in axes.flat[len(variants) :]:
        axis.axis("off")
    for axis in axes.flat[: len(variants)][-width:]:
        axis.tick_params(labelbottom=True)
    figure.suptitle(title)
    figure.supxlabel("peak learning rate", fontsize=10)
    figure.supylabel("bits per byte", fontsize=10)
    return figure


def _rates_of(axis: Any, rows: Sequence[Row]) -> str:
    """Draws one variant's rates; what to say of them."""
    dots = [(row["peak_lr"], row["bits_per_byte"]) for row in rows if row["bits_per_byte"] is not None]
    axis.plot(*zip(*dots), ".", color="0.55", ms=4, zorder=2)
    means = {rate: loss for rate, loss in sorted(mean_losses(rows)[0].items()) if math.isfinite(loss)}
    axis.plot(means.keys(), means.values(), "o", color="black", mfc="white", ms=6, zorder=3)
    if len(means) < 3:
        return "too few rates to fit"
    fit = rate_fit(rows)
    line = np.geomspace(min(means), max(means), 101)
    axis.plot(line, fit.parabola(np.log(line)), "-", color="black", lw=1, zorder=1)
    if fit.within:
        axis.plot(fit.optimum, fit.loss, "X", color="black", ms=8, mec="white", zorder=4)
    if fit.at_end:
        axis.plot(fit.best, means[fit.best], "s", color="black", mfc="none", ms=12, zorder=4)
        return f"best at an end, {fit.best:g}"
    return f"optimum {fit.optimum:.2g}"
