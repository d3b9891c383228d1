"""The table side by side, and a widely copied project's beside it."""

import json

import pytest

from experiments import compare
from kvjax import results
from kvjax.attention.grouped import Grouped
from kvjax.compare import calculate_kv_cache_size
from kvjax.config import Config, to_dict
from kvjax.decoder import DecoderConfig

SMALL = "--width 16 --num-heads 2 --depth 1 --vocab-size 258 --batch 1 --context 16 --rounds 2 --tokens 2"


@pytest.fixture(scope="module")
def memory():
    return compare.memory()


def test_expected_memory_is_mib_of_two_bytes_a_number(memory):
    """Its formula has 4, which would be twice as much; the savings are right."""
    assert [row["bfloat16_bytes"] / 2**20 for row in memory] == [mb for _, mb in compare.CLAIMED_MB.values()]
    assert [row["float32_bytes"] for row in memory] == [2 * row["bfloat16_bytes"] for row in memory]
    for row in memory:
        assert row["float32_bytes"] == calculate_kv_cache_size(32, row["num_kv_heads"], 2048, 128)
    table = compare._expected_memory(memory)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert lines[1] == ["GQA-8", "8", "256 MB", "536.9 MB = 512 MiB", "268.4 MB = 256 MiB", "75.0%", "75.0%"]
    assert [line[5:] for line in lines] == [["0.0%"] * 2, ["75.0%"] * 2, ["87.5%"] * 2, ["96.9%"] * 2]


def test_at_the_command_line(command, memory, tmp_path, capsys, monkeypatch):
    """A run of width 8 is of the variant whose heads it has: 2 over 1, of half its width."""
    monkeypatch.setattr(compare, "memory", lambda: memory)
    config = Config(Grouped(2, 1, head_dim=4), DecoderConfig(width=8))
    figures = {"perplexity": 53.25, "perplexity_se": 1.5, "bits_per_byte": 1.25, "bits_per_byte_se": None}
    (tmp_path / "runs" / "first").mkdir(parents=True)
    results.write_result(tmp_path / "runs" / "first", {"config": to_dict(config), "documents": 9, **figures})
    file = tmp_path / "rows.json"
    arguments = [
        *SMALL.split(),
        "--variants",
        "mha,mqa",
        "--runs",
        tmp_path / "runs",
        "--expected",
        "--json",
        file,
    ]
    assert command(compare.run, arguments) == 0
    made, out = json.loads(file.read_text()), capsys.readouterr().out
    assert compare.comparison_table({"cpu": made}) in out and compare.expected_table({"cpu": made}) in out
    mha, mqa = made["rows"]
    assert [row["variant"] for row in made["rows"]] == ["MHA", "MQA"]
    assert mha["cache_bytes_per_token"] == 2 * mqa["cache_bytes_per_token"] == 2 * 2 * 8 * 4
    assert all(row["decode_seconds_per_token"]["min"] > 0 for row in made["rows"])
    assert mqa["trained"]["runs"] == ["first"] and mha["trained"] is None
    assert "runs: MQA first; none of MHA." in out and "53.25 ± 1.50" in out and " 1.2500 |" in out
    assert str(tmp_path) not in file.read_text() + out, "rows and tables name runs, not places"


def quality(label, share, ratio, perplexities):
    spread = {"median": ratio, "min": ratio, "max": ratio}
    trained = {"perplexity_by_seed": perplexities} if perplexities else None
    return {"variant": label, "cache_bytes_per_token": share, "decode_speed_ratio": spread, "trained": trained}


def test_expected_quality_is_joined_by_the_share_of_the_cache():
    rows = [
        quality("MHA", 64.0, 1.0, {"0": 50.0, "1": 60.0}),
        quality("GQA-2", 16.0, 1.25, {"0": 55.0, "1": 63.0}),
        quality("low rank", 16.0, 0.5, {"1": 66.0}),
        quality("MLA", 12.0, 0.75, None),
    ]
    lines = (
        compare.expected_table({"": {"rows": rows, "memory": compare_memory()}}).split("\n\n")[1].splitlines()[2:]
    )
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    # sqrt(1.1 * 1.05) = 1.0747; the logs' mean is 0.07205, their difference 0.04652: t(0.975, 1) / 2 = 6.3531 of it.
    assert cells == [
        ["100.0%", "MHA of 32 heads", "10.5 (1.000)", "1.0x", "MHA", "1.000", "1.00x"],
        ["25.0%", "GQA-8 of 32 heads", "10.6 (1.010)", "1.2x", "GQA-2", "1.075 (0.800 to 1.444)", "1.25x"],
        ["25.0%", "GQA-8 of 32 heads", "10.6 (1.010)", "1.2x", "low rank", "1.100", "0.50x"],
        ["18.8%", "", "", "", "MLA", "", "0.75x"],
        ["12.5%", "GQA-4 of 32 heads", "10.8 (1.029)", "1.3x", "", "", ""],
        ["3.1%", "MQA of 32 heads", "11.5 (1.095)", "1.5x", "", "", ""],
    ]
    with pytest.raises(ValueError, match="is GQA-2 and must be MHA"):
        compare._expected_quality(rows[1:])


def compare_memory():
    return [{"variant": "MHA", "num_kv_heads": 32, "float32_bytes": 2**31, "bfloat16_bytes": 2**30}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--width 20 --num-heads 8", "--width=20 must be a multiple of --num-heads=8"),
        ("--width 24 --num-heads 8", "d_model / num_heads=3 must be even"),
        ("--variants mha,gqa3", "num_heads=8 must be a multiple of num_kv_heads=3"),
        ("--variants mha,mah", "variants='mah' is unknown"),
        ("--variants mha,mqa,mha", "--variants names mha twice"),
        ("--variants mqa,mha --expected", "--variants=mqa,mha must begin with mha"),
        ("--rounds 0", "--rounds=0 must be at least 1"),
        ("--vocab-size 9", "data.vocab_size=9 must lie in"),
        ("--runs nowhere", "runs='nowhere' must hold results of training"),
        ("--dtype float8", "--dtype"),
        ("--json .", "--json"),
    ],
)
def test_wrong_arguments(command, arguments, message, capsys):
    assert command(compare.run, arguments.split()) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and message in error[0]
