"""Grouped-query attention: 8 query heads over 4 kv heads, half of multi-head attention's cache.

`python -m experiments.train --config gqa4`: 7.2 minutes on 2 CPU cores (AMD EPYC, shared), float32, seed 0:
validation perplexity 66.1, 1.420 bits per byte, 3,072 cache bytes per token.
"""

from kvjax.attention.grouped import Grouped
from kvjax.config import Config

config = Config(Grouped(num_heads=8, num_kv_heads=4))
