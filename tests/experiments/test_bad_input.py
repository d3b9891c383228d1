"""Whatever is wrong with a command line or a run's files: one line that says so, status 2, nothing written."""

import json
import shutil
from pathlib import Path

import pytest

from experiments import evaluate, train
from kvjax.checkpoint import Checkpoints
from kvjax.config import to_dict
from kvjax.data.tokenizer import BPETokenizer


@pytest.fixture
def refuse(command, capsys, tmp_path):
    """Function to run a command that must refuse; the text of its one line."""

    def run(main, arguments) -> str:
        before = snapshot(tmp_path)
        status = command(main, arguments)
        err = capsys.readouterr().err
        assert status == 2
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert "Traceback" not in err and "----" not in err and "─" not in err
        assert snapshot(tmp_path) == before
        return err.removeprefix("error: ").rstrip("\n")

    return run


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--config gqa", ["--config='gqa' is unknown; did you mean 'gqa"]),
        ("--config zzz", ["--config='zzz' is unknown; choose from gqa2, gqa4, "]),
        ("", ["--config", "--run", "required"]),
        ("--config", ["--config", "expected one argument"]),
        ("--config tiny --run somewhere", ["--run", "not allowed with", "--config"]),
        ("tiny", ["--config", "--run", "required"]),
        ("--config tiny gqa4", ["gqa4"]),
        ("--attention.num-kv-heads 2", ["--config", "--run", "required"]),
        (
            "--config tiny --attention.num-kv-head 2",
            ["--attention.num-kv-head is unknown; did you mean --attention.num-kv-heads?"],
        ),
        (
            "--config tiny --attention.num_kv_head=2",
            ["--attention.num_kv_head is unknown; did you mean --attention.num-kv-heads?"],
        ),
        (
            "--config tiny --optimiser.peak-lr 1",
            ["--optimiser.peak-lr is unknown; did you mean --optimizer.peak-lr?"],
        ),
        ("--config tiny --rot x", ["--rot is unknown"]),
        ("--config tiny --attention.rank 3", ["--attention.rank is unknown"]),
        ("--config tiny --qqqqqqqqq 3", ["--qqqqqqqqq is unknown; --help lists all fields"]),
        (
            "--config tiny --attention.num-kv-heads two",
            ["--attention.num-kv-heads: must be an integer, not 'two'"],
        ),
        ("--config tiny --attention.num-kv-heads", ["--attention.num-kv-heads"]),
        ("--config tiny --train.steps 1e3", ["--train.steps: must be an integer, not '1e3'"]),
        ("--config tiny --optimizer.peak-lr fast", ["--optimizer.peak-lr: must be a number, not 'fast'"]),
        ("--config tiny --decoder.scan perhaps", ["perhaps"]),
        ("--config tiny --train.dtype float16", ["--train.dtype", "'float16'", "'bfloat16'"]),
        ("--config tiny --data.tokenizer word", ["--data.tokenizer", "'word'", "'bytes'"]),
        (
            "--config tiny --attention.num-kv-heads 3",
            ["attention: num_heads=4 must be a multiple of num_kv_heads=3; nearest num_kv_heads: 2"],
        ),
        ("--config tiny --attention.window 0", ["attention: window=0 must be at least 1"]),
        ("--config tiny --attention.num-sinks 4", ["attention: num_sinks=4 must go with a window"]),
        ("--config tiny --attention.num-heads 0", ["attention: num_heads=0 must be at least 1"]),
        ("--config tiny --attention.head-dim 7", ["attention: head_dim=7 must be even; the nearest are 6 and 8"]),
        ("--config mla --attention.rope-dim 5", ["attention: rope_dim=5 must be even; the nearest are 4 and 6"]),
        ("--config mla --attention.rank 0", ["attention: rank=0 must be at least 1"]),
        ("--config low_rank --attention.rank 0", ["attention: rank=0 must be at least 1"]),
        (
            "--config low_rank --attention.rank-k 8",
            ["attention: rank=", "rank_k=8", "must be either a rank alone"],
        ),
        ("--config low_rank --attention.rank None", ["attention: rank=None", "must be either a rank alone"]),
        ("--config tiny --attention.rope-theta nan", ["attention: rope_theta=nan must be a finite number"]),
        ("--config tiny --decoder.width 0", ["decoder: width=0 must be at least 1"]),
        ("--config tiny --decoder.depth 0", ["decoder: depth=0 must be at least 1"]),
        ("--config tiny --decoder.depth -1", ["decoder: depth=-1 must be at least 1"]),
        ("--config tiny --decoder.dropout 1.0", ["decoder: dropout=1.0 must be at least 0.0 and below 1.0"]),
        ("--config tiny --data.context 0", ["data.context=0 must be at least 1"]),
        ("--config gqa4 --data.vocab-size 10", ["data.vocab_size=10 must lie in 258..65536"]),
        ("--config tiny --optimizer.peak-lr nan", ["optimizer.peak_lr=nan must be a finite number above 0"]),
        ("--config tiny --optimizer.peak-lr -1e-3", ["optimizer.peak_lr=-0.001 must be a finite number above 0"]),
        ("--config tiny --optimizer.peak-lr inf", ["optimizer.peak_lr=inf must be a finite number above 0"]),
        ("--config tiny --optimizer.beta1 1.0", ["optimizer.beta1=1.0 must be at least 0.0 and below 1.0"]),
        ("--config tiny --optimizer.beta2 -0.5", ["optimizer.beta2=-0.5 must be at least 0.0 and below 1.0"]),
        ("--config tiny --optimizer.clip-norm 0", ["optimizer.clip_norm=0.0 must be a finite number above 0"]),
        (
            "--config tiny --optimizer.warmup-steps 20",
            ["optimizer.warmup_steps=20 must be below train.steps=20"],
        ),
        ("--config tiny --train.steps 0", ["train.steps=0 must be at least 1"]),
        ("--config tiny --train.accumulate 3", ["train.batch_size=8 must be a multiple of train.accumulate=3"]),
        (
            "--config tiny --train.batch-size 9",
            ["train.batch_size / accumulate=9 must be a multiple of the 2 devices; nearest: 8 or 10"],
        ),
        (
            "--config tiny --train.eval-batch-size 7",
            ["train.eval_batch_size=7 must be a multiple of the 2 devices; nearest: 6 or 8"],
        ),
        ("--config tiny --seed -1", ["seed=-1 must be at least 0 and below 2147483648"]),
        ("--config tiny --seed 1.5", ["--seed: must be an integer, not '1.5'"]),
        ("--config tiny --name a/b", ["name='a/b' must hold only letters", "try 'a-b'"]),
        ("--config tiny --name ..", ["name='..' must not start with '.'"]),
        ("--config tiny --name .hidden", ["name='.hidden' must not start with '.'", "try 'hidden'"]),
        ("--config tiny --name=", ["name='' must not be empty"]),
        ("--run {tmp} --name x", ["--name goes with --config"]),
        ("--run {tmp} --root x", ["--root goes with --config"]),
        ("--run {tmp}/missing", ["missing' must be the directory of a run: it has no config.json"]),
        ("--run {tmp}", ["must be the directory of a run: it has no config.json"]),
        ("--config tiny --json {tmp}", ["--json", "must be a file's name, not a directory's"]),
        ("--config tiny --json=", ["--json", "'' must be a file's name"]),
    ],
)
def test_train(refuse, tmp_path, arguments, words):
    root = [] if "--run" in arguments else ["--root", tmp_path / "runs"]
    line = refuse(train.run, [*arguments.format(tmp=tmp_path).split(), *root])
    for word in words:
        assert word in line


