import sys

import pytest

from kvjax import progress
from kvjax.progress import Bar, track


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_plain_lines_now_and_then(clock, capsys):
    with Bar("step", 100) as bar:
        for step in range(1, 51):
            clock.now += 1
            bar.update(step, f"loss {step}")
    assert capsys.readouterr().out.splitlines() == [
        "step 1/100  ...  loss 1",
        "step 11/100  1:29 left  loss 11",
        "step 21/100  1:19 left  loss 21",
        "step 31/100  1:09 left  loss 31",
        "step 41/100  0:59 left  loss 41",
    ]


def test_time_left_counts_only_steps_of_this_process_after_its_first(clock, capsys):
    with Bar("step", 30, done=20) as bar:
        clock.now += 100
        bar.update(21)
        clock.now += 20
        bar.update(25)
    assert capsys.readouterr().out.splitlines() == ["step 21/30  ...", "step 25/30  0:25 left"]


def test_hours(clock, capsys):
    with Bar("step", 1001) as bar:
        bar.update(1)
        clock.now += 73
        bar.update(11)
    assert capsys.readouterr().out.splitlines() == ["step 1/1001  ...", "step 11/1001  2:00:27 left"]


def test_nothing_done_yet(clock, capsys):
    with Bar("step", 5, done=2) as bar:
        bar.update(2)
    assert capsys.readouterr().out == "step 2/5  ...\n"


def test_lines_stay_as_they_are(capsys):
    with Bar("step", 5) as bar:
        bar.line("[bold]sample[/bold]: 'a:b'")
    assert capsys.readouterr().out == "[bold]sample[/bold]: 'a:b'\n"


def test_a_terminal_shows_one_live_line(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Bar("step", 3, done=1) as bar:
        bar.update(2, "loss 1.5")
        bar.line("[bold]kept[/bold] " + "x" * 300)
    out = capsys.readouterr().out
    assert "step" in out and "2/3" in out and "loss 1.5" in out
    assert "[bold]kept[/bold] " + "x" * 300 in out


def test_track_yields_every_item(capsys):
    assert list(track("part", ["a", "b"])) == ["a", "b"]
    assert capsys.readouterr().out.startswith("part 1/2")
