"""What the command lines share: presets with overrides, and errors as one line with exit status 2."""

import argparse
import contextlib
import importlib
import io
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

import configs
from kvjax.checks import one_of
from kvjax.config import Config

T = TypeVar("T")


def presets() -> list[str]:
    """Names of the files in `configs/`."""
    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__))


def preset(name: str) -> Config:
    """The configuration of a preset."""
    one_of("--config", name, presets())
    return importlib.import_module(f"configs.{name}").config


def override(default: T, arguments: Sequence[str], prog: str, description: str) -> T:
    """`default` with dotted overrides, as `--attention.num-kv-heads 2`; ValueError with one line."""
    if "--help" in arguments or "-h" in arguments:
        return tyro.cli(type(default), default=default, args=list(arguments), prog=prog, description=description)
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message), contextlib.redirect_stdout(message):
            return tyro.cli(type(default), default=default, args=list(arguments), prog=prog)
    except SystemExit:
        raise ValueError(_one_line(message.getvalue())) from None


def _one_line(box: str) -> str:
    """The text of tyro's box, without the frame and the hint at --help."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = (re.sub(r"[╭╮╰╯│─]", " ", line).strip() for line in text.splitlines())
    sentences = [line for line in lines if line and not line.startswith("For full helptext")]
    return re.sub(r"\s+", " ", " ".join(sentences)).removeprefix("Parsing error ")


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """An argument parser that takes no abbreviations and reports errors in one line."""
    return _Parser(prog=f"python -m {module}", description=description, allow_abbrev=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def main(run: Callable[[Sequence[str]], int | None]) -> None:
    """Run a command; a ValueError is the user's: one line on standard error, exit status 2."""
    try:
        sys.exit(run(sys.argv[1:]) or 0)
    except ValueError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
