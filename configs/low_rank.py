"""low rank"""

from kvjax.attention.low_rank import LowRank
from kvjax.config import Config

config = Config(LowRank(num_heads=8, rank=96))