@pytest.fixture(scope="module")
def latin_dataset() -> str:
    """A dataset whose second document is not UTF-8."""
    import tensorflow_datasets as tfds

    class KvjaxLatin(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples() for split in ("train", "validation")}

        def _generate_examples(self):
            yield 0, {"text": b"cafe " * 100}
            yield 1, {"text": b"caf\xe9"}

    return "kvjax_latin"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny_shakespere", ["data.name='tiny_shakespere' is not a TFDS dataset", "tiny_shakespeare"]),
        (
            "tiny_shakespeare",
            ["data.name='tiny_shakespeare' cannot be downloaded", "input.txt", "data.manual_dir"],
        ),
        ("kvjax_latin", ["kvjax_latin train document 1 is not UTF-8 at byte 3"]),
    ],
)
def test_data(refuse, tmp_path, tmp_path_factory, offline, latin_dataset, name, words):
    folder = tmp_path_factory.mktemp("data")
    arguments = ["--config", "tiny", "--data.name", name, "--data.data-dir", folder, "--root", tmp_path / "runs"]
    line = refuse(train.run, arguments)
    for word in words:
        assert word in line


def test_a_wrong_source_file(refuse, tmp_path, tmp_path_factory, offline):
    folder = tmp_path_factory.mktemp("data")
    (folder / "input.txt").write_text("To be")
    arguments = ["--config", "tiny", "--data.name", "tiny_shakespeare", "--data.manual-dir", folder]
    line = refuse(train.run, [*arguments, "--data.data-dir", folder / "new", "--root", tmp_path / "runs"])
    assert "data.name='tiny_shakespeare' has a wrong source file" in line


