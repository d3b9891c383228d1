"""Notebooks run from their first cell to their last on synthetic rows, and what is committed is what their sources say."""

import base64
import runpy
from pathlib import Path

import pytest

pytest.importorskip("nbclient")
pytest.importorskip("jupytext")
pytest.importorskip("duckdb")
pytest.importorskip("matplotlib")

import nbformat

from experiments import notebooks

ROOT = Path(__file__).parents[2]
STORE = Path(__file__).parent / "store"
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
# Compiling is most of what they do.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
LARGEST = 300_000


@pytest.fixture(params=SOURCES, ids=lambda path: path.stem)
def source(request) -> Path:
    return request.param


def outputs(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_all_five_are_there():
    assert [path.stem[:2] for path in SOURCES] == ["1_", "2_", "3_", "4_", "5_"]


def test_store_is_what_its_script_writes():
    script = runpy.run_path(str(STORE.with_suffix(".py")))
    written = {path.relative_to(STORE).as_posix(): path.read_text() for path in STORE.rglob("*.json")}
    assert written == script["files"]()


def test_runs_on_synthetic_rows(source):
    environment = {"PYTHONPATH": str(ROOT), "KVJAX_RESULTS": str(STORE), "XLA_FLAGS": QUICK}
    notebook = notebooks.execute(notebooks.pair(source), source.parent, **environment)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_committed_notebook_has_the_cells_of_its_source(source):
    committed = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    fresh = notebooks.pair(source)
    cells = lambda notebook: [(cell.id, cell.cell_type, cell.source) for cell in notebook.cells]
    rule = f"run `python -m experiments.notebooks {source.stem}`"
    assert cells(committed) == cells(fresh), rule

    counts = [cell.execution_count for cell in committed.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), rule


def test_committed_notebook_shows_no_machine(source):
    path = source.with_suffix(".ipynb")
    assert path.stat().st_size < 4 * LARGEST
    committed = nbformat.read(path, as_version=4)
    nbformat.validate(committed)
    assert {output.output_type for output in outputs(committed)} <= {"execute_result", "display_data", "stream"}
    streams = {output.name for output in outputs(committed) if output.output_type == "stream"}
    assert streams <= {"stdout"}
    texts = [output.get("text", "") for output in outputs(committed)]
    for output in outputs(committed):
        texts += [text for kind, text in output.get("data", {}).items() if kind != "image/png"]
        image = output.get("data", {}).get("image/png")
        assert image is None or len(base64.b64decode(image)) < LARGEST
    unwanted = [str(ROOT), str(Path.home()), "/tmp/", "site-packages", "Warning"]
    assert [word for word in unwanted for text in texts if word in text] == []
