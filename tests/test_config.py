import dataclasses
import json
import sys

import pytest

from experiments import cli
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.config import Config, OptimizerConfig, TrainConfig, from_dict, to_dict
from kvjax.data.config import DataConfig
from kvjax.decoder import DecoderConfig
from kvjax.rope import RopeScaling


def changed(path: str, value) -> dict:
    """The tiny preset as JSON values, with the field at a dotted path set, or removed where it is None."""
    values = json.loads(json.dumps(to_dict(cli.preset("tiny"))))
    *sections, name = path.split(".")
    section = values
    for part in sections:
        section = section[part]
    if value is None:
        del section[name]
    else:
        section[name] = value
    return values


@pytest.mark.parametrize("name", cli.presets())
def test_a_preset_survives_json(name):
    config = cli.preset(name)
    values = json.loads(json.dumps(to_dict(config), allow_nan=False))
    again = from_dict(values)
    assert again == config and type(again.attention) is type(config.attention)
    assert to_dict(again) == values


def test_a_scaling_of_positions_survives_json():
    config = Config(Grouped(6, 2, head_dim=4, rope_scaling=RopeScaling("linear", 2.0)))
    values = json.loads(json.dumps(to_dict(config)))
    assert from_dict(values) == config
    values["attention"]["rope_scaling"]["factor"] = "2"
    with pytest.raises(ValueError, match=r"attention.rope_scaling.factor='2' must be of type float"):
        from_dict(values)


def test_what_came_later_may_be_missing():
    """Options that older runs do not know, whose defaults are what was before; no others."""
    values = to_dict(cli.preset("mla"))
    for name in ("window", "num_sinks", "rope_scaling", "logit_scale"):
        del values["attention"][name]
    del values["decoder"]["norm_eps"]
    assert from_dict(values) == cli.preset("mla")


def test_every_field_survives_json():
    config = Config(
        LowRank(6, head_dim=10, rank=None, rank_k=3, rank_v=5, position="none", rope_theta=77.0),
        DecoderConfig(30, 3, 31, False, output_scale=0.5, dropout=0.25, scan=True, remat=True, norm_eps=1e-5),
        DataConfig("other", "bytes", 300, 17, data_dir="/d", manual_dir="/m"),
        OptimizerConfig(1.5, 2, 0.5, 0.1, 0.2, 0.3, 0.4),
        TrainConfig(11, 12, 3, "bfloat16", 4, 5, 6, 7, 8),
        seed=13,
    )
    values = to_dict(config)
    assert values["attention"]["class"] == "kvjax.attention.low_rank.LowRank"
    assert values["attention"]["rank"] is None and values["attention"]["rank_v"] == 5
    for name in ("decoder", "data", "optimizer", "train"):
        default = type(getattr(config, name))()
        assert all(values[name][f.name] != getattr(default, f.name) for f in dataclasses.fields(default)), name
    assert from_dict(json.loads(json.dumps(values))) == config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("attention.num_kv_head", 2, "attention.num_kv_head is unknown; did you mean num_kv_heads?"),
        ("decoder.dept", 2, "decoder.dept is unknown; did you mean depth?"),
        ("sed", 2, "sed is unknown; did you mean seed?"),
        ("data.qqq", 2, "data.qqq is unknown; did you mean one of name, tokenizer, vocab_size, context, "),
        ("train.steps", None, "train.steps is missing"),
        ("attention.head_dim", None, "attention.head_dim is missing"),
        ("optimizer", None, "optimizer is missing"),
        ("attention", None, "attention is missing"),
        ("seed", None, "seed is missing"),
        ("decoder.depth", 2.0, "decoder.depth=2.0 must be of type int"),
        ("decoder.depth", True, "decoder.depth=True must be of type int"),
        ("decoder.scan", 1, "decoder.scan=1 must be of type bool"),
        ("train.steps", "20", "train.steps='20' must be of type int"),
        ("optimizer.peak_lr", "fast", "optimizer.peak_lr='fast' must be of type float"),
        ("data.name", 3, "data.name=3 must be of type str"),
        ("data.data_dir", 3, "data.data_dir=3 must be of type str | None"),
        ("train.dtype", "float16", "train.dtype='float16' must be of type Literal['auto', 'float32', 'bfloat16']"),
        ("seed", "0", "seed='0' must be of type int"),
        ("decoder", 3, "decoder must be an object with fields, not 3"),
        ("attention", [1], "attention must be an object with fields, not [1]"),
        ("decoder.depth", 0, "depth=0 must be at least 1"),
    ],
)
def test_values_that_are_no_configuration(path, value, message):
    with pytest.raises(ValueError) as error:
        from_dict(changed(path, value))
    assert str(error.value).startswith(message)


