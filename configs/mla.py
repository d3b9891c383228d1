"""mla"""

from kvjax.attention.latent import Latent
from kvjax.config import Config

config = Config(Latent(num_heads=8, rank=64, rope_dim=16))
