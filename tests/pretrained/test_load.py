"""Directories of pretrained models, sound and hostile, without any other library's models."""

import dataclasses
import json
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.data.tokenizer import BPETokenizer, ByteTokenizer
from kvjax.decoder import Decoder, DecoderConfig
from kvjax.model import Model, open_model
from kvjax.pretrained import load, save
from kvjax.pretrained.families import architecture
from kvjax.pretrained.tensors import TensorFiles, write_tensors
from kvjax.rope import RopeScaling

YARN = RopeScaling("yarn", 4.0, 16, beta_fast=32.0, beta_slow=1.0, magnitude=1.3)
VARIANTS = {
    "gqa": Grouped(6, 2, head_dim=10, rope_theta=77.0),
    "bias": Grouped(6, 2, head_dim=10, qkv_bias=True),
    "norm": Grouped(6, 6, head_dim=10, qk_norm=True),
    "window": Grouped(6, 1, head_dim=10, window=5),
    "mla": Latent(5, rank=13, rope_dim=4, nope_dim=3, value_dim=7),
    "mla yarn": Latent(
        5,
        rank=13,
        rope_dim=4,
        nope_dim=3,
        value_dim=7,
        query_rank=11,
        rope_interleaved=True,
        rope_scaling=YARN,
        logit_scale=0.61,
    ),
}


def model_of(attention, tokenizer=None, **decoder):
    tokenizer = tokenizer or ByteTokenizer()
    config = DecoderConfig(width=23, depth=2, mlp_width=31, output_scale=1.0, **decoder)
    graphdef, params = nnx.split(Decoder(config, attention, tokenizer.vocab_size, jax.random.key(3)))
    return Model("tiny", graphdef, params, tokenizer, (tokenizer.end_id,), None)


@pytest.fixture
def saved(tmp_path):
    directory = tmp_path / "model"
    save(directory, model_of(VARIANTS["gqa"]), 64, {})
    return directory


def edit(directory, **fields):
    path = directory / "config.json"
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))


def rewrite(directory, change):
    files = TensorFiles.open(directory)
    tensors = {name: files.read(name, files.shape(name)) for name in files.names}
    change(tensors)
    write_tensors(directory / "model.safetensors", tensors, {})


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_is_saved_is_loaded_bit_for_bit(name, tied, tmp_path):
    model = model_of(VARIANTS[name], tie_embeddings=tied, norm_eps=1e-4) if name != "norm" else None
    model = model or model_of(VARIANTS[name], tie_embeddings=tied)
    save(tmp_path / "model", model, 64, {"data": "sotu", "perplexity": 3.5})
    again = load(tmp_path / "model")
    ours, theirs = (nnx.merge(m.graphdef, m.params) for m in (model, again))
    if name != "mla yarn":  # its scale passes through a logarithm
        assert theirs.attention == ours.attention
    assert theirs.attention.logit_scale == pytest.approx(0.61) if name == "mla yarn" else True
    assert theirs.config.norm_eps == ours.config.norm_eps
    paths = [dict(jax.tree.leaves_with_path(m.params)) for m in (model, again)]
    assert paths[0].keys() == paths[1].keys()
    for path, value in paths[0].items():
        np.testing.assert_array_equal(paths[1][path], value, err_msg=jax.tree_util.keystr(path))
    assert again.max_len == 64 and again.stop_ids == (256,) and again.tokenizer.begin_id == 256
    card = (tmp_path / "model" / "README.md").read_text()
    elements = ours.attention.elements_per_token()
    assert f"* cache bytes per token: {2 * 4 * elements}\n" in card and "* perplexity: 3.5\n" in card


def test_a_trained_tokenizer_survives(tmp_path):
    texts = [b"the state of the union is strong, the state of the state is weak. " * 30]
    tokenizer = BPETokenizer.train(texts, 275)
    save(tmp_path / "model", model_of(VARIANTS["gqa"], tokenizer), 64, {})
    again = load(tmp_path / "model").tokenizer
    for text in ("the state of 1789", "naïve \n\n  ½", "<|endoftext|>", ""):
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
        assert again.decode(again.encode(text)) == text
    assert (again.begin_id, again.end_id, again.vocab_size) == (274, 274, 275)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_files(saved, dtype):
    full = load(saved)
    rewrite(saved, lambda tensors: tensors.update({n: a.astype(dtype) for n, a in tensors.items()}))
    for ours, theirs in zip(jax.tree.leaves(load(saved).params), jax.tree.leaves(full.params)):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, np.asarray(theirs).astype(dtype).astype(np.float32))
    halves = jax.tree.leaves(load(saved, "bfloat16").params)
    assert {a.dtype for a in halves} == {jnp.dtype(jnp.bfloat16)}


