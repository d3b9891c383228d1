# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1. A KV cache from scratch
#
# A decoder makes text one token at a time, and each new token attends to all tokens before it. Keys and values
# of those tokens do not change: attention is causal, so nothing that comes later can reach them. A *KV cache*
# keeps them, and a step then computes them for one token instead of for all.
#
# Here is a model of one layer on NumPy arrays (`kvjax.primer`), with and without a cache: what each of them
# computes, that both give the same, and what the cache takes. The end does the same in JAX. Letters of axes: D
# width, N heads, H head width, V vocabulary, T new tokens, B batch.

# %%
# %matplotlib inline
# %config InlineBackend.print_figure_kwargs = {"bbox_inches": None}
import math

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx

from configs import tiny
from kvjax import accounting, primer
from kvjax.codecs import Exact
from kvjax.generate import generate, without_cache
from kvjax.plots import pyplot
from kvjax.train import graphdef_of

jax.config.update("jax_default_matmul_precision", "highest")  # no TF32: both sides are compared to 1e-5
plt = pyplot()

# %% [markdown]
# ## One layer, with or without a cache
#
# The model gets *new* tokens, the cache of those before them, and the position of the first. Without a cache the
# new tokens are always all tokens. Nothing else differs: the same projections, the same attention, the same
# logits. A counter notes what attention computes: *rows*, one query against all keys that it may see, and
# *products*, one query against one key.

# %%
V, D, N, H = 61, 24, 3, 8
rng = np.random.default_rng(0)
embedding_VD = rng.standard_normal((V, D))
q_DNH, k_DNH, v_DNH = rng.standard_normal((3, D, N, H)) / math.sqrt(D)
o_NHD = rng.standard_normal((N, H, D)) / math.sqrt(N * H)
counted = {"rows": 0, "products": 0}


def model(tokens, cache, position, cached=True, max_len=512):
    """Logits [T, V] of tokens that begin at `position`, and the cache; `cached=False` never makes one."""
    if cached and cache is None:
        cache = primer.KVCache(max_len, N, H, np.float64)
    x_TD = embedding_VD[tokens]
    q, k, v = (np.einsum("TD,DNH->NTH", x_TD, w)[None] for w in (q_DNH, k_DNH, v_DNH))
    positions_T = position + np.arange(len(tokens))
    q, k = primer.rope(q, positions_T, theta=100.0), primer.rope(k, positions_T, theta=100.0)
    mixed, cache = primer.attention_with_kv_cache(q, k, v, cache, position)
    counted["rows"] += len(tokens)
    counted["products"] += int((positions_T + 1).sum())
    return np.einsum("NTH,NHD->TD", mixed[0], o_NHD) @ embedding_VD.T, cache


def uncached(tokens, cache, position):
    """The same model, which remembers nothing."""
    return model(tokens, None, position, cached=False)


# %% [markdown]
# ## Both make the same tokens
#
# `generate_with_cache` feeds the prompt once and then one token a step. `generate_without_cache` feeds
# everything at every step.

# %%
prompt = [7, 3, 51, 12]
with_cache = primer.generate_with_cache(prompt, model, max_new_tokens=40)
no_cache = primer.generate_without_cache(prompt, uncached, max_new_tokens=40)
assert (with_cache == no_cache).all()
with_cache

# %% [markdown]
# Equal tokens are a weak test, since the likeliest token survives small errors. The logits are a strong one: a
# text read at once against the same text read in parts (a prompt of 9, then 1 token, then 5, then the rest one
# by one).

# %%
text = rng.integers(0, V, 32)
at_once, _ = uncached(text, None, 0)
parts, cache, position = [], None, 0
for length in [9, 1, 5, *[1] * 17]:
    logits, cache = model(text[position : position + length], cache, position)
    parts.append(logits)
    position += length
difference = np.abs(np.concatenate(parts) - at_once).max()
assert difference < 1e-12
print(f"largest difference of any logit: {difference:.1e}; logits spread over {at_once.std():.1f}")

# %% [markdown]
# And the check can fail. With the last token at the wrong place, or with a cache that holds zeros, its logits
# are visibly others:

# %%
_, cache = model(text[:-1], None, 0)
shifted, _ = model(text[-1:], cache, cache.length - 1)
keys, values = model(text[:-1], None, 0)[1].get(31)
forgetful = primer.KVCache(512, N, H, np.float64)
forgetful.update(0 * keys, 0 * values, 0)
forgotten, _ = model(text[-1:], forgetful, 31)
off_by_one, zeroed = (np.abs(logits[-1] - at_once[-1]).max() for logits in (shifted, forgotten))
assert min(off_by_one, zeroed) > 1e-2
print(f"a position off by one: {off_by_one:.2f}; a cache of zeros: {zeroed:.2f}")

# %% [markdown]
# ## What it saves
#
# To make N tokens from a prompt of one, the model without a cache computes 1 + 2 + ... + N = N (N + 1) / 2 rows,
# the one with a cache N. Counted while running, beside the formula:

