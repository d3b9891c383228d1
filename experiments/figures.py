"""Draw the committed rows: `python -m experiments.figures` (extra: figures).

Every figure is written to `notebooks/figures` as SVG and PNG, legible in black and white.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.report import read_rows

FIGURES = Path("notebooks/figures")
STYLES = ["-o", "--s", "-.^", ":D", "-v", "--P", "-.X"]


def decoding(rows: list[dict[str, Any]], device: str) -> Any:
    """Time of a token against what is in the cache, with it and without; and against the bytes a step reads."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["name"] for row in rows))
    style = dict(zip(names, STYLES, strict=True))
    batches = sorted({row["batch"] for row in rows})
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


def run(argv: Sequence[str]) -> int:
    """Draw every figure."""
    cli.parser("experiments.figures", __doc__).parse_args(argv)
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ValueError("figures need matplotlib: pip install -e '.[figures]'") from None
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "kvjax"
    FIGURES.mkdir(exist_ok=True)
    files = list(read_rows("decoding_growth").values())
    cores, model = files[0]["environment"]["cpu_cores"], files[0]["environment"]["cpu_model"]
    rows = [row for file in files for row in file["rows"]]
    figure = decoding(rows, f"{cores} CPU cores ({model}, shared)")
    for kind in ("svg", "png"):
        figure.savefig(FIGURES / f"decoding.{kind}", dpi=130, metadata={"Date": None} if kind == "svg" else None)
    print(f"wrote {FIGURES}/decoding.svg and .png")
    return 0


if __name__ == "__main__":
    cli.main(run)