def test_a_list_is_no_configuration():
    with pytest.raises(ValueError, match=r"the configuration must be an object with fields, not \[\]"):
        from_dict([])  # type: ignore[arg-type]


def test_an_integer_stands_for_a_float():
    assert from_dict(changed("optimizer.weight_decay", 1)).optimizer.weight_decay == 1


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "pathlib.Path",
        "antigravity.Grouped",
        "kvjax.decoder.DecoderConfig",
        "kvjax.attention",
        "kvjax.attention.base.AttentionConfigs",
        "kvjax.attention.grouped.GroupedAttention",
        "kvjax.attention.grouped.dataclass",
        "kvjax.attention.missing.Grouped",
        "kvjax.attention..grouped.Grouped",
        "kvjax.attention.grouped",
        "Grouped",
        "",
        5,
    ],
)
def test_a_class_outside_the_attention_modules_is_refused_without_import(path):
    loaded = set(sys.modules)
    with pytest.raises(ValueError) as error:
        from_dict(changed("attention.class", path))
    assert str(error.value).startswith(f"attention.class={path!r} must name an AttentionConfig")
    assert set(sys.modules) == loaded


def test_a_missing_class_is_refused():
    with pytest.raises(ValueError, match=r"attention\.class=None must name an AttentionConfig"):
        from_dict(changed("attention.class", None))


