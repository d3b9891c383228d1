# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. Variants and their memory
#
# An attention *variant* decides what a token leaves behind. Multi-head attention (MHA) leaves a key and a value
# for every head. Multi-query (MQA; Shazeer 2019) and grouped-query attention (GQA; Ainslie et al. 2023) let
# several query heads share one. Low-rank KV leaves one latent, from which keys and values are rebuilt.
# Multi-head latent attention (MLA; DeepSeek-V2, 2024) leaves a latent and one rotary key for all heads.
#
# What a token leaves behind is here measured from the arrays that decoding uses, never taken from a formula; the
# formula is the check. What it costs in quality is notebook 3.

# %%
# %matplotlib inline
# %config InlineBackend.print_figure_kwargs = {"bbox_inches": None}
import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx

from kvjax import accounting, capacity, plots, primer
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.codecs import Exact
from kvjax.decoder import DecoderConfig
from kvjax.train import graphdef_of

jax.config.update("jax_default_matmul_precision", "highest")  # no TF32: two forms are compared to 1e-5
NAMES = ("mha", "gqa4", "gqa2", "mqa", "low_rank", "mla")
presets = {name: importlib.import_module(f"configs.{name}").config for name in NAMES}
VOCAB = presets["mha"].data.vocab_size

# %% [markdown]
# ## What a token leaves behind
#
# A variant never writes down its cache's shape. `init_cache` derives it, by `jax.eval_shape`, from what
# `project` returns for a token, so it cannot be misstated. These are the arrays of one layer of each preset, for
# one row and a cache of 256 slots. The last axis is one token's vector, the axis before it is time.

