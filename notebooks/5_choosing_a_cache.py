# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5. Choosing a cache for a budget
#
# A memory, a context and a batch leave so many bytes for a token. Which variant, stored by which codec, is best
# within them? Sizes can be computed for any model. Quality cannot: it is measured, here on the small models of
# the study, and what they say of larger ones is a guess. So this notebook computes the first for a 7B model, and
# asks the second of the rows, at the same share of multi-head attention's cache.

# %%
# %matplotlib inline
# %config InlineBackend.print_figure_kwargs = {"bbox_inches": None}
import dataclasses
import os
from pathlib import Path

import jax.numpy as jnp
import pandas as pd

from kvjax import capacity, plots, results
from kvjax.choosing import choose
from kvjax.recipes import parse

RESULTS = Path(os.environ.get("KVJAX_RESULTS", "results"))
study = results.read_json(RESULTS / "study" / "rows.json")

# %% [markdown]
# ## What fits
#
# Llama's 7B shape in bfloat16 on one device. Change these three numbers to ask for another one.

# %%
MEMORY, CONTEXT, BATCH = capacity.parse_bytes("MEMORY", "24GiB"), 32_768, 4
shape = capacity.SHAPES["llama-7b"]
variants = capacity.variants(shape.attention)
fits = []
for name in ("mha", "gqa8", "mla"):
    sizes = capacity.Sizes(dataclasses.replace(shape, attention=variants[name]), jnp.bfloat16)
    for codec in ("exact", "int8", "nvfp4"):
        fit = sizes.fit(sizes.layers(parse(codec)), MEMORY, CONTEXT)
        line = {"variant": name, "codec": codec, "bytes a token": int(fit.bytes_per_token)}
        line |= {"longest context": fit.longest_context, f"rows of {CONTEXT:,} tokens": fit.largest_batch}
        fits.append(line | {"weights, GiB": round(sizes.weight_bytes / 2**30, 2)})
pd.DataFrame(fits).set_index(["variant", "codec"])

# %% [markdown]
# Variant and codec multiply: they do not know each other. The weights set how much there is to share, and the
# budget of a token is what they leave, over all tokens that are to be held at once:

# %%
mha = capacity.Sizes(shape, jnp.bfloat16)
exact = mha.cache_bytes(mha.layers(parse("exact")), 1, CONTEXT)[0] / CONTEXT
budget = (MEMORY - mha.weight_bytes) / (BATCH * CONTEXT)
share = budget / exact
print(
    f"{budget:,.0f} bytes a token for {BATCH} rows of {CONTEXT:,}: {share:.1%} of MHA's {exact:,.0f} in bfloat16"
)

# %% [markdown]
# ## What is best within it
#
# The study's models, each under every codec that was measured through its cache, at the same share of MHA's
# cache in 16 bits. `choose` orders them by mean bits per byte and says which *ranks* are resolved: two
# candidates are told apart only if the 95 % interval of their difference over seeds leaves out 0. Those that can
# have rank 1 are the answer; among them, other reasons may decide.

# %%
coded = study["codecs"]
full = next(row["cache_bytes"]["per_token"] for row in coded if (row["label"], row["codec"]) == ("mha", "fp16"))
chosen = pd.DataFrame(map(dataclasses.asdict, choose(coded, share * full)))
chosen["ranks"] = [f"{least} to {most}" for least, most in chosen["ranks"]]
chosen["seeds"] = chosen["seeds"].map(len)
chosen[["label", "codec", "bytes_per_token", "bits_per_byte", "seeds", "ranks"]].round(4)

# %% [markdown]
# The same for a range of budgets. The more bytes there are, the less a codec has to do; the fewer, the more
# variants and codecs must share the work.

# %%
answers = []
for part in (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16):
    first, *others = choose(coded, part * full)
    line = {"budget, of MHA in 16 bits": f"{part:.2%}", "bytes a token": part * full, "least bits": first.name}
    line |= {"bits per byte": round(first.bits_per_byte, 4), "candidates": 1 + len(others)}
    answers.append(line | {"not told from it": sum(other.ranks[0] == 1 for other in others)})
pd.DataFrame(answers).set_index("budget, of MHA in 16 bits")

# %% [markdown]
# A large number in the last column means that the study cannot say which is best: the seeds are too few for
# differences so small. That is a result, too. It says that quality does not decide there, and that speed, or
# what is already at hand, may.

# %%
figure = plots.quality_against_bytes([], [], coded, "Candidates, and the budget of the 7B model's example")
figure.axes[0].axvline(share * full, color="0.3", ls=":")
figure

# %% [markdown]
# ## Bytes are not time
#
# A step reads the weights and all rows' caches, so a smaller cache is faster once it outweighs the weights, and
# not before. And reading is not all: a latent that must be rebuilt at every step costs more than it saves.
# Measured, at batch 8:

# %%
timed = results.read_json(RESULTS / "decoding_growth" / "batch8.json")
plots.decode_time_against_context(
    timed["rows"], f"Time of a decode step, {timed['environment']['cpu_cores']} CPU cores"
)

# %% [markdown]
# ## In short
#
# 1. Compute the budget: memory less weights, over all tokens to be held. 2. Take the codec that costs nothing
# measurable first; it goes with every variant. 3. If that is not enough, a variant with fewer bytes, trained or
# converted. 4. Then fewer bits, keys and values apart. 5. Measure through the cache, on your own text, with
# pairs, before believing any of it.