NOT_FINITE = [float("nan"), float("inf")]
FINITE_ABOVE_0 = "must be a finite number above 0"
FRACTION = "must be at least 0.0 and below 1.0"


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (OptimizerConfig, {"peak_lr": 0.0}, f"optimizer.peak_lr=0.0 {FINITE_ABOVE_0}"),
        (OptimizerConfig, {"peak_lr": -1e-3}, f"optimizer.peak_lr=-0.001 {FINITE_ABOVE_0}"),
        *((OptimizerConfig, {"peak_lr": x}, f"optimizer.peak_lr={x} {FINITE_ABOVE_0}") for x in NOT_FINITE),
        (OptimizerConfig, {"warmup_steps": -1}, "optimizer.warmup_steps=-1 must be at least 0"),
        (OptimizerConfig, {"final_lr_fraction": 1.0}, f"optimizer.final_lr_fraction=1.0 {FRACTION}"),
        (OptimizerConfig, {"beta1": 1.0}, f"optimizer.beta1=1.0 {FRACTION}"),
        (OptimizerConfig, {"beta2": -0.1}, f"optimizer.beta2=-0.1 {FRACTION}"),
        (OptimizerConfig, {"beta2": float("nan")}, f"optimizer.beta2=nan {FRACTION}"),
        (OptimizerConfig, {"weight_decay": -0.1}, "optimizer.weight_decay=-0.1 must be at least 0.0"),
        (OptimizerConfig, {"weight_decay": float("inf")}, "optimizer.weight_decay=inf must be a finite number"),
        (OptimizerConfig, {"clip_norm": 0.0}, f"optimizer.clip_norm=0.0 {FINITE_ABOVE_0}"),
        *(
            (TrainConfig, {f.name: 0}, f"train.{f.name}=0 must be at least 1")
            for f in dataclasses.fields(TrainConfig)
            if f.type is int
        ),
        (TrainConfig, {"dtype": "bfloat"}, "train.dtype='bfloat' is unknown; did you mean 'bfloat16'?"),
        (
            TrainConfig,
            {"batch_size": 8, "accumulate": 3},
            "train.batch_size=8 must be a multiple of train.accumulate=3",
        ),
        (DecoderConfig, {"width": 0}, "width=0 must be at least 1"),
        (DecoderConfig, {"depth": 0}, "depth=0 must be at least 1"),
        (DecoderConfig, {"mlp_width": -1}, "mlp_width=-1 must be at least 1"),
        (DecoderConfig, {"output_scale": -1.0}, "output_scale=-1.0 must be at least 0.0"),
        (DecoderConfig, {"dropout": 1.0}, f"dropout=1.0 {FRACTION}"),
        (DecoderConfig, {"dropout": -0.5}, f"dropout=-0.5 {FRACTION}"),
        (Grouped, {"num_heads": 0}, "num_heads=0 must be at least 1"),
        (Grouped, {"num_kv_heads": 0}, "num_kv_heads=0 must be at least 1"),
        (
            Grouped,
            {"num_heads": 6, "num_kv_heads": 4},
            "num_heads=6 must be a multiple of num_kv_heads=4; nearest num_kv_heads: 3",
        ),
        (Grouped, {"head_dim": 0}, "head_dim=0 must be at least 2"),
        (Grouped, {"head_dim": 7}, "head_dim=7 must be even; the nearest are 6 and 8"),
        (Grouped, {"rope_theta": float("nan")}, "rope_theta=nan must be a finite number"),
        (LowRank, {"rank": 0}, "rank=0 must be at least 1"),
        (LowRank, {"rank_k": 8}, "rank=128, rank_k=8, rank_v=None must be either"),
        (LowRank, {"rank": None, "rank_k": 8}, "rank=None, rank_k=8, rank_v=None must be either"),
        (LowRank, {"rank": None}, "rank=None, rank_k=None, rank_v=None must be either"),
        (LowRank, {"position": "rop"}, "position='rop' is unknown; did you mean 'rope'?"),
        (LowRank, {"head_dim": 5}, "head_dim=5 must be even"),
        (Latent, {"rank": 0}, "rank=0 must be at least 1"),
        (Latent, {"rope_dim": 3}, "rope_dim=3 must be even"),
        (Latent, {"value_dim": 0}, "value_dim=0 must be at least 1"),
        (Latent, {"query_rank": 0}, "query_rank=0 must be at least 1"),
    ],
)
def test_impossible_fields(kind, fields, message):
    with pytest.raises(ValueError) as error:
        kind(**fields)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_impossible_seed(seed):
    with pytest.raises(ValueError, match=f"seed={seed} must be at least 0 and below 2147483648"):
        Config(Grouped(), seed=seed)


def test_warm_up_must_end_before_the_run():
    train, message = TrainConfig(steps=7), "optimizer.warmup_steps=7 must be below train.steps=7"
    with pytest.raises(ValueError, match=message):
        Config(Grouped(), optimizer=OptimizerConfig(warmup_steps=7), train=train)
    Config(Grouped(), optimizer=OptimizerConfig(warmup_steps=6), train=train)


def test_limits_are_allowed():
    OptimizerConfig(warmup_steps=0, final_lr_fraction=0.0, beta1=0.0, beta2=0.0, weight_decay=0.0)
    TrainConfig(1, 1, 1, "auto", 1, 1, 1, 1, 1)
    DecoderConfig(1, 1, 1, dropout=0.0)
    Grouped(1, 1, 2, rope_theta=1.0)
    LowRank(1, head_dim=1, rank=1, position="none")
    Config(Grouped(), seed=2**31 - 1)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        cli.preset("tiny").seed = 1  # type: ignore[misc]
