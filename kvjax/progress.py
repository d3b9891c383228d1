"""One line of progress with the time left: live in a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """Progress of `total` steps of which `done` are already made; a context manager."""

    def __init__(self, what: str, total: int, done: int = 0):
        self._what, self._total = what, total
        self._start = time.monotonic()
        self._printed = -SECONDS_BETWEEN_LINES
        self._measured: tuple[float, int] | None = None
        self._live = None
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            clocks = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
            self._live = Progress(*columns, *clocks, console=Console())
            self._task = self._live.add_task(what, total=total, completed=done, text="")

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, done: int, text: str = "") -> None:
        """`done` steps are made; `text` goes beside them."""
        if self._live is not None:
            self._live.update(self._task, completed=done, text=text)
            return
        now = time.monotonic()
        if self._measured is None:  # the first step compiles: the time left is told from the second on
            self._measured = (now, done)
        if now - self._start - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now - self._start
            since, first = self._measured
            seconds = (now - since) / (done - first) * (self._total - done) if done > first else None
            left = "..." if seconds is None else f"{_clock(seconds)} left"
            print(f"{self._what} {done}/{self._total}  {left}  {text}".rstrip(), flush=True)

    def line(self, text: str) -> None:
        """A line that stays."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)


def track(what: str, items: list[T]) -> Iterator[T]:
    """The items, with progress."""
    with Bar(what, len(items)) as bar:
        for i, item in enumerate(items):
            yield item
            bar.update(i + 1)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
