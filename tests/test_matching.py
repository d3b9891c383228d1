from dataclasses import replace

import pytest

from kvjax import accounting
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.config import Config
from kvjax.data.config import DataConfig
from kvjax.decoder import DecoderConfig
from kvjax.matching import match, replaced

D, F, L, V = 48, 120, 3, 257
DATA = DataConfig(tokenizer="bytes", context=33)


def config_of(attention, **decoder) -> Config:
    return Config(attention, DecoderConfig(width=D, depth=L, mlp_width=F, **decoder), DATA)


MHA = config_of(Grouped(8, 8, head_dim=6))
GQA = config_of(Grouped(8, 2, head_dim=6))
LOW_RANK = config_of(LowRank(8, head_dim=6, rank=20))
MLA = config_of(Latent(8, rank=20, rope_dim=4, nope_dim=6, value_dim=6))


def mla_attention(rank: int, rope: int) -> int:
    """By hand: parameters of the MLA layer above."""
    return D * 8 * (6 + rope) + D * (rank + rope) + rank * 8 * 12 + 8 * 6 * D + rank


def total(attention: int, mlp_width: int) -> int:
    return V * D + L * (attention + 3 * D * mlp_width + 2 * D) + D


def nearest(target: float, values, quantity) -> int:
    """By trying all."""
    return min(values, key=lambda value: (abs(quantity(value) - target), value))


def test_parameters_by_mlp_width():
    """6 kv heads fewer are 2 * 48 * 6 * 6 parameters a layer fewer: 24 more of 3 * 48 in the MLP."""
    found = match(GQA, MHA, "params", "decoder.mlp_width")
    assert (found.value, found.residual) == (F + 24, 0) and found.config == replaced(
        GQA, "decoder.mlp_width", F + 24
    )
    assert found.target == found.reached == total(4 * D * 48, F)
    found = match(MLA, MHA, "params", "decoder.mlp_width")
    of = lambda width: total(mla_attention(20, 4), width)
    assert found.value == nearest(found.target, range(1, 400), of)
    assert found.residual == pytest.approx((of(found.value) - found.target) / found.target) and found.residual
    assert accounting.num_parameters(accounting.abstract_params(found.config, V)) == found.reached
    found = match(MLA, MHA, "params", "decoder.mlp_width", multiple_of=16)
    assert found.value == nearest(found.target, range(16, 400, 16), of)


@pytest.mark.parametrize("target_width", [1, 2, 77, 4000])
def test_parameters_by_rank(target_width):
    """From the lowest value, exactly met, to far above the present one."""
    reference = replaced(MLA, "attention.rank", target_width)
    found = match(MLA, reference, "params", "attention.rank")
    assert (found.value, found.residual, found.config) == (target_width, 0, reference)


def test_bytes_by_rank_heads_and_rotary_features():
    """2 bytes an element: GQA leaves 2 * 2 * 6 = 24 a layer, MHA 96, MLA its rank and 4."""
    found = match(MLA, MHA, "kv_bytes", "attention.rank")
    assert (found.value, found.target, found.reached) == (92, 2 * L * 96, 2 * L * 96)
    assert match(LOW_RANK, GQA, "kv_bytes", "attention.rank").value == 24
    found = match(GQA, LOW_RANK, "kv_bytes", "attention.num_kv_heads")
    assert (found.value, found.reached) == (2, 2 * L * 24) and found.residual == 24 / 20 - 1
    # 60 elements lie between 4 heads' 48 and 8 heads' 96: 5 and 6 do not divide 8.
    found = match(GQA, replaced(LOW_RANK, "attention.rank", 60), "kv_bytes", "attention.num_kv_heads")
    assert found.value == 4
    # An odd number of features cannot turn: 27 - 20 = 7 is between 6 and 8, equally near; the lower one.
    found = match(MLA, replaced(LOW_RANK, "attention.rank", 27), "kv_bytes", "attention.rope_dim")
    assert (found.value, found.reached) == (6, 2 * L * 26)


