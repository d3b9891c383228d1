"""Tables from committed rows: `python -m experiments.report [--collect runs]`.

They stand in the README and in the pages of `notebooks/`, each on one of them.
`--collect DIR` first copies the result of every preset that was run in DIR to the committed rows.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.benchmark_ensemble import ensemble_table
from experiments.capacity import claims_table
from experiments.codec_tables import CODEC_TABLES, speed
from experiments.compare import comparison_table, expected_table
from experiments.study_tables import STUDY_TABLES
from kvjax import results

ROWS = Path("notebooks/results")
Rows = dict[str, dict[str, Any]]


def presets(rows: Rows) -> str:
    """One line a preset, most cache bytes first."""
    lines = [
        "| preset | parameters | cache bytes/token | validation perplexity | bits/byte | tokens/s | minutes |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: (-item[1]["cache_bytes_per_token"], item[0])):
        lines.append(
            f"| `{name}` | {row['parameters'] / 1e6:.2f} M | {row['cache_bytes_per_token']:,.0f} "
            f"| {row['perplexity']:.2f} ± {row['perplexity_se']:.2f} "
            f"| {row['bits_per_byte']:.4f} ± {row['bits_per_byte_se']:.4f} "
            f"| {row['tokens_per_second']:,.0f} | {row['wall_seconds'] / 60:.1f} |"
        )
    return "\n".join(lines)


def training_speed(rows: Rows) -> str:
    """One line a benchmark against PyTorch."""
    lines = [
        "| preset at this size | kvjax tokens/s | PyTorch tokens/s | ratio | share of matmul peak "
        "| compile s | peak resident MiB, kvjax / PyTorch |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        ours, peer = row["tokens_per_second"], row["torch"]
        spread = lambda s: f"{s['median']:,.0f} ({s['min']:,.0f} to {s['max']:,.0f})"
        lines.append(
            f"| `{name}` | {spread(ours)} | {spread(peer)} | {row['ratio_to_torch']:.2f} "
            f"| {row['share_of_matmul_peak']:.0%} | {row['compile_seconds']:.1f} "
            f"| {row['peak_resident_bytes'] / 2**20:,.0f} / {peer['peak_resident_bytes'] / 2**20:,.0f} |"
        )
    return "\n".join(lines)


def training_contexts(rows: Rows) -> str:
    """One line a context."""
    lines = [
        "| context | batch | step µs/token | attention µs/token | attention ns/token per slot of context |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in rows.values():
        for cost in row["contexts"]:
            attention = cost["attention"]["median"]
            lines.append(
                f"| {cost['context']:,} | {cost['batch_size']} | {cost['step']['median'] * 1e6:.0f} "
                f"| {attention * 1e6:.1f} | {attention * 1e9 / cost['context']:.0f} |"
            )
    return "\n".join(lines)


def decoding(rows: Rows) -> str:
    """One line a case against Hugging Face."""
    lines = [
        "| case | kvjax ms/token | Hugging Face, dynamic / static | times as fast | share of read bandwidth |",
        "|---|---:|---:|---:|---:|",
    ]
    for file in rows.values():
        for row in file["rows"]:
            ms = {side: spread["median"] * 1e3 for side, spread in row["seconds_per_token"].items()}
            lines.append(
                f"| `{row['case']}` | {ms['kvjax']:.2f} | {ms['dynamic']:.2f} / {ms['static']:.2f} "
                f"| {row['ratio_to_hf']:.2f} | {row['share_of_bandwidth']:.0%} |"
            )
    return "\n".join(lines)


def decoding_growth(rows: Rows) -> str:
    """ms/token of every preset at every batch and length, a row of the table for each preset and batch."""
    every = [row for file in rows.values() for row in file["rows"]]
    lengths = sorted({row["filled"] for row in every})
    lines = [
        f"| batch | preset | {' | '.join(f'{n:,}' for n in lengths)} | cache bytes/token | prefill tokens/s |",
        f"|---:|---|{'---:|' * (len(lengths) + 2)}",
    ]
    series: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
    for row in every:
        series.setdefault((row["batch"], row["name"]), {})[row["filled"]] = row
    for (batch, name), row in series.items():
        ms = {n: f"{r['seconds_per_token']['median'] * 1e3:.2f}" for n, r in row.items()}
        first = row[min(row)]
        lines.append(
            f"| {batch} | {name} | {' | '.join(ms.get(n, '') for n in lengths)} "
            f"| {first['cache_bytes_per_token']:,.0f} | {first['prefill_tokens_per_second']:,.0f} |"
        )
    return "\n".join(lines)


def pretrained(rows: Rows) -> str:
    """One line a text; perplexity without a cache and through it."""
    lines = [
        "| model | text | tokens | perplexity, no cache | perplexity, through the cache | bits/byte |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows.values():
        plain, cached = row["scores"]["none"], row["scores"]["decode"]
        errors = [f" ± {plain[name]:.4f}" if plain[name] else "" for name in ("perplexity_se", "bits_per_byte_se")]
        lines.append(
            f"| `{row['model']}` | {row['data']} | {plain['tokens']:,} | {plain['perplexity']:.4f}{errors[0]} "
            f"| {cached['perplexity']:.4f} | {plain['bits_per_byte']:.4f}{errors[1]} |"
        )
    return "\n".join(lines)


def downstream(rows: Rows) -> str:
    """One line a task."""
    lines = [
        "| model | task | items | chance | accuracy | accuracy per character | perplexity of the answer |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for file in rows.values():
        for task, row in file["tasks"].items():
            chance = "" if row["chance"] is None else f"{row['chance']:.1%}"
            figure = lambda name, form, row=row: (
                "" if row[name] is None else f"{row[name]:{form}} ± {row[f'{name}_se']:{form}}"
            )
            lines.append(
                f"| `{file['model']}` | {task} | {row['items']:,} of {row['items_in_all']:,} | {chance} "
                f"| {figure('accuracy', '.1%')} | {figure('accuracy_norm', '.1%')} "
                f"| {figure('perplexity', '.1f')} |"
            )
    return "\n".join(lines)


TABLES: dict[str, Callable[[Rows], str]] = {
    "presets": presets,
    "training_speed": training_speed,
    "training_contexts": training_contexts,
    "decoding": decoding,
    "decoding_growth": decoding_growth,
    "pretrained": pretrained,
    "downstream": downstream,
    "codec_speed": speed,
    "ensemble": ensemble_table,
    "comparison": comparison_table,
    "expected": expected_table,
    "claims": lambda files: claims_table([row for file in files.values() for row in file["rows"]]),
    **CODEC_TABLES,
    **STUDY_TABLES,
}
FOLDERS = {
    **dict.fromkeys(CODEC_TABLES, "codecs"),
    **dict.fromkeys(STUDY_TABLES, "study"),
    "expected": "comparison",
}
"""Of tables that do not have rows of their own."""


def insert(text: str, name: str, content: str) -> str:
    """A page with `content` between the marks of table `name`."""
    begin, end = marks(name)
    before, _, rest = text.partition(begin)
    _, closing, after = rest.partition(end)
    if not closing:
        raise ValueError(f"a page must have the line {end!r} after {begin!r}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def marks(name: str) -> tuple[str, str]:
    """The lines before and after table `name`."""
    return f"<!-- {name}: written by experiments.report -->", f"<!-- end of {name} -->"


def pages(root: Path = Path()) -> list[Path]:
    """What may hold tables."""
    return [root / "README.md", *sorted((root / "notebooks").glob("*.md"))]


def page_of(name: str, texts: Mapping[Path, str]) -> Path:
    """The page that has table `name`; ValueError where none or several have it."""
    found = [path for path, text in texts.items() if marks(name)[0] in text]
    if len(found) != 1:
        raise ValueError(f"one page must have the line {marks(name)[0]!r}; found in {list(map(str, found))}")
    return found[0]


def read_rows(name: str, root: Path = Path()) -> Rows:
    """The committed rows of table `name`, by file."""
    folder = root / ROWS / FOLDERS.get(name, name)
    return {path.stem: results.read_json(path) for path in sorted(folder.glob("*.json"))}


def run(argv: Sequence[str]) -> int:
    """Collect rows if asked to, and write the tables."""
    parser = cli.parser("experiments.report", __doc__)
    parser.add_argument("--collect", type=Path, metavar="DIR", help="directory of runs named as their presets")
    options = parser.parse_args(argv)
    if options.collect is not None:
        for row in results.read_results(options.collect):
            if row["run"] in cli.presets():
                results.write_json(ROWS / "presets" / f"{row['run']}.json", row)
    texts = {path: path.read_text() for path in pages()}
    for name, table in TABLES.items():
        page = page_of(name, texts)
        texts[page] = insert(texts[page], name, table(read_rows(name)))
    for path, text in texts.items():
        results.write_bytes(path, text.encode())
    print(f"wrote the tables of {', '.join(map(str, texts))}")
    return 0


if __name__ == "__main__":
    cli.main(run)
