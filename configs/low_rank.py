"""Low-rank KV: keys and values of 8 heads from one latent of 96, keys rotated whenever they are read.

`python -m experiments.train --config low_rank`: as the other presets but for attention.
"""

from kvjax.attention.low_rank import LowRank
from kvjax.config import Config

config = Config(LowRank(num_heads=8, rank=96))
