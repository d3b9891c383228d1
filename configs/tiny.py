"""GQA of 0.1 M parameters on bytes, for tests and first tries: seconds on any machine."""

from kvjax.attention.grouped import Grouped
from kvjax.config import Config, OptimizerConfig, TrainConfig
from kvjax.data.config import DataConfig
from kvjax.decoder import DecoderConfig

config = Config(
    Grouped(num_heads=4, num_kv_heads=2, head_dim=16),
    DecoderConfig(width=64, depth=2, mlp_width=128),
    DataConfig(tokenizer="bytes", context=64),
    OptimizerConfig(warmup_steps=4),
    TrainConfig(
        steps=20,
        batch_size=8,
        eval_every=10,
        eval_batch_size=64,
        checkpoint_every=5,
        log_every=1,
        sample_tokens=32,
    ),
)
