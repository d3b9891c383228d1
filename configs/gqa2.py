"""Grouped-query attention: 8 query heads over 2 kv heads.

`python -m experiments.train --config gqa2`: as the other presets but for attention.
"""

from kvjax.attention.grouped import Grouped
from kvjax.config import Config

config = Config(Grouped(num_heads=8, num_kv_heads=2))
