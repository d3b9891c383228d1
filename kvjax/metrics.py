"""Metrics of a run: `metrics.jsonl` is the truth, TensorBoard events are a view of it.

A line is `{"step": 10, "kind": "train", "loss": 2.25, ...}`. Floats are written so that they read back bit
for bit. JSON has no NaN and no infinity: they stand as the strings "nan", "inf" and "-inf", which
`read_metrics` turns back into floats. TensorBoard gets the finite values only.
"""

import json
import math
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from kvjax.results import write_bytes

_NON_FINITE = ("nan", "inf", "-inf")


class MetricsWriter:
    """Appends to `directory/metrics.jsonl` and `directory/tensorboard`; a context manager, for one writer.

    A last line that a crash cut short is removed on opening: it was never a whole record.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.path = self.directory / "metrics.jsonl"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._events: Any = None
        self._purge_step: int | None = None
        if self.path.exists():
            content = self.path.read_bytes()
            if content and not content.endswith(b"\n"):
                os.truncate(self.path, content.rfind(b"\n") + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Writes out TensorBoard's queue; the lines are on file already."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def write(self, step: int, values: Mapping[str, float], kind: str = "train") -> None:
        """Appends one line, handed to the system before this returns."""
        for name in ("step", "kind"):
            if name in values:
                raise ValueError(f"values.{name} must have another name: every line has its own {name}")
        if kind in _NON_FINITE:
            raise ValueError(f"kind={kind!r} must not be the name of a number")
        numbers = {name: _number(name, value) for name, value in values.items()}
        line = {
            "step": operator.index(step),
            "kind": kind,
            **{name: _to_json(number) for name, number in numbers.items()},
        }
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        for name, number in numbers.items():
            if math.isfinite(number):
                self._tensorboard().add_scalar(f"{kind}/{name}", number, step)

    def truncate_after(self, step: int) -> None:
        """Drops later lines, which a run resumed at `step` writes again; call before the first write."""
        assert self._events is None, "truncate_after must come before the first write"
        self._purge_step = step + 1
        if not self.path.exists():
            return
        lines = _lines(self.path)
        kept = [line for line, row in zip(lines, read_metrics(self.path), strict=True) if row["step"] <= step]
        if len(kept) < len(lines):
            write_bytes(self.path, b"".join(line + b"\n" for line in kept))

    def _tensorboard(self) -> Any:
        if self._events is None:
            # Takes 0.3 s to import, which readers of metrics need not pay.
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(self.directory / "tensorboard"), purge_step=self._purge_step)
        return self._events


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl` in order; a last line without its newline, still being written, is left out.

    Raises ValueError naming file and line where one is not a JSON object with a step.
    """
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError(f"{path}, line {number} is not a JSON object with an integer step")
        rows.append({name: float(value) if value in _NON_FINITE else value for name, value in row.items()})
    return rows


def _lines(path: Path) -> list[bytes]:
    return Path(path).read_bytes().split(b"\n")[:-1]


def _number(name: str, value: Any) -> int | float:
    if isinstance(value, bool | str):
        raise ValueError(f"values.{name}={value!r} must be a number")
    return value if isinstance(value, int) else float(value)


def _to_json(number: int | float) -> int | float | str:
    return number if math.isfinite(number) else str(float(number))