def test_several_files_are_one_model(saved):
    whole = load(saved)
    files = TensorFiles.open(saved)
    names = sorted(files.names)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in shards.items():
        write_tensors(saved / file, {name: files.read(name, files.shape(name)) for name in own}, {})
    (saved / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    for ours, theirs in zip(jax.tree.leaves(load(saved).params), jax.tree.leaves(whole.params)):
        np.testing.assert_array_equal(ours, theirs)


KEY = "model.layers.1.self_attn.k_proj.weight"
TENSORS = {
    "missing": (lambda t: t.pop(KEY), f"tensor '{KEY}' is missing"),
    "extra": (
        lambda t: t.update({"model.layers.2.mlp.x": t[KEY]}),
        "tensor 'model.layers.2.mlp.x' belongs to nothing",
    ),
    "shape": (lambda t: t.update({KEY: t[KEY].T.copy()}), f"tensor '{KEY}' has shape [23, 20], must be [20, 23]"),
    "nan": (lambda t: t[KEY].__setitem__((3, 4), np.nan), f"tensor '{KEY}' holds values that are not finite"),
    "head": (
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
        "tensor 'lm_head.weight'",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_wrong_tensors_are_named(saved, case):
    change, message = TENSORS[case]
    rewrite(saved, change)
    with pytest.raises(ValueError) as error:
        load(saved)
    assert message in str(error.value) and "model.safetensors" in str(error.value)


def test_tensors_that_nobody_reads_are_known(saved):
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32)}
    rewrite(saved, lambda t: t.update(frequencies, **{"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert load(saved).max_len == 64


CONFIGS = {
    "class": ({"architectures": ["GPT2LMHeadModel"]}, "architectures='GPT2LMHeadModel' is unknown"),
    "no class": ({"architectures": []}, "architectures=[] must name one class"),
    "missing": ({"hidden_size": "absent"}, "hidden_size is missing"),
    "type": ({"num_hidden_layers": "2"}, "num_hidden_layers='2' must be of type int"),
    "bool": ({"vocab_size": True}, "vocab_size=True must be of type int"),
    "act": ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; only 'silu' is"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias=True is not supported"),
    "rope": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is unknown"),
    "partial": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
    "layers": ({"rope_parameters": {"full_attention": {"rope_theta": 3.0}}}, "differ from layer to layer"),
    "heads": ({"num_key_value_heads": 4}, "num_heads=6 must be a multiple of num_kv_heads=4"),
    "vocabulary": ({"vocab_size": 200, "eos_token_id": 3, "bos_token_id": None}, "needs a vocab_size above 200"),
    "end": ({"eos_token_id": 999}, "eos_token_id=999 must be ids below vocab_size=257"),
    "ends": ({"eos_token_id": [3, "a"]}, "eos_token_id=[3, 'a'] must be ids below vocab_size=257"),
    "no mark": ({"bos_token_id": 7}, "begin_id=7 must be a special token: [256] are"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
    "deep": ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000 must be at most the number of tensors, 20"),
    "yarn": (
        {"rope_parameters": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 0}},
        "original_max_position_embeddings=0 must be at least 1",
    ),
    "no end": ({"eos_token_id": None}, "eos_token_id is missing"),
    "experts": (
        {"architectures": ["DeepseekV3ForCausalLM"], "first_k_dense_replace": 1, "n_routed_experts": 256},
        "layer 1 is a mixture of experts (first_k_dense_replace=1 of 2 layers, n_routed_experts=256)",
    ),
    "windows": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
        "layer 0 has another attention than sliding_window=4",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_not_ours_is_refused_by_field(saved, case):
    fields, message = CONFIGS[case]
    edit(saved, **fields)
    with pytest.raises(ValueError) as error:
        load(saved)
    assert message in str(error.value) and str(saved) in str(error.value)


@pytest.mark.parametrize(
    ("eos", "stop_ids"), [(0, (256, 0)), ([5, 256, 7], (256, 5, 7)), (None, (256,))], ids=["zero", "list", "null"]
)
def test_more_tokens_may_end_a_text(saved, eos, stop_ids):
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert load(saved).stop_ids == stop_ids


def test_an_end_that_is_no_id_is_refused_by_its_file(saved):
    (saved / "generation_config.json").write_text('{"eos_token_id": [[1]]}')
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id=\[\[1\]\] must be ids below"):
        load(saved)


PUBLISHED = {
    "Mistral, as its family had it": (
        {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2},
        Grouped(8, 2, 4, window=4096),
    ),
    "Mistral without a window": (
        {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2, "sliding_window": None},
        Grouped(8, 2, 4),
    ),
    "Llama-1": ({"rms_norm_eps": 1e-6}, Grouped(8, 8, 4)),
    "Llama-3.1": (
        {
            "num_key_value_heads": 2,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        Grouped(8, 2, 4, 500000.0, rope_scaling=RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)),
    ),
    "linear, by its old name": (
        {"rope_scaling": {"type": "linear", "factor": 2}},
        Grouped(8, 8, 4, rope_scaling=RopeScaling("linear", 2)),
    ),
    "Mistral-7B-v0.1": (
        {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2, "sliding_window": 4096},
        Grouped(8, 2, 4, window=4096),
    ),
    "Qwen2.5": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "num_key_value_heads": 2,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "max_window_layers": 2,
        },
        Grouped(8, 2, 4, 1000000.0, qkv_bias=True),
    ),
    "Qwen3-0.6B": (
        {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2, "head_dim": 16, "sliding_window": None},
        Grouped(8, 2, 16, qk_norm=True),
    ),
    "DeepSeek-V2-Lite": (
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "first_k_dense_replace": 2,
            "kv_lora_rank": 16,
            "q_lora_rank": None,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 5,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
            },
        },
        Latent(
            8,
            rank=16,
            rope_dim=4,
            nope_dim=6,
            value_dim=5,
            rope_interleaved=True,
            rope_scaling=RopeScaling("yarn", 40, 4096, beta_fast=32, beta_slow=1, magnitude=1.0),
            logit_scale=10**-0.5 * 1.2608037774**2,  # (0.1 * 0.707 * ln 40 + 1)^2
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_as_they_were_published(name):
    """Their forms, in fewer and smaller layers; what a file leaves out is as its family had it."""
    fields, expected = PUBLISHED[name]
    common = {"hidden_size": 32, "num_attention_heads": 8, "num_hidden_layers": 2, "intermediate_size": 40}
    common |= {"architectures": ["LlamaForCausalLM"], "vocab_size": 50, "max_position_embeddings": 163840}
    found = architecture(common | fields | {"eos_token_id": [3, 4]}, "config.json").attention
    if isinstance(expected, Latent):
        assert found.logit_scale == pytest.approx(expected.logit_scale, rel=1e-9)
        found = dataclasses.replace(found, logit_scale=expected.logit_scale)
    assert found == expected


def test_files_that_are_not_there_or_broken(saved, tmp_path):
    with pytest.raises(ValueError, match="must be smollm2 or a directory with a config"):
        load("smollm")
    with pytest.raises(ValueError, match="give either --run DIR or --model NAME_OR_DIR"):
        open_model(None, None)
    (saved / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer.json"):
        load(saved)
    (saved / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer.json is missing"):
        load(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        load(saved)


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_pickles_are_never_read(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="pickle files are never read"):
        load(saved)
    assert not (tmp_path / "exploded").exists()


def test_what_has_no_counterpart_is_not_saved(tmp_path, saved):
    for attention, message in (
        (LowRank(6, head_dim=4, rank=11), "attention=LowRank has no counterpart in transformers"),
        (Grouped(6, 2, head_dim=4, window=5, num_sinks=1), "attention.num_sinks=1 has no counterpart"),
        (Latent(6, rank=11, rope_dim=4, latent_norm=False), "attention.latent_norm=False, rope_blocks=1 must be"),
        (Grouped(6, 2, head_dim=4, qk_norm=True, norm_eps=1e-3), "attention.norm_eps=0.001 must equal"),
    ):
        with pytest.raises(ValueError) as error:
            save(tmp_path / "new", model_of(attention), 64, {})
        assert str(error.value).startswith(message)
    with pytest.raises(ValueError, match="exists; choose a new directory"):
        save(saved, model_of(VARIANTS["gqa"]), 64, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


PEAK = """
import resource, sys, jax
from kvjax.pretrained import load
jax.numpy.zeros(3).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_stays_near_the_size_of_the_weights(tmp_path, dtype):
    """Of a model whose largest matrix is a tenth of it."""
    config = DecoderConfig(width=512, depth=16, mlp_width=1024)
    graphdef, params = nnx.split(Decoder(config, Grouped(8, 2, head_dim=64), 257, jax.random.key(0)))
    save(tmp_path / "model", Model("m", graphdef, params, ByteTokenizer(), (256,), None), 64, {})
    itemsize = jnp.dtype(dtype).itemsize
    size = itemsize * sum(a.size for a in jax.tree.leaves(params))
    command = [sys.executable, "-c", PEAK, str(tmp_path / "model"), dtype]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(shown.split()[-1]) * 1024 < 1.3 * size