# %%
counts = []
for length in (1, 2, 4, 8, 16, 32, 64, 128, 256):
    line = {"tokens": length}
    for name, make, fn in (
        ("uncached", primer.generate_without_cache, uncached),
        ("cached", primer.generate_with_cache, model),
    ):
        counted.update(rows=0, products=0)
        make([0], fn, length)
        assert counted["rows"] == primer.count_attention_operations(length, with_cache=name == "cached")
        line |= {f"{name} rows": counted["rows"], f"{name} products": counted["products"]}
    counts.append(line | {"times fewer rows": line["uncached rows"] / line["cached rows"]})
counts = pd.DataFrame(counts).set_index("tokens")
counts

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for axis, what in zip(axes, ("rows", "products")):
    axis.plot(counts[f"uncached {what}"], "-o", color="black", mfc="white", label="without a cache")
    axis.plot(counts[f"cached {what}"], "--s", color="0.45", label="with a cache")
    axis.set(
        xscale="log", yscale="log", xlabel="tokens made", ylabel=f"query-key {what}" if what != "rows" else what
    )
    axis.set_title({"rows": "Rows: quadratic, linear", "products": "Products: cubic, quadratic"}[what])
    axis.grid(alpha=0.3)
    axis.legend()
figure

# %% [markdown]
# Slopes in these plots are exponents. The projections, the MLP and the rows become linear. The products do not:
# a new token must still look at all tokens before it, so with a cache they are quadratic, and each of them
# *reads a key and a value from memory*. That is why a cache's bytes matter beyond the memory they fill.

# %%
last_two = counts.tail(2)
exponents = np.log2(last_two.iloc[1] / last_two.iloc[0]).drop("times fewer rows")
exponents.rename("exponent, from the last two lines").to_frame().round(2)

# %% [markdown]
# ## What it takes
#
# Two vectors for each token, KV head and layer. Bytes of the arrays while the cache fills, and the formula:

# %%
steps, cache = [], None
for step, token in enumerate(text):
    _, cache = model(np.array([token]), cache, step)
    steps.append(sum(array.nbytes for array in cache.get(step + 1)))
    assert steps[-1] == primer.compute_kv_cache_size(step + 1, 1, N, H, dtype_bytes=8)
figure, axis = plt.subplots(figsize=(4.5, 3), layout="constrained")
axis.plot(range(1, 33), steps, color="black")
axis.set(title="The toy model's cache, float64", xlabel="tokens", ylabel="bytes")
axis.grid(alpha=0.3)
figure

# %% [markdown]
# The same formula at the shape of Llama-2 7B, 32 layers of 32 heads of width 128, in 16 bits:

# %%
lengths = [1, 1024, 4096, 32_768, 131_072]
sizes = {
    batch: [primer.compute_kv_cache_size(n, 32, 32, 128, 2, batch) / 2**30 for n in lengths] for batch in (1, 8)
}
table = pd.DataFrame(sizes, index=pd.Index(lengths, name="tokens")).add_prefix("GiB, batch ")
table.round(4)

# %% [markdown]
# ## The same in JAX
#
# `kvjax.decoder` writes to a cache of fixed size: shapes never change, so one compiled program makes every
# token. Here is the smallest preset, two layers with grouped queries, with random weights: logits of the whole
# text at once, and of one token after another.

# %%
graphdef, shapes = graphdef_of(tiny.config, V), accounting.abstract_params(tiny.config, V)
draw = lambda a: jnp.asarray(rng.standard_normal(a.shape) / math.sqrt(a.shape[0]), a.dtype)
params = jax.tree.map(draw, shapes)
whole = jax.jit(lambda params, tokens_BT: nnx.merge(graphdef, params)(tokens_BT)[0])
step = jax.jit(
    lambda params, tokens_BT, cache: nnx.merge(graphdef, params)(tokens_BT, None, cache), donate_argnums=2
)

tokens_BT = jnp.asarray(text, jnp.int32)[None]
cache, logits = nnx.merge(graphdef, params).init_cache(1, 32, Exact()), []
for t in range(32):
    logits_BTV, cache = step(params, tokens_BT[:, t : t + 1], cache)
    logits.append(logits_BTV)
expected = whole(params, tokens_BT)
difference = float(jnp.abs(jnp.concatenate(logits, axis=1) - expected).max() / expected.std())
assert difference < 1e-5
print(f"largest difference: {difference:.1e} of the logits' standard deviation")
print(f"programs compiled: {step._cache_size()}")

# %% [markdown]
# Its arrays, and the closed formula: bytes of a token are measured from what decoding reads and writes.

# %%
assert cache.bytes_per_token() == accounting.declared_bytes_per_token(tiny.config, itemsize=4)
print(f"{cache.bytes_per_token():,.0f} bytes a token")
pd.DataFrame(
    [
        {"layer": i, "array": n, "shape": a.shape, "bytes": a.nbytes}
        for i, m in enumerate(cache.memory)
        for n, a in m.items()
    ]
)

# %% [markdown]
# `kvjax.generate.generate` runs the loop itself in one compiled program, and `without_cache` is the slow way,
# for comparison:

# %%
made = generate(graphdef, params, [prompt], 40).tokens[0]
assert made.tolist() == list(without_cache(graphdef, params, prompt, 40))
made

# %% [markdown]
# What a token leaves behind, and so all of the above, depends on the attention variant: see notebook 2.
