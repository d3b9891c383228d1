"""Against the same text scored through bases of fewer dimensions, and hand-solved energies.

F features, R rank, K kv heads.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import calibrate as calibration
from kvjax import compress, sensitivity
from kvjax.attention.grouped import Grouped
from kvjax.codecs import Storage
from kvjax.codecs.chain import chain
from kvjax.codecs.fit import causal_distances, eigenvalues, fit, rope_averaged
from kvjax.codecs.statistics import Statistics
from kvjax.compress import Comparer
from kvjax.data import Corpus
from kvjax.decoder import Decoder, DecoderConfig
from kvjax.rope import frequencies
from kvjax.sensitivity import dropped_parts, rank_at, sensitivities, truncated

VOCAB, END, CONTEXT, BATCH, TOKENS = 29, 28, 12, 8, 240
ATTENTION = Grouped(6, 3, head_dim=10, rope_theta=101.0)
KINDS = {"k": "query", "v": "output"}


@pytest.fixture(scope="module", autouse=True)
def programs(quick_jit):
    """The program of a layer, compiled quickly, as those of others."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, static in (
            (calibration, "_layer", (0, 1)),
            (compress, "through_layer", 0),
            (compress, "_norm", 0),
            (compress, "judge", ()),
        ):
            patch.setattr(module, name, quick_jit(getattr(module, name).__wrapped__, static_argnums=static))
        yield compress.through_layer


@pytest.fixture(scope="module")
def made(draw_params):
    """Function to get a model, a text, and statistics of it."""

    @functools.cache
    def make(depth=3) -> SimpleNamespace:
        decoder = DecoderConfig(23, depth, 31)
        graphdef, params = draw_params(lambda: Decoder(decoder, ATTENTION, VOCAB, jax.random.key(0)))
        params = jax.tree.map(jnp.asarray, params)
        ids = np.random.default_rng(3).integers(0, END, TOKENS + 1).astype(np.int32)
        corpus = Corpus(ids, np.array([0, TOKENS + 1]), np.array([TOKENS]))
        statistics = calibration.calibrate(
            graphdef, params, corpus, CONTEXT, TOKENS, BATCH, model="small", data="random"
        )
        model = (graphdef, params, corpus, CONTEXT, BATCH)
        measure = lambda kinds, *args, **options: sensitivities(
            graphdef, params, corpus, statistics, kinds, CONTEXT, BATCH, *args, **options
        )
        return SimpleNamespace(statistics=statistics, comparer=Comparer(*model), measure=measure)

    return make


def kl(comparer, layer, arrays, keys_before_rope=False, sinks=0) -> float:
    storages = [Storage()] * len(comparer.entries)
    storages[layer] = Storage(arrays, sinks=sinks)
    return comparer.compare(storages, keys_before_rope).kl.sum() / TOKENS


def test_layers_share_programs(made, programs):
    """Exact ones, those of projected keys and those of projected values have one program each, be they 1 or 3."""
    programs.clear_cache()
    made(1).measure(KINDS, 0.3)
    assert programs._cache_size() == 3
    made().measure(KINDS, 0.3)
    assert programs._cache_size() == 3


def test_weights_are_the_loss_through_smaller_bases(made):
    """Each is the KL of a basis of fewer columns, over the part of the energy that those lack: counted from the
    errors of the array's own tokens' second moment, not from eigenvalues."""
    gqa = made()
    units = []
    found = gqa.measure(KINDS, 0.3, track=lambda all: units.extend(all) or all)
    assert units == list(found) == [(layer, name) for layer in range(3) for name in "kv"]
    for layer, name in ((0, "k"), (2, "v")):
        stats = gqa.statistics.layers[layer][name]
        losses_R = [lost(stats, name, fit(KINDS[name], stats, rank, sinks=True)) for rank in range(1, 11)]
        share_R = np.array(losses_R) / lost(stats, name, None)
        rank = np.abs(share_R[:-1] - 0.3).argmin() + 1
        expected = kl(gqa.comparer, layer, {name: chain(fit(KINDS[name], stats, int(rank), sinks=True))})
        assert 0.15 < share_R[rank - 1] < 0.45 and expected > 1e-5
        assert found[layer, name] * share_R[rank - 1] == pytest.approx(expected, rel=1e-3)