def test_a_context_longer_than_the_text(refuse, tmp_path, small_text):
    line = refuse(train.run, ["--config", "tiny", "--data.context", 1000, "--root", tmp_path / "runs"])
    assert line == "data.context=1000 must be less than the 270 tokens of the corpus"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained run, to be broken."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def edit(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def damage(path: Path) -> None:
    largest = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


BPE = BPETokenizer([("a", "b")]).to_json()


@pytest.mark.parametrize("main", [train.run, evaluate.run], ids=["train", "evaluate"])
@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda run: remove(run / "config.json"), ["/run' must be the directory of a run: it has no config.json"]),
        (lambda run: (run / "config.json").write_text("{"), ["config.json is not valid JSON"]),
        (lambda run: (run / "config.json").write_bytes(b"\xff"), ["config.json is not valid JSON"]),
        (lambda run: (run / "config.json").write_text("[]"), ["config.json is not a configuration", "object"]),
        (
            lambda run: edit(run / "config.json", lambda c: c["decoder"].update(dept=2)),
            ["config.json is not a configuration: decoder.dept is unknown; did you mean depth?"],
        ),
        (
            lambda run: edit(run / "config.json", lambda c: c["train"].pop("steps")),
            ["config.json is not a configuration: train.steps is missing"],
        ),
        (
            lambda run: edit(run / "config.json", lambda c: c["train"].update(steps="6")),
            ["config.json is not a configuration: train.steps='6' must be of type int"],
        ),
        (
            lambda run: edit(run / "config.json", lambda c: c["attention"].update({"class": "os.system"})),
            ["config.json is not a configuration: attention.class='os.system' must name an AttentionConfig"],
        ),
        (
            lambda run: edit(run / "config.json", lambda c: c["attention"].update(num_kv_heads=2)),
            ["config.json does not fit the checkpoint, which was trained with attention.num_kv_heads=1, not 2"],
        ),
        (
            lambda run: edit(run / "config.json", lambda c: c["attention"].update(rope_theta=7.0)),
            ["config.json does not fit the checkpoint", "attention.rope_theta=10000.0, not 7.0"],
        ),
        (
            lambda run: [damage(p / "state") for p in (run / "checkpoints").iterdir()],
            ["no sound checkpoint is left", "/checkpoints/3 is damaged", "/checkpoints/6 is damaged"],
        ),
        (
            lambda run: [damage(p / "record") for p in (run / "checkpoints").iterdir()],
            ["no sound checkpoint is left", "/checkpoints/3 is damaged", "/checkpoints/6 is damaged"],
        ),
    ],
)
def test_files_of_a_run(refuse, run, small_text, main, broken, words):
    (run / "result.json").unlink()
    broken(run)
    line = refuse(main, ["--run", run])
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda run: remove(run / "tokenizer.json"), ["tokenizer.json is missing"]),
        (lambda run: (run / "tokenizer.json").write_text(BPE), ["tokenizer.json (digest ", "does not fit"]),
        (lambda run: (run / "tokenizer.json").write_text(BPE[:20]), ["tokenizer.json is damaged"]),
        (lambda run: (run / "tokenizer.json").write_text("{}"), ["tokenizer.json is damaged"]),
        (lambda run: (run / "tokenizer.json").write_bytes(b"\xff\xfe"), ["tokenizer.json is damaged"]),
        (lambda run: remove(run / "checkpoints"), ["/run' has no checkpoint yet"]),
    ],
)
def test_files_that_evaluation_needs(refuse, run, small_text, broken, words):
    broken(run)
    line = refuse(evaluate.run, ["--run", run])
    for word in words:
        assert word in line


