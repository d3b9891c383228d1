# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Perplexity against memory
#
# Which variant is worth its bytes? This notebook reads the committed rows of one study and trains nothing. In it
# every variant is trained at several learning rates, and at its best one with several seeds. A seed fixes the
# data order, and initial weights wherever shapes agree, so that differences are *paired*: by seed, a variant
# minus multi-head attention. What chance does to both alike cancels. Shapes agree in the embedding, in queries
# and output where heads are MHA's in number and size, and not in an MLP that is widened.
#
# Losses are bits per byte of the validation text: unlike perplexity they do not depend on the tokenizer. It is the
# same split whose losses chose the learning rates; the test split is not touched.

# %%
# %matplotlib inline
# %config InlineBackend.print_figure_kwargs = {"bbox_inches": None}
import os
from pathlib import Path

import duckdb
from IPython.display import Markdown

from experiments import study_tables
from kvjax import plots, results

RESULTS = Path(os.environ.get("KVJAX_RESULTS", "results"))
STUDY = RESULTS / "study" / "rows.json"
study = results.read_json(STUDY)
trained, files = study["rows"], {"rows": study}

# %% [markdown]
# ## The rows
#
# A row is a run, with its configuration, environment and figures. DuckDB reads the file as it stands:

# %%
duckdb.sql(f"""
    with runs as (select unnest(rows, max_depth := 2) from read_json('{STUDY}'))
    select label, matching, count(*) as runs, count(distinct peak_lr) as rates, count(distinct seed) as seeds,
           any_value(parameters)::int as parameters, any_value(cache_bytes_per_token)::int as cache_bytes,
           round(min(bits_per_byte), 4) as least_bits, round(sum(wall_seconds) / 60, 1) as minutes
    from runs group by all order by cache_bytes desc, label
""")

# %% [markdown]
# *Matching* is what variants have in common besides data, depth and width. With `params`, a variant with fewer
# attention weights gets a wider MLP, until all have as many parameters. Results depend on this choice: in
# Zadouri et al. 2025 (arXiv 2505.21487), GQA is better than MHA under one rule and worse under another.
#
# ## Learning rates
#
# Variants may differ in their best learning rate, and an untuned one can cost more than the variant. A parabola
# in the logarithm of the rate is fitted to three or more; an optimum at an end of what was tried is flagged,
# since the true one may lie beyond.

# %%
plots.rates(trained)

# %%
Markdown(study_tables.rates(files))

# %% [markdown]
# ## Differences from MHA
#
# Each variant at its best rate minus MHA at its own, seed by seed, with a 95 % interval of Student's t. An
# interval that holds 0 resolves nothing, and nothing is then said about which one is better. *Detectable* is the
# difference that so many seeds would find in four of five such studies; a smaller one may well exist. A
# *verdict* is by the variant's own interval, and in parentheses by Holm's rule for all comparisons together. A
# *rank* is a range: the places that a variant can have, all pairs considered.
#
# Seed 0, whose loss chose the rate, is among the pairs, and all losses are of the split that chose it: they may
# be a little lower than those of new seeds and text, for every variant.

# %%
Markdown(study_tables.variants(files))

# %% [markdown]
# ## Quality against bytes
#
# The plot that this project exists for. Left: trained variants, means over seeds with 95 % intervals where there
# are several, and conversions of MHA's weights, which have fewer parameters (below). Right: each variant's cache
# stored by each codec. Down and to the left is better; the steps join the least means at their bytes, and where
# intervals overlap chance may have put them there.

# %%
plots.quality_against_bytes(trained, study["conversions"], study["codecs"], "Quality against what a token costs")

# %% [markdown]
# Grouped attention alone, against its number of kv heads:

# %%
plots.quality_against_kv_heads(trained)

# %% [markdown]
# ## Training
#
# Loss curves of seed 0 at the best rate. On the right their differences from the first, which the batches' luck
# does not blur, since all read the same batches.

# %%
shortest = min(map(len, study["curves"].values()), default=1)
plots.loss_curves(study["curves"], window=max(1, shortest // 10))

# %% [markdown]
# ## Conversions
#
# A model that was trained as MHA can be turned into another variant: heads of a group are averaged, or one of
# them is kept, or keys and values are factored into a latent (plain, or weighted by what activations look like).
# Ainslie et al. 2023 (arXiv 2305.13245) found for T5 that averaged heads, trained on for 5 % of the original
# steps, come close to MHA. Here the figure and the table tell.
#
# These are not models of equal parameters: a converted one keeps MHA's MLP, while the same variant trained from
# scratch has a wider one, which makes up for its smaller attention. What lies between them owes to this, too.

# %%
plots.recovery(study["conversions"])

# %%
Markdown(study_tables.conversions(files))

# %% [markdown]
# ## What this cannot tell
#
# These models are small, their text is short, and their context is far below what caches are compressed for.
# Orders of variants are known to flip with size, with the matching rule and with details of training that matter
# more than the variant does. What carries over is the method: equal parameters, tuned rates, paired seeds, and
# no rank inside an interval.