def lost(stats, name, map) -> float:
    """Mean squared error of what reads the array, of all heads; without a map, of the mean alone."""
    weight_KFF, moments = (stats.queries if name == "k" else stats.output), stats.first + stats.rest
    kept_KFF = 0.0 if map is None else np.float64(map.down) @ np.float64(map.up)
    left_KFF = np.eye(10)[None] - kept_KFF
    error_KFF = left_KFF.swapaxes(-1, -2) @ moments.covariance @ left_KFF
    return np.trace(error_KFF @ weight_KFF, axis1=-2, axis2=-1).sum()


def test_a_basis_with_zeros_is_one_of_fewer_columns(made):
    """And the whole basis loses nothing but rounding."""
    gqa = made()
    stats = gqa.statistics.layers[1]["k"]
    whole = fit("query", stats, 10, sinks=True)
    of = lambda map: kl(gqa.comparer, 1, {"k": chain(map)})
    assert abs(of(truncated(whole, 10))) < 1e-6
    assert of(truncated(whole, 4)) == pytest.approx(of(fit("query", stats, 4, sinks=True)), rel=1e-3)
    assert of(truncated(whole, 4)) > 1e-3


def test_keys_before_the_rotation(made):
    """Queries meet them turned, which decides the basis."""
    gqa = made()
    found = gqa.measure({"k": "query"}, 0.3, keys_before_rope=True)
    turns = frequencies(101.0, 10)
    stats = gqa.statistics.layers[1]["k_before_rope"]
    turned = dataclasses.replace(stats, queries=rope_averaged(stats.queries, turns, causal_distances(CONTEXT)))
    dropped_R = dropped_parts(eigenvalues(turned, "query", sinks=True))
    rank = rank_at(dropped_R, 0.3)
    basis = lambda stats: truncated(fit("query", stats, 10, sinks=True), rank)
    of = lambda stats: kl(gqa.comparer, 1, {"k": chain(basis(stats))}, True)
    assert found[1, "k"] * dropped_R[rank] == pytest.approx(of(turned), rel=1e-3)
    assert of(stats) != pytest.approx(of(turned), rel=1e-2)


def test_options(made):
    """Sinks that are kept exact, in the measurement and out of the fit; one basis for all heads, without a mean."""
    gqa = made()
    stats = gqa.statistics.layers[0]["v"]
    for options, fitted, whole in (
        ({"sinks": 2}, {"sinks": False}, 10),
        ({"joint": True, "mean": False}, {"sinks": True, "joint": True, "mean": False}, 30),
    ):
        dropped_R = dropped_parts(eigenvalues(stats, "pca", **fitted))
        rank = rank_at(dropped_R, 0.2)
        codec = chain(truncated(fit("pca", stats, whole, **fitted), rank))
        expected = kl(gqa.comparer, 0, {"v": codec}, sinks=options.get("sinks", 0))
        weight = gqa.measure({"v": "pca"}, 0.2, **options)[0, "v"]
        assert weight * dropped_R[rank] == pytest.approx(expected, rel=1e-3)


def test_ranks_by_hand():
    """Energies of two heads, whose sums are 16, 3, 1 and 0 of 20."""
    dropped_R = dropped_parts(np.array([[8.0, 2, 1, 0], [8, 1, 0, 0]]))
    np.testing.assert_allclose(dropped_R, [1, 0.2, 0.05, 0, 0])
    np.testing.assert_allclose(dropped_parts(np.array([3.0, 1.0])), [1, 0.25, 0])  # without an axis of heads
    assert [rank_at(dropped_R, share) for share in (0.9, 0.13, 0.12, 0.01)] == [1, 1, 2, 2]


def test_errors(made):
    gqa = made()
    few = Statistics(gqa.statistics.layers[:2], TOKENS, CONTEXT, "", "")
    with pytest.raises(ValueError, match=r"share=0\.1 cannot be dropped: the energy is in one dimension"):
        rank_at(dropped_parts(np.array([[1.0, 1e-9, 0.0]])), 0.1)
    for measure, message in (
        (lambda: gqa.measure({"latent": "pca"}), "array='latent' is unknown; choose from k, v"),
        (lambda: gqa.measure({"k": "random"}), "kind of k='random' is unknown; choose from"),
        (lambda: gqa.measure(KINDS, 0.0), "share=0.0 must be a finite number above 0"),
        (lambda: gqa.measure(KINDS, 1.0), "share=1.0 must be below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            measure()
    with pytest.raises(ValueError, match="statistics of 2 layers must be of this model's 3"):
        sensitivity.sensitivities(
            gqa.comparer.graphdef, gqa.comparer.params, gqa.comparer._corpus, few, KINDS, CONTEXT, BATCH
        )