def test_a_checkpoint_of_another_model(refuse, run, small_text):
    """As left by a program that writes the same metadata."""
    with Checkpoints(run / "checkpoints") as checkpoints:
        metadata = checkpoints.metadata()
        checkpoints.save(9, {"w": json.loads("[1.5]")}, metadata)
    assert "/checkpoints/9 is of another model: leaf" in refuse(evaluate.run, ["--run", run])


def test_a_broken_result(refuse, run, small_text):
    (run / "result.json").write_text("{")
    assert "result.json is not valid JSON" in refuse(train.run, ["--run", run])


def test_another_configuration_in_the_directory(refuse, run, small_text):
    line = refuse(train.run, ["--run", run, "--train.steps", "60"])
    assert line == f"{run} was begun with train.steps=6, not 60; choose another --name"


def test_a_run_directory_that_is_a_file(refuse, tmp_path, small_text):
    (tmp_path / "runs").write_text("x")
    line = refuse(train.run, ["--config", "tiny", "--root", tmp_path / "runs"])
    assert "Not a directory" in line and str(tmp_path / "runs") in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["--run", "required"]),
        ("--run", ["--run", "expected one argument"]),
        ("--run {run} --split train", ["--split", "'train'", "'validation'", "'test'"]),
        ("--run {run} --cache all", ["--cache", "'all'", "'prefill'"]),
        ("--run {run} --cache", ["--cache", "expected at least one argument"]),
        ("--run {run} --batch-size 0", ["--batch-size=0 must be at least 1"]),
        ("--run {run} --batch-size 5", ["--batch-size=5 must be a multiple of the 2 devices; nearest: 4 or 6"]),
        ("--run {run} --batch-size many", ["--batch-size", "'many'"]),
        ("--run {run} --batch-siz 2", ["--batch-siz"]),
        ("--run {run} extra", ["extra"]),
        ("--run {run} --json {run}", ["--json", "must be a file's name, not a directory's"]),
    ],
)
def test_evaluate(refuse, trained, arguments, words):
    line = refuse(evaluate.run, arguments.format(run=trained).split())
    for word in words:
        assert word in line


def test_a_split_that_a_dataset_does_not_have(refuse, run, monkeypatch):
    def missing(config, tokenizer, split):
        raise ValueError(f"data.name={config.name!r} has no split {split!r}: it has train, validation")

    monkeypatch.setattr("kvjax.data.load_corpus", missing)
    assert "has no split 'test'" in refuse(evaluate.run, ["--run", run, "--split", "test"])


def test_the_copied_configuration_is_the_trained_one(trained, run):
    """Guards the tests above: an unbroken copy is accepted."""
    from kvjax.runs import load_run

    assert to_dict(load_run(run).config) == json.loads((trained / "config.json").read_text())
