"""Which cache at which quality: nine variants of equal parameters, three learning rates, three paired seeds.

`python -m experiments.sweep --study kv_cache --workers 2`. Every variant has the parameters of `mha`, its MLP
being wider where attention is smaller. Four of them leave 48 elements a token and layer: MQA, the two small
latents, and the control of Shazeer (2019), multi-head attention whose heads are small enough to cost no more. A
rate of 6e-3 was tried first, for `mha` and `gqa4`, and was far worse than 3e-3.

45 runs of about five minutes on one core, then codecs and conversions of one or two: some three hours of two
cores of an AMD EPYC machine. Means over seeds lie from 1.544 to 1.559 bits per byte; `notebooks/study.md` says
what follows from that, and what does not.
"""

import dataclasses

from configs.mha import config as mha
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.study import Conversion, Study

train = dataclasses.replace(mha.train, steps=1000, eval_every=1000, checkpoint_every=500, sample_tokens=32)
base = dataclasses.replace(mha, train=train)
attention = {
    "mha": Grouped(8, 8),
    "gqa4": Grouped(8, 4),
    "gqa2": Grouped(8, 2),
    "mqa": Grouped(8, 1),
    "mha_small_heads": Grouped(4, 4, head_dim=6),
    "low_rank96": LowRank(8, rank=96),
    "low_rank48": LowRank(8, rank=48),
    "mla64": Latent(8, rank=64, rope_dim=16),
    "mla32": Latent(8, rank=32, rope_dim=16),
}

study = Study(
    {label: dataclasses.replace(base, attention=variant) for label, variant in attention.items()},
    reference="mha",
    matching="params",
    peak_lrs=(3e-3, 1.5e-3, 7.5e-4),
    seeds=3,
    codecs=("exact", "fp16", "int8", "fp8", "nvfp4", "haar+nvfp4", "pca50%+fp16"),
    codec_seeds=3,
    conversions=(
        Conversion("gqa4", "gqa4", ("mean", "first", "random")),
        Conversion("gqa2", "gqa2", ("mean", "first", "random")),
        Conversion("mqa", "mqa", ("mean", "first", "random")),
        Conversion("low_rank96", "low_rank", ("svd", "whitened")),
        Conversion("mla64", "mla", ("whitened",)),
    ),
)
