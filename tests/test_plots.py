"""Figures: what is drawn, read back from the artists, equals rows, and t intervals worked out by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
import matplotlib.pyplot as plt
from matplotlib.container import ErrorbarContainer

from kvjax import plots
from kvjax.plots.figure import perplexity_axis
from kvjax.plots.memory import LLAMA_7B
from kvjax.plots.studies import smoothed

ROWS = Path(__file__).parents[1] / "notebooks" / "results"
BYTES_PER_TOKEN = 4.26
T2 = 4.30265  # t(0.975; 2)
VARIANTS = {  # bytes, bits per byte, query heads, kv heads, head dim
    "mha": (6144.0, 1.440, 8, 8, 24),
    "gqa4": (3072.0, 1.448, 8, 4, 24),
    "gqa2": (1536.0, 1.454, 8, 2, 24),
    "mqa": (768.0, 1.463, 8, 1, 24),
    "small": (768.0, 1.478, 4, 4, 6),
    "rank96": (1536.0, 1.459, 8, None, 24),
    "rank48": (768.0, 1.472, 8, None, 24),
    "mla64": (1280.0, 1.4525, 8, None, 24),
    "mla32": (768.0, 1.466, 8, None, 24),
    "wide": (1600.0, 1.457, 8, None, 24),
}
CODECS = {"exact": (1, 0), "fp16": (0.5, 1e-7), "int8": (0.27, 2e-4), "fp8": (0.25, 8e-4), "nvfp4": (0.14, 3e-3)}
CODECS |= {"hadamard+nvfp4": (0.147, 2.2e-3)}


plots.pyplot()


@pytest.fixture(autouse=True)
def closed(figure):
    yield
    for number in plt.get_fignums():
        if number != figure.number:
            plt.close(number)


@pytest.fixture(scope="module")
def figure():
    """Ten variants, three conversions, six codecs on each."""
    figure = plots.quality_against_bytes(trained(), converted(), coded(), "title")
    yield figure
    plt.close(figure)


def row(label, bits, **more):
    return {"label": label, "matching": "params", "bits_per_byte": bits, "perplexity": perplexity(bits), **more}


def perplexity(bits):
    return math.exp(bits * math.log(2) * BYTES_PER_TOKEN)


def trained(labels=tuple(VARIANTS), rates=(1.5e-3, 3e-3, 6e-3), seeds=3, matching="params"):
    rng, rows = np.random.default_rng(0), []
    for label in labels:
        size, bits, heads, kv_heads, width = VARIANTS[label]
        attention = {"class": "a", "num_heads": heads, "head_dim": width}
        attention |= {"rank": 48} if kv_heads is None else {"num_kv_heads": kv_heads}
        for rate in rates:
            for seed in range(seeds if rate == 3e-3 else 1):
                loss = bits + 0.02 * math.log(rate / 3.2e-3) ** 2 + rng.normal(0, 0.003)
                more = {"peak_lr": rate, "seed": seed, "cache_bytes_per_token": size, "matching": matching}
                rows.append(row(label, loss) | more | {"config": {"attention": attention}})
    return rows


def coded():
    return [
        row(label, bits + cost + 0.002 * seed, seed=seed, codec=codec, cache_bytes={"per_token": size * share})
        for label, (size, bits, *_) in VARIANTS.items()
        for codec, (share, cost) in CODECS.items()
        for seed in (0, 1)
    ]


def converted():
    references = {"source_bits_per_byte": 1.44, "scratch_bits_per_byte": None}
    return [
        row(label, 1.46 + 0.5 * math.exp(-80 * fraction), method=method, fraction=fraction)
        | {"cache_bytes_per_token": VARIANTS[label][0], **references}
        | ({"scratch_bits_per_byte": 1.454} if label == "gqa2" else {})
        for label, method in (("gqa2", "mean"), ("gqa2", "first"), ("mla64", "whitened"))
        for fraction in (0.1, 0.0, 0.05)
    ]


def bars(axis):
    """Of every point with whiskers: where it is drawn, and the whiskers' ends."""
    for container in axis.containers:
        if isinstance(container, ErrorbarContainer):
            (x,), (y,) = container.lines[0].get_data()
            segments = [tuple(s[:, 1]) for lines in container.lines[2] for s in lines.get_segments()]
            yield float(x), float(y), segments


