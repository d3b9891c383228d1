"""Grouped-query attention: 8 query heads over 2 kv heads.

`python -m experiments.train --config gqa2`: 7.2 minutes on 2 CPU cores (AMD EPYC, shared), float32, seed 0:
validation perplexity 66.5, 1.422 bits per byte, 1,536 cache bytes per token.
"""

from kvjax.attention.grouped import Grouped
from kvjax.config import Config

config = Config(Grouped(num_heads=8, num_kv_heads=2))
