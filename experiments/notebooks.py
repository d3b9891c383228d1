"""Execute the notebooks: `python -m experiments.notebooks [NAME ...]` (extra: notebooks).

The sources are `notebooks/*.py`, in jupytext's percent format. Each is run from its first cell to its last in a
kernel of its own, and `notebooks/*.ipynb` gets its cells with what they print and draw, from committed rows.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from kvjax import results
from kvjax.checks import one_of
from kvjax.progress import track

NOTEBOOKS = Path("notebooks")
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
CELL_SECONDS = 600


def pair(source: Path) -> Any:
    """The notebook of a source, not executed: the same whenever it is made."""
    import jupytext

    notebook: Any = jupytext.read(source, fmt="py:percent")
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells, 1):
        cell.id, cell.metadata = f"cell-{number}", {}
    return notebook


def execute(notebook: Any, folder: Path, **environment: str) -> Any:
    """Run all cells in `folder`; CellExecutionError where one fails.

    `environment` has variables of the kernel, besides those of this process.
    """
    from nbclient import NotebookClient

    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=CELL_SECONDS, record_timing=False, resources=where)
    client.execute(env={**os.environ, **environment})
    notebook.metadata["language_info"] = {"name": "python"}  # a kernel adds its version
    return notebook


def run(argv: Sequence[str]) -> int:
    """Execute the named notebooks, or all."""
    parser = cli.parser("experiments.notebooks", __doc__)
    names = sorted(path.stem for path in NOTEBOOKS.glob("*.py"))
    parser.add_argument("name", nargs="*", metavar="NAME", help=f"of {', '.join(names)} (default: all)")
    options = parser.parse_args(argv)
    try:
        import jupytext  # noqa: F401
        import nbclient  # noqa: F401
        import nbformat
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing; notebooks need pip install -e '.[notebooks]'") from None
    for name in options.name:
        one_of("NAME", name, tuple(names))
    for name in track("notebooks", options.name or names):
        notebook = execute(pair(NOTEBOOKS / f"{name}.py"), NOTEBOOKS, PYTHONPATH=str(Path.cwd()))
        results.write_bytes(NOTEBOOKS / f"{name}.ipynb", (nbformat.writes(notebook) + "\n").encode())
        print(f"wrote {NOTEBOOKS}/{name}.ipynb", flush=True)
    return 0


if __name__ == "__main__":
    cli.main(run)