def marks(axis, label):
    """Points of the line with this label."""
    (line,) = [line for line in axis.lines if line.get_label() == label]
    return set(zip(*map(tuple, line.get_data())))


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_trained_variants_stand_where_their_rows_say_with_t_intervals(figure):
    rows, (left, right) = trained(), figure.axes
    drawn = list(bars(left))
    assert len(drawn) == len(VARIANTS)
    for (label, (size, *_)), (x, y, segments) in zip(VARIANTS.items(), drawn):
        bits = [r["bits_per_byte"] for r in rows if r["label"] == label and r["peak_lr"] == 3e-3]
        mean, half = sum(bits) / 3, T2 * np.std(bits, ddof=1) / math.sqrt(3)
        assert (x, y) == (size, pytest.approx(mean))
        np.testing.assert_allclose(segments, [(mean - half, mean + half)], rtol=1e-6)
    assert set(VARIANTS) <= set(texts(left))
    assert left.get_xscale() == right.get_xscale() == "log"
    low, high = left.get_ylim()
    for _, _, ((bottom, top),) in drawn:
        assert low < bottom < top < high


def test_converted_variants_are_drawn_or_told_at_the_edge(figure):
    left = figure.axes[0]
    hollow = [line for line in left.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata()) == 1]
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in hollow}
    rows = converted()
    assert points == {(r["cache_bytes_per_token"], r["bits_per_byte"]) for r in rows}
    assert "↑ 2, up to 1.96" in texts(left) and "↑ 1.96" in texts(left)  # of gqa2 and of mla64, untrained
    assert left.get_ylim()[1] < 1.96


def test_every_codec_on_every_variant_and_the_front(figure):
    right = figure.axes[1]
    means = {
        (label, codec): (size * share, bits + cost + 0.001)
        for label, (size, bits, *_) in VARIANTS.items()
        for codec, (share, cost) in CODECS.items()
    }
    for codec in CODECS:
        expected = sorted(point for (_, name), point in means.items() if name == codec)
        np.testing.assert_allclose(sorted(marks(right, codec)), expected, rtol=1e-12)
    beats = lambda p, q: p != q and p[0] <= q[0] and p[1] <= q[1]
    best = {key for key, point in means.items() if not any(beats(other, point) for other in means.values())}
    steps = sorted(marks(right, "least mean at its bytes"))
    np.testing.assert_allclose(steps, sorted(means[key] for key in best), rtol=1e-12)
    assert sorted(texts(right)) == sorted(VARIANTS)  # markers tell codecs


def test_texts_of_a_crowded_figure_do_not_lie_on_each_other(figure):
    figure.draw_without_rendering()
    for axis in figure.axes:
        shown = [t for t in axis.texts if not t.get_text().startswith("↑")]
        boxes = [plt.Text.get_window_extent(text) for text in shown]
        assert len(boxes) > 9
        hidden = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
        assert not hidden
        assert all(axis.get_window_extent().padded(3).containsx(x) for box in boxes for x in (box.x0, box.x1))


def test_perplexity_beside_bits_per_byte():
    axis = plt.figure().add_subplot()
    axis.set_ylim(1.4, 1.5)
    second = perplexity_axis(axis, [(1.42, perplexity(1.42)), (1.47, perplexity(1.47))])
    axis.figure.draw_without_rendering()
    np.testing.assert_allclose(second.get_ylim(), (perplexity(1.4), perplexity(1.5)))
    assert perplexity_axis(axis, [(1.42, 70.0), (1.47, 70.0)]) is None


@pytest.mark.parametrize("given", ["converted", "coded"])
def test_groups_may_be_missing(given):
    groups = {"trained": [], "converted": [], "coded": []}
    groups[given] = globals()[given]()
    figure = plots.quality_against_bytes(**groups, title="title")
    assert len(figure.axes) == 1 and figure.axes[0].texts
    if given == "coded":
        with pytest.raises(ValueError, match="nothing to draw"):
            plots.quality_against_bytes([], [], [], "title")


def test_one_seed_has_no_whiskers():
    axis = plots.quality_against_bytes(trained(("mha", "mqa"), seeds=1), [], [], "title").axes[0]
    assert [segments for _, _, segments in bars(axis)] == [[], []]
    assert axis.get_title() == "Trained variants, one seed"