# %%
caches = {name: accounting.abstract_cache(config, VOCAB, 1, 256, jnp.float32) for name, config in presets.items()}
pd.DataFrame(
    [
        {"variant": name, "array": array, "shape": a.shape, "numbers a token": a.size // 256}
        for name, cache in caches.items()
        for array, a in cache.memory[0].items()
    ]
).set_index(["variant", "array"])

# %% [markdown]
# Two lines of that table deserve a second look. `low_rank` caches a latent and no heads: its keys are rotated
# whenever they are read, since a rotated key is no longer of low rank. `mla` avoids that: the latent carries no
# position, and one small rotary key, for all heads, does.
#
# ## Bytes of a token, measured and in closed form
#
# Bytes of the arrays over slots, all layers, against the formulas: `2 K H` numbers a layer for MHA, GQA and MQA,
# `R` for low rank, `R + P` for MLA. K kv heads, H head width, R rank, P rotary width.

# %%
closed = {
    Grouped: lambda a: 2 * a.num_kv_heads * a.head_dim,
    LowRank: lambda a: a.rank,
    Latent: lambda a: a.rank + a.rope_dim,
}
rows = []
for name, config in presets.items():
    measured = caches[name].bytes_per_token()
    formula = config.decoder.depth * closed[type(config.attention)](config.attention) * 4
    assert measured == formula == accounting.declared_bytes_per_token(config, itemsize=4)
    parameters = accounting.num_parameters(accounting.abstract_params(config, VOCAB))
    rows.append({"variant": name, "bytes a token, float32": measured, "parameters": parameters})
table = pd.DataFrame(rows).set_index("variant")
table["of MHA's cache"] = table.iloc[:, 0] / table.iloc[0, 0]
table["of MHA's parameters"] = table["parameters"] / table.loc["mha", "parameters"]
table.round(3)

# %% [markdown]
# Fewer kv heads are also fewer parameters. So a comparison has to say what it holds equal: the rest of the
# model, the parameters (a wider MLP makes up for the heads), or the cache. Notebook 3 uses the second.
#
# ## Memory against context
#
# A model's weights are read once for all rows of a batch; each row has a cache of its own. At the shape of
# Llama's 7B, in bfloat16, one row. MLA has the proportions of DeepSeek-V2, a latent of four heads' width and a
# rotary key of half a head's; low rank has a latent of half of all heads. Nothing is allocated: shapes are
# enough.

# %%
shape = capacity.SHAPES["llama-7b"]
large = capacity.variants(shape.attention)
a_token = {name: shape.decoder.depth * attention.elements_per_token() * 2 for name, attention in large.items()}
lengths = pd.Index([1024, 4096, 32_768, 131_072], name="tokens")
pd.DataFrame({name: lengths * size / 2**30 for name, size in a_token.items()}, index=lengths).round(3)

# %%
plots.memory_against_context(plots.memory.LLAMA_7B)

# %% [markdown]
# All lines have slope one: a variant divides the cache, and no variant here makes it grow more slowly. This is
# where a single row's cache weighs as much as the model itself; with a batch of 8 it comes at an eighth of the
# context.

# %%
weights = capacity.Sizes(shape, jnp.bfloat16).weight_bytes
crossing = pd.Series({name: weights / size for name, size in a_token.items()})
crossing.round().astype(int).rename("tokens at which a row's cache outweighs MHA's weights").to_frame()

# %% [markdown]
# ## MLA is read in two ways
#
# Training and prefill rebuild every head's keys and values from the latents (*expanded*). A decoding step would
# have to rebuild them for all slots, so it moves the up-projection from the keys to the query instead: `q (U c)
# = (q U) c`. (*absorbed*). Then the latent itself is key and value of a single kv head, and the cache is read
# once. Both are the same function. First on NumPy arrays, in float64:

# %%
rng = np.random.default_rng(0)
D, N, H, E, P, R, T = 40, 6, 8, 10, 4, 12, 9
parts = {"q": (D, N, H + P), "kv_down": (D, R + P), "kv_up": (R, N, H + E), "o": (N, E, D)}
mla = {name: rng.standard_normal(shape) / np.sqrt(shape[0]) for name, shape in parts.items()}
mla["kv_norm"] = 1 + 0.3 * rng.standard_normal(R)
x_TD = rng.standard_normal((T, D))
expanded, absorbed = primer.mla_layer(x_TD, mla), primer.mla_layer_absorbed(x_TD, mla)
assert np.abs(expanded - absorbed).max() < 1e-12 * expanded.std() * 10
print(f"largest difference: {np.abs(expanded - absorbed).max() / expanded.std():.1e} of the result's spread")

# %% [markdown]
# And in the module that trains and decodes: the whole text at once is expanded, one token at a time through the
# cache is absorbed.

# %%
attention = Latent(N, rank=R, rope_dim=P, nope_dim=H, value_dim=E)
small = DecoderConfig(width=D, depth=2, mlp_width=64)
config = dataclasses.replace(presets["mla"], attention=attention, decoder=small)
draw = lambda a: jnp.asarray(rng.standard_normal(a.shape) / np.sqrt(a.shape[0]), a.dtype)
graphdef, params = graphdef_of(config, 61), jax.tree.map(draw, accounting.abstract_params(config, 61))
whole = jax.jit(lambda params, tokens_BT: nnx.merge(graphdef, params)(tokens_BT)[0])
step = jax.jit(lambda params, tokens_BT, cache: nnx.merge(graphdef, params)(tokens_BT, None, cache))

tokens_BT = jnp.asarray(rng.integers(0, 61, (2, T)), jnp.int32)
cache, logits = nnx.merge(graphdef, params).init_cache(2, T, Exact()), []
for t in range(T):
    logits_BTV, cache = step(params, tokens_BT[:, t : t + 1], cache)
    logits.append(logits_BTV)
expected = whole(params, tokens_BT)
difference = float(jnp.abs(jnp.concatenate(logits, axis=1) - expected).max() / expected.std())
assert difference < 1e-5
print(f"largest difference: {difference:.1e} of the logits' standard deviation")

# %% [markdown]
# What differs is work. Per query, slot and layer at the Llama shape: numbers read from the cache, and FLOPs (two
# for each multiply-add). `low_rank` must rebuild its keys at every step, since they are rotated only then.

# %%
N, a, b = 32, large["mla"], large["low_rank"]
work = {name: (large[name].elements_per_token(), large[name].flops_per_slot()) for name in ("mha", "gqa8", "mqa")}
heads = N * (a.nope_dim + a.rope_dim + a.value_dim)
rebuild = 2 * a.rank * N * (a.nope_dim + a.value_dim)
work["mla, heads cached"] = heads, a.flops_per_slot()
work["mla, heads rebuilt at every step"] = a.elements_per_token(), a.flops_per_slot() + rebuild
work["mla, absorbed"] = a.elements_per_token(), 2 * N * (2 * a.rank + a.rope_dim)
work["low_rank, keys rebuilt, values absorbed"] = b.rank, 2 * N * (b.rank * b.head_dim + b.head_dim + b.rank)
work = pd.DataFrame(work, index=["numbers read", "FLOPs"]).T
work["FLOPs a number read"] = work["FLOPs"] / work["numbers read"]
work.round(1)

# %% [markdown]
# A decoding step is bound by memory as long as FLOPs a number stay below what the device can do in the time it
# reads one (hundreds on a GPU, tens on a CPU). Absorbed MLA trades FLOPs for bytes: it pays where reading the
# cache is what takes the time, at long contexts and large batches. Rebuilding never does. `README.md` has
# measured times.
#
# Next: what these variants cost in quality.
