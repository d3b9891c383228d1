from pathlib import Path

import pytest

from experiments import figures

ROOT = Path(__file__).parents[2]


def test_committed_figures_are_those_drawn_from_the_committed_rows(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    assert figures.run([]) == 0
    committed = {path.name for path in (ROOT / "notebooks" / "figures").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == committed