def test_training_flops():
    """3 times 2 a weight and 2 N (E + V) a slot, of which a token sees 17 of 33 on average."""
    found = match(MLA, MHA, "train_flops", "decoder.mlp_width")
    assert found.target == 3 * (2 * total(4 * D * 48, F) + L * 4 * 48 * 17)
    of = lambda width: 3 * (2 * total(mla_attention(20, 4), width) + L * 2 * 8 * 16 * 17)
    assert found.value == nearest(found.target, range(1, 400), of) and found.reached == of(found.value)
    assert found.value != match(MLA, MHA, "params", "decoder.mlp_width").value


@pytest.mark.parametrize(
    ("config", "reference", "by", "free", "options", "message"),
    [
        (
            MLA,
            MHA,
            "flop",
            "attention.rank",
            {},
            "by='flop' is unknown; choose from kv_bytes, params, train_flops",
        ),
        (
            MLA,
            MHA,
            "params",
            "attention.ranks",
            {},
            "free='attention.ranks' is unknown; did you mean 'attention.rank'",
        ),
        (MLA, MHA, "params", "decoder.dropout", {}, "free='decoder.dropout' is unknown"),
        (
            MLA,
            MHA,
            "kv_bytes",
            "decoder.mlp_width",
            {},
            "free='decoder.mlp_width' does not move kv_bytes; "
            "choose from attention.rank, attention.rope_dim, decoder.depth$",
        ),
        (
            MHA,
            GQA,
            "train_flops",
            "attention.num_sinks",
            {},
            "attention.num_sinks cannot be solved for: num_sinks=1 must go with a window",
        ),
        (
            replaced(MLA, "decoder.width", 96),
            replaced(MHA, "decoder.mlp_width", 1),
            "params",
            "decoder.mlp_width",
            {},
            r"decoder.mlp_width must have a value that brings params to the reference's 40,752; nearest: 1, "
            r"which gives 75,804 \(\+86.01%\)",
        ),
        (
            GQA,
            LOW_RANK,
            "kv_bytes",
            "attention.num_kv_heads",
            {"tolerance": 0.1},
            r"to within 0.1 of the reference's 120; nearest: 2, which gives 144 \(\+20.00%\)",
        ),
        (
            GQA,
            MHA,
            "params",
            "attention.num_kv_heads",
            {"multiple_of": 3},
            "multiple_of=3 must have multiples that",
        ),
    ],
)
def test_errors(config, reference, by, free, options, message):
    with pytest.raises(ValueError, match=message):
        match(config, reference, by, free, **options)


def test_tolerance():
    """The end of a range will do if it is near; what is near enough inside does anyway."""
    below = replaced(GQA, "attention.head_dim", 2)  # 8 elements; low rank of 9 is next to one of 8
    at_least_9 = match(LOW_RANK, below, "kv_bytes", "attention.rank", multiple_of=9, tolerance=0.2)
    assert (at_least_9.value, at_least_9.residual) == (9, 0.125)
    with pytest.raises(ValueError, match="nearest: 9"):
        match(LOW_RANK, below, "kv_bytes", "attention.rank", multiple_of=9)
    assert match(GQA, LOW_RANK, "kv_bytes", "attention.num_kv_heads", tolerance=0.2001).value == 2


def test_a_field_that_saturates():
    """A window longer than the context changes nothing: the shortest that does not."""
    windowed = replaced(GQA, "attention.window", 7)
    assert match(windowed, GQA, "train_flops", "attention.window").value == 33


def test_replaced():
    changed = replaced(MLA, "attention.rank", 5)
    assert changed.attention == replace(MLA.attention, rank=5) and changed.decoder is MLA.decoder
    assert replaced(MLA, "seed", 5) == replace(MLA, seed=5)
    for field, message in {
        "attention.rnk": "field='attention.rnk' is unknown; did you mean 'attention.rank'",
        "sed": "field='sed' is unknown; did you mean 'seed'",
        "dcoder.depth": "field='dcoder.depth' is unknown; did you mean 'decoder.depth'",
        "seed.x": "field='seed.x' is unknown; nearest: 'seed'",
    }.items():
        with pytest.raises(ValueError, match=message):
            replaced(MLA, field, 5)
    with pytest.raises(ValueError, match="num_heads=8 must be a multiple of num_kv_heads=3"):
        replaced(GQA, "attention.num_kv_heads", 3)
