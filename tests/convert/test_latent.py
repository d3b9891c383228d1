"""Grouped attention as MLA: the two exact constructions by hand, and the general one.

D width, N query heads, K kv heads, G = N // K, H head dim, R latent rank, P rotary dim.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.convert import target, to_latent
from kvjax.convert.surgery import replace_attention, weights_of
from kvjax.decoder import Decoder, DecoderConfig, decodable
from kvjax.rope import RopeScaling

STILL = RopeScaling("linear", 1e30)
"""Positions that turn nothing, to float32's precision."""


@pytest.fixture(scope="module")
def source(model_of):
    """Function to get a split decoder, by name, of float32; `still` without a rotation, `equal` with equal keys."""

    def get(name, still=False, equal=False):
        model = nnx.merge(model_of(name).graphdef, model_of(name).params)
        config = model.attention
        if still:
            config = dataclasses.replace(config, rope_scaling=STILL)
            model.attention = config
        for block in model.layers:
            block.attention.config = config
            if equal:
                k_DKH = jnp.repeat(block.attention.k_DKH[...][:, :1], config.num_kv_heads, axis=1)
                block.attention.k_DKH = nnx.Param(k_DKH)
        return nnx.split(model)

    return get


def config_of(split, **fields):
    like = Latent(6, rank=13, rope_dim=10)
    return dataclasses.replace(target(nnx.merge(*split).attention, like), **fields)


