"""Low-rank KV: keys and values of 8 heads from one latent of 96, keys rotated whenever they are read.

`python -m experiments.train --config low_rank`: 7.5 minutes on 2 CPU cores (AMD EPYC, shared), float32, seed 0:
validation perplexity 67.2, 1.426 bits per byte, 1,536 cache bytes per token.
"""

from kvjax.attention.low_rank import LowRank
from kvjax.config import Config

config = Config(LowRank(num_heads=8, rank=96))
