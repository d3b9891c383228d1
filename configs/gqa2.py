"""gqa2"""

from kvjax.attention.grouped import Grouped
from kvjax.config import Config

config = Config(Grouped(num_heads=8, num_kv_heads=2))
