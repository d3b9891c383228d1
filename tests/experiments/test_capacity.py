import json

import pytest

from experiments import capacity
from experiments.capacity import claims_table
from experiments.claims import documents
from kvjax import primer

TINY = ("--config", "tiny", "--memory", "1MiB")  # 2 layers, 2 of 4 heads of 16, bytes: 257 tokens


def test_table(command, tmp_path, capsys):
    """Against bytes by hand; a codec that a variant has no array for is left out and told."""
    file = tmp_path / "rows.json"
    options = ["--codec", "bf16", "int8", "--codec", "k=int8,v=fp16", "--against", "mqa,mla", "--json", file]
    assert command(capacity.run, [*TINY, "--context", "300", "--batch", "3", *options]) == 0
    found = json.loads(file.read_text())
    rows = {(row["variant"], row["codec"]): row for row in found["rows"]}
    assert len(rows) == 8 and len(found["left_out"]) == 1
    assert (
        found["left_out"][0].startswith("mla k=int8,v=fp16: ")
        and "choose from k_rope, latent" in found["left_out"][0]
    )
    own, latent = rows["gqa2", "bf16"], rows["mla", "int8"]
    # Embedding, then attention, MLP and norms of 2 layers, and the last norm.
    weights = 2 * (257 * 64 + 2 * (2 * 64 * 16 * (4 + 2) + 3 * 64 * 128 + 2 * 64) + 64)
    assert own["own"] and own["weight_bytes"] == weights and not latent["own"]
    # Of 512 slots, two chunks: 2 layers x 2 arrays x 2 heads x 16 in 16 bits, and a position; then a length.
    assert (own["bytes_per_token"], own["sequence_bytes"]) == (256, 512 * (256 + 4) + 4)
    assert own["batch_bytes"] == 3 * 512 * (256 + 4) + 4
    assert own["largest_batch"] == (2**20 - weights - 4) // (512 * 260)
    assert own["longest_context"] == (2**20 - weights - 4) // (256 * 260) * 256
    assert latent["bytes_per_token"] == 2 * (64 + 2 + 8 + 2)
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if line[2:].startswith(("gqa2", "mqa", "mla "))]
    sizes = [float(line[2:].split()[2]) for line in shown]
    assert len(sizes) == 8 and sizes == sorted((row["bytes_per_token"] for row in rows.values()), reverse=True)
    assert sum(line.startswith("*") for line in shown) == 3
    assert "low_rank: latent of 32; mla: latent of 64 and rotary key of 8." in lines


