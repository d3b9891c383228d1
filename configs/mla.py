"""Multi-head latent attention (DeepSeek-V2): a normed latent of 64 and one rotary key of 16 for 8 heads.

`python -m experiments.train --config mla`: 8.8 minutes on 2 CPU cores (AMD EPYC, shared), float32, seed 0:
validation perplexity 68.5, 1.432 bits per byte, 1,280 cache bytes per token.
"""

from kvjax.attention.latent import Latent
from kvjax.config import Config

config = Config(Latent(num_heads=8, rank=64, rope_dim=16))
