"""Text from a trained run, at the command line."""

import io
import json
import re

import numpy as np
import pytest

from experiments import generate
from kvjax import host
from kvjax.slots import nbytes


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    """This process computes already: its devices stay as they are."""
    monkeypatch.setattr(host, "prepare", lambda batch_size=1: None)


def made(trained, tmp_path, capsys, *options):
    """The result row and what was shown."""
    file = tmp_path / "row.json"
    assert generate.run(["--run", str(trained), "--json", str(file), *options]) == 0
    return json.loads(file.read_text()), capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [["--temperature", "0"], ["--temperature", "2", "--top-p", "0.9", "--seed", "3"]]
)
def test_the_same_text_with_and_without_the_cache(trained, tmp_path, capsys, options):
    options = ["--prompt", "Peace", "--tokens", "21", *options]
    row, shown = made(trained, tmp_path, capsys, *options)
    whole, shown_whole = made(trained, tmp_path, capsys, *options, "--no-cache")
    assert row["text"] == whole["text"] and row["tokens"] == whole["tokens"] == 21
    text = row["text"].rstrip("\ufffd")
    assert shown.startswith(text) and shown_whole.startswith(text)
    assert "slots" in shown and "slots" not in shown_whole
    assert row["tokens_per_second"] > 0


def test_what_is_said_of_the_cache_is_measured(trained, tmp_path, capsys):
    row, shown = made(trained, tmp_path, capsys, "--prompt", "Peace", "--tokens", "21", "--max-len", "64")
    assert row["prompt_tokens"] == 6  # the document's beginning and five bytes
    assert (row["cache_slots"], row["cache_slots_used"]) == (64, 16 + 21)
    assert row["cache_bytes"] == 64 * row["cache_bytes_per_token"]
    assert f"{row['cache_bytes_per_token']:,.0f} bytes per token" in shown


def test_prompt_from_standard_input(trained, tmp_path, capsys, monkeypatch):
    typed, _ = made(trained, tmp_path, capsys, "--prompt", "Fellow citizens", "--tokens", "8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Fellow citizens")))
    read, _ = made(trained, tmp_path, capsys, "--prompt", "-", "--tokens", "8")
    assert read["text"] == typed["text"]


def test_a_conversation_keeps_its_cache(trained, tmp_path, capsys, monkeypatch):
    """The second answer is that of all that was said before it, read at once."""
    from kvjax.generate import generate as at_once
    from kvjax.runs import load_run
    from kvjax.train import graphdef_of

    answers = iter(["and war", None])
    monkeypatch.setattr(generate, "_ask", lambda: next(answers))
    options = ["--interactive", "--temperature", "0", "--prompt", "Peace", "--tokens", "9"]
    row, shown = made(trained, tmp_path, capsys, *options)
    assert len(re.findall(r"slots used", shown)) == 2 and row["cache_slots"] == 4096
    run = load_run(trained)
    encode, graphdef = run.tokenizer.encode, graphdef_of(run.config, run.tokenizer.vocab_size)
    first = [run.tokenizer.end_id, *encode("Peace")]
    answer = at_once(graphdef, run.params, [first], 9).tokens[0]
    again = at_once(graphdef, run.params, [np.concatenate([first, answer, encode("and war")])], 9)
    assert row["text"] == run.tokenizer.decode(again.tokens[0])


def test_the_cache_is_as_large_as_its_arrays(trained, tmp_path, capsys):
    from kvjax.accounting import abstract_cache
    from kvjax.runs import load_run

    row, _ = made(trained, tmp_path, capsys, "--tokens", "3", "--max-len", "48")
    run = load_run(trained)
    cache = abstract_cache(run.config, run.tokenizer.vocab_size, 1, 48, np.dtype("float32"))
    assert row["cache_bytes"] == nbytes(cache.memory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tokens 0", "--tokens=0 must be at least 1"),
        ("--max-len 0", "--max-len=0 must be at least 1"),
        ("--max-len 20", "a prompt of 1 tokens (in 16 slots) and num_tokens=128 do not fit max_len=20"),
        ("--temperature nan", "temperature=nan must be a finite number"),
        ("--temperature -1", "temperature=-1.0 must be at least 0"),
        ("--top-k 0", "top_k=0 must be at least 1"),
        ("--top-k 258", "top_k=258 must be at most the vocabulary size 257"),
        ("--top-p 0", "top_p=0.0 must be above 0"),
        ("--top-p 1.5", "top_p=1.5 must be above 0 and at most 1"),
        ("--min-p -1", "min_p=-1.0 must be at least 0"),
        ("--seed -1", "--seed=-1 must be at least 0"),
        ("--interactive --no-cache", "--interactive keeps a cache"),
        ("--tokens many", "--tokens"),
    ],
)
def test_bad_input(command, capsys, trained, tmp_path, arguments, message):
    file = tmp_path / "row.json"
    assert command(generate.run, ["--run", trained, "--json", file, *arguments.split()]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1
    assert shown.out == "" and not file.exists()


def test_a_prompt_that_is_no_text(command, capsys, trained, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert command(generate.run, ["--run", trained, "--prompt", "-"]) == 2
    assert "standard input must be UTF-8: byte 2 is not" in capsys.readouterr().err
