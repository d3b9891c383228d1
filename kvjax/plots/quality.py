"""Quality against what a cached token costs: trained variants, converted ones, and every codec on each."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.compress import on_front
from kvjax.paired import Row, at_best_rate, t_interval
from kvjax.plots.figure import (
    DASHES,
    MARKERS,
    SHADES,
    Label,
    Moved,
    Point,
    beside,
    bytes_axis,
    off_scale,
    perplexity_axis,
    place_labels,
    pyplot,
)

MATCHED = {"params": "o", "fixed": "s", "kv_bytes": "^", "train_flops": "D"}
"""Marker of what a trained variant has in common with its reference."""
EQUAL = {
    "params": "equal parameters",
    "fixed": "all else equal",
    "kv_bytes": "equal cache bytes",
    "train_flops": "equal training FLOPs",
}
BELOW = [(-1, -1), (0, -1), (-1, 0), (1, -1), (1, 0), (0, 1), (-1, 1), (1, 1)]
HOLLOW = MARKERS[4:]
APART = 7.0  # points between marks of equal bytes


def grouped(rows: Sequence[Row], *fields: str) -> dict[tuple, list[Row]]:
    """Rows by the values of these fields, in the order in which they are first met."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[field] for field in fields), []).append(row)
    return groups


def best_runs(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """By label and matching, the runs of every seed at their own best rate."""
    return {key: list(at_best_rate(group).values()) for key, group in grouped(rows, "label", "matching").items()}


def whisker(axis: Any, x: float, bits: Sequence[float], **style: Any) -> tuple[float, float]:
    """The mean of seeds with its 95 % t interval, which is returned; a bare point for one seed."""
    mean, interval = float(np.mean(bits)), t_interval(bits)
    low, high = interval or (mean, mean)
    spread = [[mean - low], [high - mean]] if interval else None
    axis.errorbar(x, mean, spread, capsize=2.5, elinewidth=0.9, **style)
    axis.update_datalim([(x, low), (x, high)])  # which marks drawn aside leave as it was
    return low, high


def over_seeds(numbers: Sequence[int]) -> str:
    """What points are, given the number of seeds of each."""
    low, high = min(numbers), max(numbers)
    if high == 1:
        return "one seed"
    return f"means over {high if low == high else f'{low} to {high}'} seeds"


def have_fewer_parameters(converted: Sequence[Row]) -> bool:
    """Whether conversions have fewer parameters than those trained from scratch; False if not known."""
    pairs = [(row.get("parameters"), row.get("scratch_parameters")) for row in converted]
    return any(own is not None and scratch is not None and own < scratch for own, scratch in pairs)


def quality_against_bytes(
    trained: Sequence[Row], converted: Sequence[Row], coded: Sequence[Row], title: str
) -> Any:
    """Bits per byte (and perplexity) against cache bytes a token, in up to two panels; ValueError without rows.

    Left: trained variants at their own best rate, means over seeds with 95 % t intervals where there are several,
    and converted ones, as cached in the rows' `dtype`. Right: every codec on every variant, means over seeds, by
    the text that codecs were scored on. Steps join what no other point beats in one measure and equals or beats
    in the other. Marks of equal bytes stand side by side; points far above are written at the edge.
    """
    panels = [panel for panel, rows in ((_trained, [*trained, *converted]), (_coded, coded)) if rows]
    if not panels:
        raise ValueError("trained, converted and coded hold no rows: there is nothing to draw")
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(panels), figsize=(7.2 * len(panels), 6.4), layout="constrained", squeeze=False
    )
    figure.suptitle(title)
    written = [
        _trained(axis, trained, converted) if panel is _trained else _coded(axis, coded)
        for axis, panel in zip(axes[0], panels)
    ]
    for axis in axes[0]:
        axis.grid(alpha=0.25, which="both", lw=0.6)
        axis.set(ylabel="bits per byte")
        axis.margins(x=0.12)
        axis.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.11), frameon=False)
    figure.get_layout_engine().execute(figure)
    for axis, (labels, avoid) in zip(axes[0], written):
        place_labels(axis, labels, avoid, BELOW)
    return figure


