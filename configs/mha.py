"""Multi-head attention: 8 query heads, 8 kv heads; the largest cache of the presets.

`python -m experiments.train --config mha`: 7.3 minutes on 2 CPU cores (AMD EPYC, shared), float32, seed 0:
validation perplexity 64.1, 1.410 bits per byte, 6,144 cache bytes per token.
"""

from kvjax.attention.grouped import Grouped
from kvjax.config import Config

config = Config(Grouped(num_heads=8, num_kv_heads=8))
