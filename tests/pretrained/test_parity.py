"""Hugging Face's models and ours, on the same files: logits, sequence by sequence and through the cache.

B batch, T tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.codecs import Exact
from kvjax.data.tokenizer import ByteTokenizer
from kvjax.pretrained import load, save

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, T = 263, 23
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0}
SMALL = {"vocab_size": VOCAB, "hidden_size": 36, "intermediate_size": 53, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
MLA = {
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "kv_lora_rank": 17,
    "q_lora_rank": None,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 6,
    "v_head_dim": 11,
    "hidden_size": 35,
    "first_k_dense_replace": 2,
}
EVEN = {"kv_lora_rank": 18, "qk_nope_head_dim": 8}  # transformers' V2 turns views, whose strides must be even
PLAIN = {"rope_type": "default", "rope_theta": 50.0}
CASES = {
    "llama": ("Llama", HEADS | {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama mqa, wide heads": ("Llama", HEADS | {"num_key_value_heads": 1, "head_dim": 10}),
    "llama bias": ("Llama", HEADS | {"num_key_value_heads": 6, "attention_bias": True}),
    "llama linear": ("Llama", HEADS | {"rope_parameters": PLAIN | {"rope_type": "linear", "factor": 3.0}}),
    "llama llama3": ("Llama", HEADS | {"head_dim": 16, "rope_parameters": LLAMA3}),
    "llama yarn": ("Llama", HEADS | {"head_dim": 16, "rope_parameters": YARN}),
    "llama yarn, not truncated": (
        "Llama",
        HEADS | {"head_dim": 14, "rope_parameters": YARN | {"truncate": False, "beta_fast": 3, "beta_slow": 0.5}},
    ),
    "mistral": ("Mistral", HEADS | {"head_dim": 6, "sliding_window": 5}),
    "mistral, a width that heads do not divide": (
        "Mistral",
        HEADS | {"head_dim": 6, "hidden_size": 35, "sliding_window": None},
    ),
    "qwen2": ("Qwen2", HEADS | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", HEADS | {"head_dim": 10, "rms_norm_eps": 1e-2}),
    "qwen3 yarn": ("Qwen3", HEADS | {"head_dim": 12, "rope_parameters": YARN | {"attention_factor": 1.7}}),
    "deepseek v2": ("DeepseekV2", MLA | EVEN),
    "deepseek v2 lora, yarn": (
        "DeepseekV2",
        MLA | EVEN | {"q_lora_rank": 13, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.9}},
    ),
    "deepseek v3": ("DeepseekV3", MLA | {"q_lora_rank": 13, "rope_parameters": PLAIN, "rms_norm_eps": 1e-3}),
    "deepseek v3 halves, tied": ("DeepseekV3", MLA | {"rope_interleave": False, "tie_word_embeddings": True}),
    "deepseek v3 yarn": ("DeepseekV3", MLA | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
}


def peer(case: str):
    """A random model of transformers whose biases and gains are random too."""
    family, own = CASES[case]
    config = getattr(transformers, f"{family}Config")(
        **{"max_position_embeddings": 64, "rope_parameters": PLAIN, "bos_token_id": 256, "eos_token_id": 256}
        | SMALL
        | own
    )
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Large, so that attention and its positions decide the logits.
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.5))
            if parameter.ndim == 1:
                parameter.add_(1.0)
    return model


def save_peer(model, directory, dtype=torch.float32):
    model.to(dtype).save_pretrained(directory)
    (directory / "tokenizer.json").write_text(ByteTokenizer().to_hugging_face())


def logits_of_peer(model, tokens_BT):
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BT).long()).logits.float().numpy()


@pytest.fixture(scope="module")
def tokens_BT():  # noqa: N802
    return np.random.default_rng(5).integers(0, VOCAB, (2, T)).astype(np.int32)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory, tokens_BT):
    """A peer's logits, and its files loaded."""
    directory = tmp_path_factory.mktemp("peer")
    model = peer(request.param)
    save_peer(model, directory)
    return logits_of_peer(model, tokens_BT), load(directory), model


def close(ours_BTV, theirs_BTV):
    spread = theirs_BTV.std(-1).mean()
    assert spread > 0.5  # logits that say something
    np.testing.assert_allclose(ours_BTV, theirs_BTV, rtol=0, atol=max(1e-5 * spread, 2e-4))


def test_logits_of_the_whole_sequence(pair, tokens_BT):
    theirs_BTV, model, _ = pair
    decoder = nnx.merge(model.graphdef, model.params)
    close(np.asarray(decoder(jnp.asarray(tokens_BT))[0]), theirs_BTV)


def test_saved_again_it_is_the_same_model(pair, tokens_BT, tmp_path):
    """transformers reads what we wrote; the family may be another one that computes the same."""
    theirs_BTV, model, _ = pair
    save(tmp_path / "saved", model, 64, {"data": "none"})
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    close(logits_of_peer(again, tokens_BT), theirs_BTV)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer("aé")["input_ids"] == [256, 97, 195, 169]


def test_logits_token_by_token_through_the_cache(pair, tokens_BT):
    theirs_BTV, model, _ = pair

    @jax.jit
    def step(params, cache, token_B1):
        return nnx.merge(model.graphdef, params)(token_B1, cache=cache)

    cache = nnx.merge(model.graphdef, model.params).init_cache(2, T, Exact())
    ours = []
    for t in range(T):
        logits_B1V, cache = step(model.params, cache, jnp.asarray(tokens_BT[:, t : t + 1]))
        ours.append(np.asarray(logits_B1V[:, 0]))
    close(np.stack(ours, axis=1), theirs_BTV)