def _trained(axis: Any, trained: Sequence[Row], converted: Sequence[Row]) -> tuple[list[Label], list[Moved]]:
    """Draws both; the texts to write, and what they must not hide."""
    runs = best_runs(trained)
    several = len({matching for _, matching in runs}) > 1
    points, labels, avoid = [], [], []
    sizes = [rows[0]["cache_bytes_per_token"] for rows in runs.values()]
    for ((label, matching), rows), x, moved in zip(runs.items(), sizes, _apart(sizes)):
        bits = [row["bits_per_byte"] for row in rows]
        style = {"fmt": MATCHED[matching], "color": "black", "ms": 6, "zorder": 3}
        low, high = whisker(axis, x, bits, transform=beside(axis, moved), **style)
        points.append((x, float(np.mean(bits))))
        labels.append((*points[-1], f"{label}, {EQUAL[matching]}" if several else label, moved))
        avoid += [(x, y, moved) for y in np.linspace(low, high, 9)]
    heights = [y for _, y, _ in avoid]
    shown, above, top = _converted(axis, converted, heights)
    for matching in dict.fromkeys(matching for _, matching in runs) if several else ():
        axis.plot([], [], MATCHED[matching], color="black", label=f"trained, {EQUAL[matching]}")
    front = _front(axis, [*points, *shown])
    _limit(axis, [*heights, *(y for _, y in shown)], top, above)
    dtypes = sorted({row["dtype"] for row in [*trained, *converted] if "dtype" in row})
    bytes_axis(axis, ", ".join(["cache bytes a token, all layers", *dtypes]), (1, 1.5))
    axis.set_title(_title([len(rows) for rows in runs.values()], converted), fontsize=10)
    perplexity_axis(axis, _pairs([*(row for rows in runs.values() for row in rows), *converted]))
    return labels, [*avoid, *((x, y, 0.0) for x, y in shown), *_along(_steps(front))]


def _title(seeds: Sequence[int], converted: Sequence[Row]) -> str:
    lines = []
    if seeds:
        intervals = "" if max(seeds) == 1 else ", 95 % intervals" + (" of several" if min(seeds) == 1 else "")
        lines.append(f"Trained variants, {over_seeds(seeds)}{intervals}")
    if converted:
        fewer = "; fewer parameters than from scratch" if have_fewer_parameters(converted) else ""
        lines.append(f"{'Hollow: converted' if seeds else 'Converted'}, larger if trained on longer{fewer}")
    return "\n".join(lines)


def _converted(axis: Any, rows: Sequence[Row], trained: Sequence[float]) -> tuple[list[Point], list[Point], float]:
    """Draws hollow marks that grow with training; the points within the axis, those above, and where it ends."""
    lines: dict[tuple, dict[float, Point]] = {}
    for (label, method, fraction), of in grouped(rows, "label", "method", "fraction").items():
        point = of[0]["cache_bytes_per_token"], float(np.mean([row["bits_per_byte"] for row in of]))
        lines.setdefault((label, method), {})[fraction] = point
    points = [point for line in lines.values() for point in line.values()]
    top = _top(trained, [y for _, y in points])
    methods = list(dict.fromkeys(row["method"] for row in rows))
    style = [{"color": SHADES[n % len(SHADES)], "mfc": "white", "marker": HOLLOW[n]} for n in range(len(methods))]
    places = _apart([next(iter(line.values()))[0] for line in lines.values()])
    for ((_, method), line), moved in zip(lines.items(), places):
        transform = beside(axis, moved)
        axis.plot(*zip(*line.values()), color="0.8", lw=0.7, zorder=1, transform=transform)
        for fraction, point in line.items():
            kind = style[methods.index(method)]
            axis.plot(*point, ms=4 + 25 * min(fraction, 0.2), zorder=2, transform=transform, **kind)
    for method, kind in zip(methods, style):
        axis.plot([], [], ls="", label=f"converted by {method}", **kind)
    return [p for p in points if p[1] <= top], [p for p in points if p[1] > top], top


def _apart(sizes: Sequence[float]) -> list[float]:
    """How far to the right marks are drawn, so that those of equal bytes stand side by side."""
    equal = [[i for i, other in enumerate(sizes) if other == size] for size in sizes]
    return [APART * (group.index(i) - (len(group) - 1) / 2) for i, group in enumerate(equal)]


def _coded(axis: Any, coded: Sequence[Row]) -> tuple[list[Label], list[Moved]]:
    """Draws every codec on every variant; the texts to write, and what they must not hide."""
    several = len({row["matching"] for row in coded}) > 1
    groups = grouped(coded, "label", "matching", "codec")
    means = {
        key: (float(rows[0]["cache_bytes"]["per_token"]), float(np.mean([row["bits_per_byte"] for row in rows])))
        for key, rows in groups.items()
    }
    lines: dict[tuple, list[Point]] = {}
    for key, point in means.items():
        lines.setdefault(key[:2], []).append(point)
    for line in lines.values():
        line.sort(reverse=True)
        axis.plot(*zip(*line), color="0.7", lw=0.8, zorder=1)
    for place, codec in enumerate(dict.fromkeys(row["codec"] for row in coded)):
        style = {"ls": "", "ms": 5, "mfc": "black" if place % 2 == 0 else "white", "zorder": 3}
        points = [point for key, point in means.items() if key[2] == codec]
        axis.plot(*zip(*points), marker=MARKERS[place % len(MARKERS)], color="black", label=codec, **style)
    top = _top([line[0][1] for line in lines.values()], [y for _, y in means.values()])
    shown = [point for point in means.values() if point[1] <= top]
    front = _front(axis, shown)
    _limit(axis, [y for _, y in shown], top, [point for point in means.values() if point[1] > top])
    name = lambda variant: f"{variant[0]}, {EQUAL[variant[1]]}" if several else variant[0]
    labels = [(*line[0], name(variant), 0.0) for variant, line in lines.items()]
    bytes_axis(axis, "cache bytes a token, all layers, as stored")
    many = over_seeds([len(rows) for rows in groups.values()])
    axis.set_title(f"Every codec on every variant, {many}", fontsize=10)
    perplexity_axis(axis, _pairs(coded))
    along = [point for line in lines.values() for point in _along(line)]
    return labels, [*((x, y, 0.0) for x, y in shown), *along, *_along(_steps(front))]


