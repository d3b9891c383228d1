import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.metrics import MetricsWriter, read_metrics

ROOT = Path(__file__).resolve().parent.parent


def losses(count: int) -> list[float]:
    return [float(x) for x in np.random.default_rng(0).standard_normal(count) * 10.0 ** np.arange(-20, count - 20)]


def test_floats_read_back_bit_for_bit(tmp_path):
    numbers = [*losses(40), 5e-324, -0.0, 1.7976931348623157e308, 0.1]
    with MetricsWriter(tmp_path) as metrics:
        for step, number in enumerate(numbers):
            metrics.write(step, {"loss": number}, "valid")
            # On file at once, not at the end.
            assert float.fromhex(read_metrics(metrics.path)[-1]["loss"].hex()).hex() == number.hex()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["loss"].hex() for row in rows] == [number.hex() for number in numbers]
    assert [(row["step"], row["kind"]) for row in rows] == [(step, "valid") for step in range(len(numbers))]


def test_lines_are_as_documented(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(np.int64(3), {"loss": np.float32(0.1), "tokens": 2**60, "g": jnp.bfloat16(1.5)})
        metrics.write(4, {"loss": math.nan, "up": math.inf, "down": -math.inf})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == [
        '{"step": 3, "kind": "train", "loss": 0.10000000149011612, "tokens": 1152921504606846976, "g": 1.5}',
        '{"step": 4, "kind": "train", "loss": "nan", "up": "inf", "down": "-inf"}',
    ]
    row = read_metrics(tmp_path / "metrics.jsonl")[1]
    assert math.isnan(row["loss"]) and (row["up"], row["down"]) == (math.inf, -math.inf)


def test_values_that_are_no_numbers_or_take_a_lines_own_names_are_refused(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        for values, message in [
            ({"step": 1.0}, "values.step must have another name"),
            ({"kind": 1.0}, "values.kind must have another name"),
            ({"loss": "1.0"}, "values.loss='1.0' must be a number"),
            ({"done": True}, "values.done=True must be a number"),
        ]:
            with pytest.raises(ValueError, match=message):
                metrics.write(1, values)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="kind='nan' must not be the name of a number"):
            metrics.write(1, {}, "nan")
    assert not metrics.path.exists()


def run(directory: Path, steps: range, resumed_at: int | None = None) -> None:
    with MetricsWriter(directory) as metrics:
        if resumed_at is not None:
            metrics.truncate_after(resumed_at)
        for step in steps:
            metrics.write(step, {"loss": losses(40)[step]})
            if step % 5 == 0:
                metrics.write(step, {"loss": step / 3}, "valid")


@pytest.mark.parametrize("crashed_at", [7, 10, 16])
@pytest.mark.parametrize("torn", [b"", b"{", b'{"step": 9, "kind"'])
def test_a_resumed_runs_file_is_that_of_an_uninterrupted_one(tmp_path, crashed_at, torn):
    run(tmp_path / "whole", range(1, 20))
    run(tmp_path / "resumed", range(1, crashed_at + 1))
    with open(tmp_path / "resumed" / "metrics.jsonl", "ab") as file:
        file.write(torn)
    run(tmp_path / "resumed", range(8, 20), resumed_at=7)
    expected = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "resumed" / "metrics.jsonl").read_bytes() == expected
    assert {path.name for path in (tmp_path / "resumed").iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_truncating_to_before_the_first_step_and_without_a_file(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.truncate_after(0)
    run(tmp_path, range(1, 4))
    with MetricsWriter(tmp_path) as metrics:
        metrics.truncate_after(0)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_torn_last_line_is_left_out_and_never_joined(tmp_path):
    run(tmp_path, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 3, "kind": "train", "loss": 1')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    run(tmp_path, range(3, 4))
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"loss": 1.0}', b'{"step": 1.5}', b"", b"\xff", b"x\ry"])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=f"^{path}, line 2 is not "):
        read_metrics(path)


def test_tensorboard_has_the_finite_values_and_forgets_repeated_steps(tmp_path):
    from tensorboardX.event_file_writer import EventFileWriter  # noqa: F401
    from tensorboardX.proto.event_pb2 import Event

    with MetricsWriter(tmp_path) as metrics:
        metrics.truncate_after(6)
        metrics.write(7, {"loss": 0.5, "bad": math.nan}, "valid")
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, events = path.read_bytes(), []
    while content:
        # TFRecord: length (8 bytes), its checksum (4), the event, its checksum (4).
        length = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars == [(7, "valid/loss", 0.5)]
    assert [event.step for event in events if event.HasField("session_log")] == [7]


def test_writing_is_quiet_and_leaves_no_thread_of_its_own(tmp_path, capfd):
    run(tmp_path, range(1, 3))
    assert capfd.readouterr() == ("", "")
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())


def test_a_process_that_forgets_to_close_ends_at_once(tmp_path):
    code = (
        "import sys; from kvjax.metrics import MetricsWriter\n"
        "MetricsWriter(sys.argv[1]).write(1, {'loss': 2.0}); print('written', flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "written\n"
        start = time.monotonic()
        assert process.wait(timeout=20) == 0 and time.monotonic() - start < 10
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "kind": "train", "loss": 2.0}