def unrotated(split):
    """GQA without a rotation: d_c = 2 K H, W_D = [W_K|W_V], up-projections of 0 and 1, a rotary key of zeros."""

    def make(i, old, new):
        w = weights_of(old)
        D, K, H = w["k_DKH"].shape
        N = old.config.num_heads
        group = np.repeat(np.eye(K), N // K, axis=0)  # [N, K]
        pick = np.einsum("NK,HJ->KHNJ", group, np.eye(H)).reshape(K * H, N, H)
        none = np.zeros_like(pick)
        zeros = np.zeros((D, N, 2))
        scale = (new.scale / old.scale) ** -1
        return {
            "q_DNE": np.concatenate([w["q_DNH"], zeros], axis=-1) * scale,
            "kv_down_DC": np.concatenate(
                [w["k_DKH"].reshape(D, -1), w["v_DKH"].reshape(D, -1), zeros[:, 0]], axis=1
            ),
            "k_up_RNH": np.concatenate([pick, none]),
            "v_up_RNV": np.concatenate([none, pick]),
            "o_NVD": w["o_NHD"],
        }

    K = nnx.merge(*split).attention.num_kv_heads
    return replace_attention(*split, config_of(split, rank=2 * K * 10, rope_dim=2), make)


def rotated(split):
    """GQA with a rotation: d_R = K H of tiled frequencies, queries zero outside their group's block, d_c = K H."""

    def make(i, old, new):
        w = weights_of(old)
        D, K, H = w["k_DKH"].shape
        N = old.config.num_heads
        group = np.repeat(np.eye(K), N // K, axis=0)
        q_rope = np.einsum("DNH,NK->DNKH", w["q_DNH"], group).reshape(D, N, K * H)
        pick = np.einsum("NK,HJ->KHNJ", group, np.eye(H)).reshape(K * H, N, H)
        return {
            "q_DNE": np.concatenate([np.zeros((D, N, H)), q_rope * math.sqrt((H + K * H) / H)], axis=-1),
            "kv_down_DC": np.concatenate([w["v_DKH"].reshape(D, -1), w["k_DKH"].reshape(D, -1)], axis=1),
            "k_up_RNH": np.zeros((K * H, N, H)),
            "v_up_RNV": pick,
            "o_NVD": w["o_NHD"],
        }

    K = nnx.merge(*split).attention.num_kv_heads
    config = config_of(split, rank=K * 10, rope_dim=K * 10, rope_blocks=K)
    return replace_attention(*split, config, make)


@pytest.mark.parametrize("name", ["gqa3", "gqa2", "mha"])
def test_exact_by_hand(name, source, unlike):
    """Logits whole and token by token, absorbed: equal at positions from 1 on."""
    still, turning = source(name, still=True), source(name)
    assert unlike(unrotated(still), still) < 2e-5
    assert unlike(rotated(turning), turning) < 2e-5
    assert unlike(unrotated(still), turning) > 1e-2  # the rotation is there to be lost


def test_frequencies_have_to_be_tiled(source, unlike):
    """One run of frequencies over all blocks is another model."""
    split = source("gqa3")
    model = nnx.merge(*rotated(split))
    for block in model.layers:
        block.attention.config = dataclasses.replace(block.attention.config, rope_blocks=1)
    assert unlike(nnx.split(model), split) > 1e-2


@pytest.mark.parametrize("interleaved", [False, True])
def test_with_room_for_everything_the_general_one_is_exact(interleaved, source, unlike):
    """All of GQA's rotary components in K blocks, or MQA's in one; and a cache that is GQA's, as it must be."""
    for name, K in (("gqa3", 2), ("mqa", 1)):
        split = source(name)
        room = {"rank": 10 * K, "rope_dim": 10 * K, "rope_blocks": K, "rope_interleaved": interleaved}
        config = config_of(split, **room)
        assert config.elements_per_token() == nnx.merge(*split).attention.elements_per_token()
        assert unlike(to_latent(*split, config, balance=True), split) < 2e-5
        assert unlike(to_latent(*split, dataclasses.replace(config, rank=10 * K - 1)), split) > 1e-3


def test_what_does_not_turn_needs_no_rotary_key(source, unlike):
    """Nor more rank than the width: 23 here, of K + V features 40."""
    split = source("gqa3", still=True)
    assert unlike(to_latent(*split, config_of(split, rank=23, rope_dim=2)), split) < 2e-5


def test_equal_keys_share_one_rotary_key(source, unlike):
    """The principal component of each frequency is all that there is: MHA's 120 elements in 33, exactly."""
    split = source("mha", equal=True)
    config = config_of(split, rank=23, rope_dim=10)
    assert config.elements_per_token() == 33
    assert unlike(to_latent(*split, config), split) < 2e-5
    assert unlike(to_latent(*split, dataclasses.replace(config, rope_dim=8)), split) > 1e-3  # folded frequencies


def test_one_rotary_key_keeps_the_most_energy_of_each_frequency(source):
    """Against eigenvectors of the 2 x 2 complex second moments: what a layer's keys lose of their rotation."""
    split = source("gqa3")
    moment = np.cov(np.random.default_rng(1).standard_normal((50, 23)) * np.geomspace(1, 9, 23), rowvar=False)
    made = nnx.merge(*to_latent(*split, config_of(split, rank=23), [moment] * 2))
    k_DKH = np.asarray(nnx.merge(*split).layers[1].attention.k_DKH[...], np.float64)
    k_DKJ = k_DKH[..., :5] + 1j * k_DKH[..., 5:]
    rope_DP = np.asarray(made.layers[1].attention.kv_down_DC[...], np.float64)[:, 23:]
    for j in range(5):
        largest = np.linalg.eigvalsh(k_DKJ[:, :, j].conj().T @ moment @ k_DKJ[:, :, j])[-1]
        kept = np.trace(rope_DP[:, [j, j + 5]].T @ moment @ rope_DP[:, [j, j + 5]])
        assert abs(kept - largest) < 1e-4 * largest


def test_a_stretched_rotation_keeps_its_magnitude(source, unlike):
    """YaRN's factor on rotated features stays on those that lose their rotation."""
    yarn = RopeScaling("yarn", 1.0, 64, beta_fast=32.0, beta_slow=1.0, magnitude=1.3)
    model = nnx.merge(*source("gqa3"))
    model.attention = dataclasses.replace(model.attention, rope_theta=1e30, rope_scaling=yarn)
    for block in model.layers:
        block.attention.config = model.attention
        # Pairs 0 and 1 have frequencies 1 and 1e-6; without them nothing turns.
        k_DKH = block.attention.k_DKH[...].at[..., np.array([0, 1, 5, 6])].set(0.0)
        block.attention.k_DKH = nnx.Param(k_DKH)
    split = nnx.split(model)
    assert unlike(to_latent(*split, config_of(split, rank=23, rope_dim=4)), split) < 2e-5


def test_a_normed_latent_has_its_usual_size(source):
    """Of white inputs the mean square of the features of a latent is the singular values' mean."""
    split = source("mqa")
    made = nnx.merge(*to_latent(*split, config_of(split, rank=10, latent_norm=True)))
    for old, new in zip(nnx.merge(*split).layers, made.layers):
        s = np.linalg.svd(np.asarray(old.attention.v_DKH[...], np.float64)[:, 0], compute_uv=False)
        gain_H = np.asarray(new.attention.kv_norm.gain_H[...])
        np.testing.assert_allclose(gain_H, np.sqrt(s.sum() / 10), rtol=1e-5)


def test_a_scanned_model_comes_out_unrolled(unlike, draw_params):
    attention, config = Grouped(6, 1, head_dim=10), DecoderConfig(width=23, depth=2, mlp_width=31, scan=True)
    scanned = draw_params(lambda: Decoder(config, attention, 29, jax.random.key(1)))
    made = to_latent(*scanned, dataclasses.replace(target(attention, Latent(6)), rank=10, rope_dim=10))
    assert unlike(made, decodable(*scanned)) < 2e-5


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gqa3", {"query_rank": 5}, "attention.query_rank=5 must be None: the source's queries have none"),
        ("gqa3", {"nope_dim": 8}, "attention.nope_dim=8 must be 10, as in the source"),
        ("gqa3", {"value_dim": 8}, "attention.value_dim=8 must be 10, as in the source"),
        ("gqa3", {"rope_theta": 10.0}, "attention.rope_theta=10.0 must be 101.0, as in the source"),
        ("gqa3", {"rank": 24}, "attention.rank=24 must be at least 1 and at most 23"),
        ("gqa_norm_bias", {}, "the source's attention.qk_norm=True has no place in Latent"),
    ],
)
def test_what_cannot_be_converted(name, fields, message, source):
    split = source(name)
    with pytest.raises(ValueError, match=message):
        to_latent(*split, config_of(split, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_blocks": 0}, "rope_blocks=0 must be at least 1"),
        ({"rope_dim": 10, "rope_blocks": 2}, r"rope_dim=10 must be a multiple of 2 \* rope_blocks=4: 8 and 12"),
        ({"rope_dim": 2, "rope_blocks": 2}, r"rope_dim=2 must be a multiple of 2 \* rope_blocks=4: 4"),
    ],
)
def test_blocks_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        Latent(**fields)
