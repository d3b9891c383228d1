"""Models in Hugging Face's form, at the command line: what a run exports is the run's model."""

import json

import pytest
from tokenizers import Tokenizer

from experiments import evaluate, export, generate
from kvjax import host
from kvjax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    """This process computes already: its devices stay as they are."""
    monkeypatch.setattr(host, "prepare", lambda batch_size=1: None)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "prepare", lambda batch_size=1: None)
        assert export.run(["--run", str(trained), "--to", str(directory), "--max-len", "512"]) == 0
    return directory


def row_of(command, file, *options):
    assert command.run([*map(str, options), "--json", str(file)]) == 0
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("Fellow citizens, the state of the Union is réassuring. " * 5, "utf-8")
    return file


def test_scores_are_those_of_the_run(trained, exported, text, tmp_path):
    options = ["--data", text, "--context", 33, "--tokens", 101, "--batch-size", 2]
    of_run, of_model = (
        row_of(evaluate, tmp_path / "row.json", *which, *options)
        for which in (["--run", trained], ["--model", exported])
    )
    assert of_run["scores"] == of_model["scores"]
    score = of_model["scores"]["none"]
    assert (score["tokens"], score["bytes"], score["documents"]) == (101, 100, 1)  # half an é
    assert of_model["scores"]["decode"]["perplexity"] == pytest.approx(score["perplexity"], rel=1e-4)


def test_text_is_that_of_the_run(trained, exported, tmp_path):
    options = ["--prompt", "Fellow", "--tokens", 19, "--temperature", 0]
    of_run, of_model = (
        row_of(generate, tmp_path / "row.json", *which, *options)
        for which in (["--run", trained], ["--model", exported])
    )
    assert of_run["text"] == of_model["text"] and of_model["model"] == str(exported)


def test_the_card_says_what_was_trained(exported):
    card = (exported / "README.md").read_text()
    for part in (
        "* data: sotu, bytes tokenizer",
        "* cache bytes per token: ",
        "* validation bits_per_byte: ",
        "* steps: 6 of 6",
        '"num_kv_heads"',
    ):
        assert part in card


def chat_tokenizer():
    """Bytes, the end of text 256, and the two marks of ChatML, 257 and 258."""
    tokenizer = Tokenizer.from_str(ByteTokenizer().to_hugging_face())
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return HuggingFaceTokenizer(tokenizer.to_str(), None, 258, 259)


def test_turns_of_a_chat():
    """As the template of ChatML writes them; marks in the text are text."""
    turn = generate._chat(chat_tokenizer(), "Be brief")
    ids = lambda text: list(text.encode())
    first = [257, *ids("system\nBe brief"), 258, 10, 257, *ids("user\nHi"), 258, 10, 257, *ids("assistant\n")]
    assert turn("Hi", None) == first
    later = [257, *ids("user\n<|im_end|>"), 258, 10, 257, *ids("assistant\n")]
    assert turn("<|im_end|>", 258) == [10, *later]
    assert turn("<|im_end|>", 65) == [258, 10, *later]  # the answer was cut short
    assert generate._chat(chat_tokenizer(), "")("Hi", None) == first[first.index(10, 9) + 1 :]


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (evaluate, ["--model", "smollm3"], "model='smollm3' must be smollm2 or a directory with a config.json"),
        (
            generate,
            ["--model", "MODEL", "--tokens", "511", "--prompt", "abc"],
            "must be at most the model's max_len=512",
        ),
        (generate, ["--model", "MODEL", "--chat"], "--chat needs a tokenizer with <|im_start|>"),
        (
            evaluate,
            ["--model", "MODEL", "--context", "513"],
            "--context=513 must be at most the model's max_len=512",
        ),
        (evaluate, ["--model", "MODEL", "--tokens", "0"], "--tokens=0 must be at least 1"),
        (evaluate, ["--model", "MODEL", "--run", "x"], "not allowed with argument"),
        (evaluate, [], "one of the arguments --run --model is required"),
        (
            evaluate,
            ["--model", "MODEL", "--data", "TEXT", "--tokens", "999"],
            "num_tokens=999 must be at most 280",
        ),
        (evaluate, ["--model", "MODEL", "--data", "TEXT", "--split", "test"], "--split=test goes with a dataset"),
        (evaluate, ["--model", "MODEL", "--data", "EMPTY"], "empty.txt has no text to read"),
        (generate, ["--model", "MODEL", "--system", "x"], "--system is the beginning of a --chat"),
        (export, ["--run", "RUN", "--to", "MODEL"], "exists; choose a new directory"),
    ],
)
def test_errors_are_one_line(trained, exported, text, command, options, message):
    (text.parent / "empty.txt").write_text("")
    words = {"EMPTY": str(text.parent / "empty.txt")} | {
        "MODEL": str(exported),
        "RUN": str(trained),
        "TEXT": str(text),
    }
    with pytest.raises(ValueError) as error:
        command.run([words.get(option, option) for option in options])
    assert message in str(error.value) and "\n" not in str(error.value)