def test_panels_say_seeds_parameters_and_dtype(figure):
    left, right = figure.axes
    hollow = "Hollow: converted, larger if trained on longer"
    assert left.get_title() == f"Trained variants, means over 3 seeds, 95 % intervals\n{hollow}"
    assert right.get_title() == "Every codec on every variant, means over 2 seeds"
    assert left.get_xlabel() == "cache bytes a token, all layers"
    known = {"dtype": "bfloat16"}
    rows = [r | known for r in trained(("mha",)) + trained(("mqa",), seeds=1)]
    smaller = [r | known | {"parameters": 9, "scratch_parameters": 10} for r in converted()]
    axis = plots.quality_against_bytes(rows, smaller, [], "title").axes[0]
    first = "Trained variants, means over 1 to 3 seeds, 95 % intervals of several"
    assert axis.get_title() == f"{first}\n{hollow}; fewer parameters than from scratch"
    assert axis.get_xlabel() == "cache bytes a token, all layers, bfloat16"


def test_quality_against_kv_heads():
    rows = trained() + trained(("mha", "mqa"), matching="fixed")
    axis = plots.quality_against_kv_heads(rows).axes[0]
    runs = {
        label: [r["bits_per_byte"] for r in trained() if r["label"] == label and r["peak_lr"] == 3e-3]
        for label in ("mqa", "gqa2", "gqa4", "mha", "small")
    }
    means = {label: pytest.approx(np.mean(bits)) for label, bits in runs.items()}
    expected = [(1, means["mqa"]), (2, means["gqa2"]), (4, means["gqa4"]), (8, means["mha"])]
    assert sorted(marks(axis, "8 query heads of 24, equal parameters")) == expected
    assert marks(axis, "4 query heads of 6, equal parameters") == {(4.0, float(np.mean(runs["small"])))}
    assert len(marks(axis, "8 query heads of 24, all else equal")) == 2
    dots = {(x, y) for line in axis.lines if line.get_marker() == "." for x, y in zip(*line.get_data())}
    assert {(1, bits) for bits in runs["mqa"]} <= dots and len(dots) >= 15
    low, high = axis.get_ylim()
    assert all(low < end < high for _, _, segments in bars(axis) for end in segments[0])
    assert not plots.quality_against_kv_heads(trained(("mla64",))).axes[0].lines


def test_memory_against_context():
    """32 layers x 2 x 32 heads x 128 x 2 bytes = 512 KiB a token: 2 GiB at 4,096; 1/4, 1/8, 1/32 with fewer kv heads."""
    axis = plots.plot_memory_savings(seq_lengths=[512, 1024, 2048, 4096]).axes[0]
    drawn = [list(zip(*line.get_data())) for line in axis.lines[:4]]
    for line, part in zip(drawn, (1, 1 / 4, 1 / 8, 1 / 32)):
        assert line == [(512, part / 4), (1024, part / 2), (2048, part), (4096, 2 * part)]
    assert {line.get_ydata()[0] for line in axis.lines[4:]} == {24, 80}
    named = ["MQA: 16 KiB/token", "GQA-4: 64 KiB/token", "GQA-8: 128 KiB/token", "MHA: 512 KiB/token"]
    assert texts(axis) == ["24 GiB", "80 GiB", *named]
    two = plots.memory_against_context(
        LLAMA_7B, [32], ["float32", "float8_e4m3fn"], [1024], batch=3, budgets_gib=[]
    )
    assert [line.get_ydata()[0] for line in two.axes[0].lines] == [3.0, 0.75]


def test_decode_time_against_context():
    rows = [
        row for n in (1, 8) for row in json.loads((ROWS / f"decoding_growth/batch{n}.json").read_text())["rows"]
    ]
    figure = plots.decode_time_against_context(rows)
    assert [axis.get_title() for axis in figure.axes] == ["batch 1", "batch 8"]
    for axis, batch in zip(figure.axes, (1, 8)):
        names = list(dict.fromkeys(r["name"] for r in rows))
        for container, name in zip(axis.containers, names):
            of = [r for r in rows if (r["name"], r["batch"]) == (name, batch)]
            spread = [[r["seconds_per_token"][key] * 1e3 for key in ("min", "max")] for r in of]
            assert container.lines[0].get_xdata().tolist() == [r["filled"] for r in of]
            medians = [r["seconds_per_token"]["median"] * 1e3 for r in of]
            assert container.lines[0].get_ydata().tolist() == medians
            np.testing.assert_allclose([s[:, 1] for s in container.lines[2][0].get_segments()], spread)
        assert sorted(texts(axis)) == sorted(names)