def test_overrides_and_published_shapes(command, capsys, tmp_path):
    file = tmp_path / "rows.json"
    one = ["--codec", "fp8", "--against", "mha", "--json", file]
    assert command(capacity.run, [*TINY, "--attention.num-kv-heads", "1", *one]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["variant"], row["own"], row["bytes_per_token"]) for row in rows] == [
        ("mqa", True, 2 * 2 * 16),
        ("mha", False, 2 * 2 * 4 * 16),
    ]
    shape = ["--model-shape", "llama2-70b", "--memory", "160GiB", "--decoder.depth", "40"]
    assert command(capacity.run, [*shape, *one[:2], "--against", "gqa8", *one[4:]]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["variant"] == "gqa8" and row["bytes_per_token"] == 40 * 2 * 8 * 128
    assert row["sequence_bytes"] == 4096 * (40 * 2 * 8 * 128 + 4) + 4 + 40 * 2 * 4  # a calibrated scale an array


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config", "tiny"), "--memory must be given, as --memory 80GiB"),
        (("--memory", "1GB"), "one of the arguments --config --model-shape --claims is required"),
        (("--config", "tiny", "--memory", "1gb"), "--memory='1gb' must be a number and one of"),
        (("--config", "tiny", "--memory", "1KiB"), "the weights' 176.75 KiB in bf16; nearest: --memory 177KiB"),
        ((*TINY, "--context", "0"), "--context=0 must be at least 1"),
        ((*TINY, "--weights-dtype", "fp8"), "--weights-dtype='fp8' is unknown; choose from bf16, fp16, fp32"),
        ((*TINY, "--against", "mha,gqa3"), "--against='gqa3' is unknown; did you mean 'gqa2'?"),
        ((*TINY, "--codec", "int9"), "int9"),
        ((*TINY, "--codec", "latent=int8"), "array='latent' is unknown; choose from k, v"),
        ((*TINY, "--attention.rank", "4"), "--attention.rank is unknown"),
        (
            ("--model-shape", "llama", "--memory", "1GB"),
            "--model-shape='llama' is unknown; did you mean 'llama-7b'?",
        ),
        (("--claims", "--memory", "1GB"), "--memory does not go with --claims; leave it out"),
        (("--claims", "--decoder.depth", "2"), "--decoder.depth does not go with --claims"),
    ],
)
def test_errors_are_one_line(arguments, message, command, capsys):
    assert command(capacity.run, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def rows():
    return documents()


def test_claims_against_the_formula(rows):
    """What the documents say, recomputed from the arrays' shapes, against bytes by hand."""
    size = primer.compute_kv_cache_size
    found = {(row["document"], row["claim"]): row for row in rows}
    assert len(found) == len(rows)
    expected = {
        ("KV optimization lab", "70B, 8K, FP16: KV cache, max batch"): (size(8192, 32, 32, 128, 2, 8), False),
        ("KV optimization lab", "70B, 8K, FP8: KV cache, max batch"): (size(8192, 32, 32, 128, 1, 8), False),
        ("KV optimization lab", "70B, 8K, FP4: KV cache, max batch"): (size(8192, 32, 32, 128, 0.5625, 8), False),
        ("KV optimization lab", "FP8: compression"): (size(8192, 32, 32, 128, 1, 8), True),
        ("KV optimization lab", "NVFP4: compression"): (size(8192, 32, 32, 128, 0.5625, 8), False),
        ("GQA project", "Llama-7B, 2K, MHA: cache, savings"): (1024 * 2**20, True),
        ("GQA project", "Llama-7B, 2K, GQA-8: cache, savings"): (256 * 2**20, True),
        ("GQA project", "Llama-7B, 2K, GQA-4: cache, savings"): (128 * 2**20, True),
        ("GQA project", "Llama-7B, 2K, MQA: cache, savings"): (32 * 2**20, True),
        ("KV compression lab", "Llama-7B, 4K, fp16"): (2**31, True),
        ("KV compression lab", "LowRankKVAttention(512, 8 heads, d_latent 128)"): (4096 * 128 * 2, False),
        ("KV compression lab", "70B, 32K: the cache alone"): (size(32_768, 80, 64, 128, 2), False),
        ("KV compression lab", "GQA and low rank combined"): (1024 * 34_560 * 2, True),
        ("cache compression plugin", "Qwen2.5-7B: baseline"): (56 * 2**20, True),
        ("cache compression plugin", "Qwen2.5-7B: V in rank 120"): (1024 * 28 * 4 * (128 + 120) * 2, True),
        ("cache compression plugin", "Qwen2.5-7B: V in rank 120, INT8"): (1024 * 28 * 4 * (256 + 120 + 2), True),
        ("cache compression plugin", "sliding window"): (size(4096, 28, 4, 128, 2), True),
    }
    assert {key: (found[key]["bytes"], found[key]["holds"]) for key in expected} == expected
    seventy = found["KV optimization lab", "70B, 8K, FP16: KV cache, max batch"]["measured"]
    assert "70B: 2.50 GiB a sequence, 12 fit 32 GiB" in seventy and "20.00 GiB a sequence, 1 fit" in seventy
    assert "32.00 GiB (34.36 GB)" in found["KV optimization lab", "70B, 8K, FP16: KV cache, max batch"]["remark"]
    project = found["GQA project", "Llama-7B, 2K, MHA: cache, savings"]
    assert project["measured"] == "1,024 MiB at 2 bytes, 2,048 MiB at 4; saved 0.0%"
    joint = found["KV compression lab", "LowRankKVAttention(512, 8 heads, d_latent 128)"]
    assert joint["claimed"] == "4x" and joint["measured"] == "joint: 1 MiB, 8x; two: 2 MiB, 4x"


def test_claims_from_the_command_line(command, capsys, tmp_path, monkeypatch, rows):
    monkeypatch.setattr("experiments.claims.documents", lambda track: rows)
    file = tmp_path / "documents.json"
    assert command(capacity.run, ["--claims", "--json", file]) == 0
    assert json.loads(file.read_text()) == {"rows": rows}
    shown = capsys.readouterr().out
    assert all(row["measured"] in shown and row["remark"] in shown for row in rows)
    lines = claims_table(rows).splitlines()
    assert len(lines) == len(rows) + 2 and {line.count(" | ") for line in lines[2:]} == {4}
