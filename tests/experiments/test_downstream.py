"""Downstream tasks of a trained run, at the command line."""

import json

import pytest

from experiments import downstream
from kvjax import host
from kvjax.tasks import Item, Request, draw

ITEMS = [
    Item(i, tuple(Request(f"What is {i}?", f" {answer}") for answer in ("a number", "no idea", "it")), i % 3)
    for i in range(9)
]
WORDS = [Item(i, (Request(f"It is {i}", " now"),), 0) for i in range(9)]


@pytest.fixture(autouse=True)
def little(monkeypatch):
    monkeypatch.setattr(host, "prepare", lambda batch_size: None)
    monkeypatch.setattr(downstream, "load_items", lambda task: WORDS if task == "lambada" else ITEMS)


def test_a_table_with_errors_and_chance(trained, tmp_path, command, capsys):
    from kvjax.downstream import LikelihoodScorer, evaluate_task
    from kvjax.model import open_model

    file = tmp_path / "row.json"
    arguments = ["--run", trained, "--tasks", "hellaswag", "lambada", "--limit", 5, "--seed", 3, "--json", file]
    assert command(downstream.run, [*arguments, "--cache", "prefill"]) == 0
    shown, row = capsys.readouterr().out, json.loads(file.read_text())
    assert (row["cache"], row["limit"], row["seed"]) == ("prefill", 5, 3)
    model = open_model(trained, None)
    scorer = LikelihoodScorer(model.graphdef, model.params, model.tokenizer)
    for task, items in (("hellaswag", ITEMS), ("lambada", WORDS)):
        expected, found = evaluate_task(scorer, task, draw(items, 5, 3)).row(), row["tasks"][task]
        assert found.keys() == {*expected, "items_in_all"} and found["items_in_all"] == 9
        for name, value in expected.items():
            assert found[name] == (None if value is None else pytest.approx(value, rel=1e-4))
    choice, word = shown.splitlines()[-2:]
    assert choice.startswith("hellaswag") and word.startswith("lambada")
    assert "items drawn at random with seed 3" in shown
    assert "5 of 9" in choice and "0.3333" in choice
    figures = row["tasks"]["hellaswag"]
    assert f"{figures['accuracy']:.4f} +- {figures['accuracy_se']:.4f}" in choice
    assert f"{row['tasks']['lambada']['perplexity']:.2f} +-" in word


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "helaswag"], "'helaswag'"),
        (["--limit", "10"], "--limit=10 must be at most 9, the items of hellaswag"),
        (["--limit", "0"], "--limit=0 must be at least 1"),
        (["--seed", "-1"], "--seed=-1 must be at least 0"),
        (["--model", "smollm2"], "--model: not allowed with argument --run"),
    ],
)
def test_bad_options_are_one_line(trained, command, capsys, arguments, message):
    assert command(downstream.run, ["--run", trained, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