def _front(axis: Any, points: Sequence[Point]) -> list[Point]:
    """Draws the steps that join the best points, which are returned."""
    best = sorted({point for point, front in zip(points, on_front(points)) if front})
    axis.step(*zip(*best), where="post", color="0.25", lw=1.1, ls="--", zorder=0, label="least mean at its bytes")
    return best


def _steps(points: Sequence[Point]) -> list[Point]:
    """Corners of the line that `_front` draws."""
    return [corner for (x, y), (after, _) in itertools.pairwise(points) for corner in ((x, y), (after, y))] + list(
        points[-1:]
    )


def _along(line: Sequence[Point]) -> list[Moved]:
    """Points on a line whose x axis is logarithmic."""
    return [
        (x ** (1 - t) * to_x**t, y * (1 - t) + to_y * t, 0.0)
        for (x, y), (to_x, to_y) in itertools.pairwise(line)
        for t in np.linspace(0, 1, 7)
    ]


def _top(known: Sequence[float], others: Sequence[float]) -> float:
    """Where the axis ends: others much worse than what is known would press all else together."""
    known = known or [min(others, default=1.0)]
    reach = max(max(known) - min(known), 0.02 * min(known))
    return max(known) + 0.5 * reach


def _limit(axis: Any, shown: Sequence[float], top: float, above: Sequence[Point]) -> None:
    low, high = min(shown), max(shown)
    room = high - low or 0.02 * low
    axis.set_ylim(low - 0.12 * room, high + (0.25 if above else 0.08) * room)
    off_scale(axis, above, top)


def _pairs(rows: Sequence[Row]) -> list[Point]:
    return [(row["bits_per_byte"], row["perplexity"]) for row in rows]


def quality_against_kv_heads(rows: Sequence[Row], title: str = "Quality against kv heads") -> Any:
    """Bits per byte and perplexity against kv heads of grouped attention, at every variant's own best rate.

    Means over seeds with 95 % t intervals, and every seed as a dot. A line joins variants that differ in kv heads
    alone; other attention is left out.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.6, 4.6), layout="constrained")
    series: dict[tuple, dict[int, list[Row]]] = {}
    for (_, matching), runs in best_runs([row for row in rows if _is_grouped(row)]).items():
        attention = dict(runs[0]["config"]["attention"])
        kv_heads = attention.pop("num_kv_heads")
        name = matching, attention["num_heads"], attention["head_dim"], repr(sorted(attention.items()))
        series.setdefault(name, {})[kv_heads] = runs
    for place, ((matching, heads, width, _), by_heads) in enumerate(
        sorted(series.items(), key=lambda s: -len(s[1]))
    ):
        shade, moved = SHADES[place % len(SHADES)], 2 * APART * (place - (len(series) - 1) / 2)
        places = sorted(by_heads)
        for kv_heads in places:
            bits = [row["bits_per_byte"] for row in by_heads[kv_heads]]
            style = {"fmt": MARKERS[place % len(MARKERS)], "color": shade, "ms": 7, "mfc": "white"}
            whisker(axis, kv_heads, bits, zorder=3, transform=beside(axis, moved), **style)
            aside = beside(axis, moved - APART)
            axis.plot([kv_heads] * len(bits), bits, ".", color=shade, ms=3.5, zorder=2, transform=aside)
        means = [float(np.mean([row["bits_per_byte"] for row in by_heads[k]])) for k in places]
        label = f"{heads} query heads of {width}, {EQUAL[matching]}"
        marked = {"marker": MARKERS[place % len(MARKERS)], "mfc": "white", "ms": 7, "zorder": 1}
        marked["transform"] = beside(axis, moved)
        axis.plot(places, means, ls=DASHES[place % len(DASHES)], color=shade, label=label, **marked)
    drawn = sorted({kv_heads for by_heads in series.values() for kv_heads in by_heads})
    axis.set(title=title, xlabel="kv heads (1: MQA; as many as query heads: MHA)", ylabel="bits per byte")
    if drawn:
        axis.set_xscale("log")
        axis.set_xticks(drawn, [str(kv_heads) for kv_heads in drawn])
        axis.minorticks_off()
        axis.set_xlim(drawn[0] * 0.8, drawn[-1] * 1.25)
        axis.legend(fontsize=8)
    axis.grid(alpha=0.25, lw=0.6)
    perplexity_axis(
        axis, _pairs([row for by_heads in series.values() for runs in by_heads.values() for row in runs])
    )
    return figure


def _is_grouped(row: Mapping[str, Any]) -> bool:
    return "num_kv_heads" in row["config"]["attention"]
