"""Markdown tables of the README from committed rows: `python -m experiments.report [--collect runs]`.

`--collect DIR` first copies the result of every preset that was run in DIR to the committed rows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from kvjax import results

ROWS = Path("notebooks/results/presets")
BEGIN, END = "<!-- presets: written by experiments.report -->", "<!-- end of presets -->"


def table(rows: dict[str, dict[str, Any]]) -> str:
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


def insert(text: str, content: str) -> str:
    """The README with `content` between its marks."""
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise ValueError(f"README.md must have the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def read_rows(folder: Path = ROWS) -> dict[str, dict[str, Any]]:
    """The committed rows, by preset."""
    return {path.stem: results.read_json(path) for path in sorted(folder.glob("*.json"))}


def run(argv: Sequence[str]) -> int:
    """Collect rows if asked to, and write the tables."""
    parser = cli.parser("experiments.report", __doc__)
    parser.add_argument("--collect", type=Path, metavar="DIR", help="directory of runs named as their presets")
    options = parser.parse_args(argv)
    if options.collect is not None:
        for row in results.read_results(options.collect):
            if row["run"] in cli.presets():
                results.write_json(ROWS / f"{row['run']}.json", row)
    readme = Path("README.md")
    results.write_bytes(readme, insert(readme.read_text(), table(read_rows())).encode())
    print(f"wrote the tables of {readme}")
    return 0


if __name__ == "__main__":
    cli.main(run)
