import importlib
import re
from pathlib import Path

import pytest

from experiments import report

ROOT = Path(__file__).parents[2]
ROWS = report.read_rows("presets", ROOT)


@pytest.mark.parametrize("name", report.TABLES)
def test_pages_show_the_committed_rows(name):
    texts = {path: path.read_text() for path in report.pages(ROOT)}
    text, rows = texts[report.page_of(name, texts)], report.read_rows(name, ROOT)
    table = report.TABLES[name](rows)
    assert rows, "no committed rows"
    assert len(table.splitlines()) > 2, "a table has lines below its head"
    assert report.insert(text, name, table) == text, "run python -m experiments.report"


@pytest.mark.parametrize("name", ROWS)
def test_docstring_of_a_preset_tells_its_row(name):
    row, story = ROWS[name], importlib.import_module(f"configs.{name}").__doc__ or ""
    for figure in (
        f"{row['bits_per_byte']:.3f} bits per byte",
        f"perplexity {row['perplexity']:.1f}",
        f"{row['cache_bytes_per_token']:,.0f} cache bytes per token",
        f"{row['wall_seconds'] / 60:.1f} minutes",
    ):
        assert figure in story


def test_rows_are_of_the_presets_as_they_are_now():
    from experiments import cli
    from kvjax.config import from_dict

    for name, row in ROWS.items():
        assert from_dict(row["config"]) == cli.preset(name), f"{name} was changed after its run"


def test_insert_needs_its_marks():
    with pytest.raises(ValueError, match="end of presets"):
        report.insert("no marks", "presets", "table")
    marks = "<!-- presets: written by experiments.report -->", "<!-- end of presets -->"
    text = f"a\n{marks[0]}\nold\n{marks[1]}\nb"
    assert report.insert(text, "presets", "new") == text.replace("old", "new")


def test_a_table_is_on_one_page():
    a, b, mark = Path("a.md"), Path("b.md"), "<!-- presets: written by experiments.report -->"
    assert report.page_of("presets", {a: "none", b: f"x\n{mark}\n"}) == b
    for texts in ({a: "none"}, {a: mark, b: mark}):
        with pytest.raises(ValueError, match="one page must have the line"):
            report.page_of("presets", texts)


def test_links_of_pages_lead_somewhere():
    for page in report.pages(ROOT):
        links = re.findall(r"\]\(([^)#]+)", page.read_text())
        assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_no_page_has_a_table_that_is_not_written():
    named = re.compile(r"<!-- (\w+): written by experiments.report -->")
    assert {name for page in report.pages(ROOT) for name in named.findall(page.read_text())} == set(report.TABLES)
