"""GQA of GPT-2 small's size for one GPU: 12 layers of width 768, 12 query heads over 4 kv heads.

`python -m experiments.train --config gqa4_124m` (bfloat16 on GPU). Built and sized in a test; not
trained so far, for want of a GPU. The embedded corpus is too small for it (2 M words): give it a
larger TFDS text with `--data.name`.
"""

from kvjax.attention.grouped import Grouped
from kvjax.config import Config, OptimizerConfig, TrainConfig
from kvjax.data.config import DataConfig
from kvjax.decoder import DecoderConfig

config = Config(
    Grouped(num_heads=12, num_kv_heads=4, head_dim=64),
    DecoderConfig(width=768, depth=12, mlp_width=2880),
    DataConfig(vocab_size=32768, context=1024),
    OptimizerConfig(peak_lr=6e-4, warmup_steps=500, beta2=0.95),
    TrainConfig(steps=20_000, batch_size=128, accumulate=4, eval_every=1000, checkpoint_every=1000),
)