def test_loss_curves():
    curves = {
        "mha": [(10, 5.0), (20, 4.0), (30, 3.5), (40, 3.0)],
        "mqa": [(10, 5.5), (20, 4.25), (30, 4.0), (50, 2.0)],
    }
    left, right = plots.loss_curves(curves, {"mqa": [(40, 4.4)]}, window=2).axes
    assert marks(left, "mha") == {(15, 4.5), (25, 3.75), (35, 3.25)}
    assert [list(zip(*line.get_data())) for line in left.lines if len(line.get_xdata()) == 1] == [[(40, 4.4)]]
    assert list(zip(*right.lines[0].get_data())) == [
        (15, 0.375),
        (25, 0.375),
    ]  # 0.5, 0.25, 0.5 where both were logged
    assert right.get_title() == "less that of mha" and texts(right) == ["mqa"]
    with pytest.raises(ValueError, match="window=5 must be from 1 to the 4 points of mha"):
        smoothed(curves["mha"], 5, "mha")


def test_recovery():
    rows = converted()
    figure = plots.recovery(rows)
    top, bottom = np.reshape(figure.axes, (2, 2))
    for axes in (top, bottom):
        for method in ("mean", "first"):
            of = {
                (100 * r["fraction"], r["bits_per_byte"])
                for r in rows
                if (r["label"], r["method"]) == ("gqa2", method)
            }
            assert marks(axes[0], method) == of
        assert {y for _, y in marks(axes[0], "source")} == {1.44}
        assert {y for _, y in marks(axes[0], "from scratch")} == {1.454}
        assert "from scratch" not in [line.get_label() for line in axes[1].lines]
        assert not any("more parameters" in text.get_text() for text in figure.legends[0].texts)
    larger = plots.recovery([r | {"parameters": 9, "scratch_parameters": 10} for r in rows])
    assert "from scratch, more parameters" in [text.get_text() for text in larger.legends[0].texts]
    assert top[0].get_ylim()[1] > 1.9 > bottom[0].get_ylim()[1] > 1.47 and bottom[0].get_ylim()[0] < 1.44


def test_rates():
    loss = lambda rate, bottom: 1.45 + 0.03 * math.log(rate / bottom) ** 2
    rows = [
        row(label, loss(rate, bottom), peak_lr=rate, seed=0)
        for label, bottom in (("mha", 2.5e-3), ("mqa", 9e-3))
        for rate in (1e-3, 2e-3, 4e-3)
    ]
    rows += [row("mha", 1.6, peak_lr=2e-3, seed=1), row("gqa2", 1.5, peak_lr=2e-3, seed=0)]
    rows += [row("gqa2", 1.5, peak_lr=4e-3, seed=0) | {"bits_per_byte": None}]
    mha, mqa, gqa2, *_ = plots.rates(rows).axes
    titles = ["mha: optimum 0.0025", "mqa: best at an end, 0.004", "gqa2: too few rates to fit"]
    assert [axis.get_title() for axis in (mha, mqa, gqa2)] == titles
    by_marker = lambda axis: {line.get_marker(): list(zip(*line.get_data())) for line in axis.lines}
    drawn = by_marker(mha)
    assert drawn["o"] == [(rate, pytest.approx(loss(rate, 2.5e-3))) for rate in (1e-3, 2e-3, 4e-3)]
    assert drawn["X"] == [(pytest.approx(2.5e-3), pytest.approx(1.45))] and (2e-3, 1.6) in drawn["."]
    for rate, bits in drawn["None"][::20]:
        assert bits == pytest.approx(loss(rate, 2.5e-3))
    assert "X" not in by_marker(mqa) and by_marker(mqa)["s"] == [(4e-3, pytest.approx(loss(4e-3, 9e-3)))]
    assert by_marker(gqa2)["o"] == [(2e-3, 1.5)]


@pytest.mark.parametrize(
    "draw", [plots.recovery, plots.rates, plots.decode_time_against_context, plots.quality_against_kv_heads]
)
def test_no_rows_are_an_empty_figure(draw):
    figure = draw([])
    figure.draw_without_rendering()
    assert not any(axis.lines for axis in figure.axes)
    assert not plots.loss_curves({}).axes[0].lines


def test_files_are_reproducible(tmp_path):
    for name in ("a", "b"):
        plots.save(plt.figure(figsize=(1, 1)), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_codec_figures_are_where_they_were():
    rows = json.loads((ROWS / "codecs/mqa.json").read_text())["rows"]
    axis = plots.pareto(rows, "title").axes[0]
    drawn = {(float(c.lines[0].get_xdata()[0]), float(c.lines[0].get_ydata()[0])) for c in axis.containers}
    assert drawn == {(r["cache_bytes"]["per_token"], r["perplexity"]) for r in rows}
    assert len(plots.codecs(rows, {"mqa": rows}, "title").axes) == 2
