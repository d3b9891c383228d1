"""What recipes make of models, against fits called directly, sums by hand, and the bytes of real caches.

K kv heads, T tokens, F features of a token.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import cache as caches
from kvjax.codecs import fit
from kvjax.codecs.base import Exact, Storage
from kvjax.codecs.floats import Fp8, NvFp4
from kvjax.codecs.integers import Int
from kvjax.codecs.rotations import haar, hadamard_matrix
from kvjax.codecs.statistics import ArrayStatistics, Moments, Statistics
from kvjax.recipe_build import build, describe
from kvjax.recipes import parse
from kvjax.rope import frequencies
from kvjax.slots import nbytes

LAYERS, K, F, SINKS, T, CONTEXT = 3, 2, 20, 30, 300, 32
LATENT = {"latent": 12, "k_rope": 4}


def moments(x):
    """Of `[K, T, F]` or `[T, F]`."""
    x_TC = np.swapaxes(x, 0, 1).reshape(x.shape[1], -1) if x.ndim == 3 else x
    outer = np.swapaxes(x, -1, -2) @ x
    return Moments(len(x_TC), x.sum(-2), outer, x_TC.T @ x_TC if x.ndim == 3 else None, float(np.abs(x).max()))


class Model:
    """Arrays of every layer with outlying first tokens, of a falling spectrum, another one in every layer."""

    def __init__(self, shapes, names, layers=LAYERS):
        rng = np.random.default_rng(0)
        entry = {
            n: jax.ShapeDtypeStruct((1, *shape[:-1], 128, shape[-1]), jnp.float32) for n, shape in shapes.items()
        }
        self.entries = [entry] * layers
        self.first, self.rest, found = [], [], []
        for layer in range(layers):
            draw = lambda *shape: rng.standard_normal(shape)
            square = lambda *lead, f: np.einsum("...if,...ig->...fg", *[draw(*lead, f, f)] * 2)  # noqa: B023
            self.first.append({})
            self.rest.append({})
            found.append({})
            for name in names:
                *lead, features = shapes[name.removesuffix("_before_rope")]
                fall = (0.4 + 0.2 * (layer + (name == "v"))) ** np.arange(features)[:, None]
                rest = draw(*lead, T, features) @ (fall * draw(features, features)) + draw(*lead, 1, features)
                first = 7 + draw(*lead, SINKS, features)
                queries = None if name == "v" else square(*lead, f=features)
                output = square(*lead, f=features) if name in ("v", "latent") else None
                self.first[layer][name], self.rest[layer][name] = first, rest
                found[layer][name] = ArrayStatistics(moments(first), moments(rest), queries, output)
        self.statistics = Statistics(tuple(found), 1000, CONTEXT, "small", "random")

    def build(self, text, **options):
        return build(parse(text), self.entries, self.statistics, **options)


@pytest.fixture(scope="module")
def gqa():
    return Model({"k": (K, F), "v": (K, F)}, ("k", "k_before_rope", "v"))


@pytest.fixture(scope="module")
def mla():
    return Model({name: (features,) for name, features in LATENT.items()}, LATENT)


def same(linear, expected):
    assert linear.joint == expected.joint
    for one, other in zip(jax.tree.leaves(linear), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "kind", "rank", "options"),
    [
        ("pca5", "pca", 5, {"sinks": True}),
        ("pca5,sinks=2", "pca", 5, {}),
        ("pca5:all,sinks=2", "pca", 5, {"sinks": True}),
        ("pca22%:rest:nomean", "pca", 4, {"mean": False}),
        ("pca11%:joint", "pca", 4, {"sinks": True, "joint": True}),
        ("random5:seed3", "random", 5, {"sinks": True, "seed": 3}),
        ("random5", "random", 5, {"sinks": True, "seed": 0}),
        ("k=query5,v=output5", "query", 5, {"sinks": True}),
        ("k=querydiag5:nomean", "querydiag", 5, {"sinks": True, "mean": False}),
        ("k=keyquery5", "keyquery", 5, {"sinks": True}),
    ],
)
def test_maps_are_the_fits(gqa, text, kind, rank, options):
    for storage, stats in zip(gqa.build(text), gqa.statistics.layers):
        same(storage.arrays["k"].linear, fit.fit(kind, stats["k"], rank, **options))
        assert storage.arrays["k"].inner == Exact()
    if "output" in text:
        same(storage.arrays["v"].linear, fit.output_weighted(stats["v"], rank, sinks=True))


def test_arrays_without_heads(mla):
    storage = mla.build("latent=pca50%+int4")[1]
    same(storage.arrays["latent"].linear, fit.pca(mla.statistics.layers[1]["latent"], 6, sinks=True))
    assert storage.arrays["latent"].inner == Int(4) and storage.arrays["k_rope"] == Exact()


def test_chains_of_maps(gqa):
    linear = gqa.build("k=pca4+haar:seed2+hadamard+int4:g2")[2].arrays["k"].linear
    pca, turn = fit.pca(gqa.statistics.layers[2]["k"], 4, sinks=True), hadamard_matrix(4) / 2
    down = np.float64(pca.down) @ np.float64(haar(4, 2).down) @ turn
    np.testing.assert_allclose(linear.down, down, atol=1e-5)
    np.testing.assert_allclose(linear.up, np.swapaxes(down, 1, 2), atol=1e-5)
    np.testing.assert_allclose(linear.mean, pca.mean, rtol=1e-6)
    assert build(parse("haar+mxfp4"), gqa.entries)[0].arrays["v"].map.down.shape == (F, F)


def test_unrotated_keys_are_weighed_by_queries_as_they_turn(gqa):
    """Rotated keys have other statistics; kinds that look at no queries need no frequencies."""
    rates = frequencies(50.0, F)
    for context in (None, 9):
        storages = gqa.build("k=query5,v=pca5,keys=before_rope", frequencies=rates, context=context)
        for storage, stats in zip(storages, gqa.statistics.layers):
            k = stats["k_before_rope"]
            averaged = fit.rope_averaged(k.queries, rates, fit.causal_distances(context or CONTEXT))
            expected = fit.query_aware(dataclasses.replace(k, queries=averaged), 5, sinks=True)
            same(storage.arrays["k"].linear, expected)
            assert np.abs(expected.down - fit.query_aware(k, 5, sinks=True).down).max() > 1e-2
            same(storage.arrays["v"].linear, fit.pca(stats["v"], 5, sinks=True))
    plain = gqa.build("k=pca5,keys=before_rope")[1].arrays["k"].linear
    same(plain, fit.pca(gqa.statistics.layers[1]["k_before_rope"], 5, sinks=True))
    with pytest.raises(ValueError, match="frequencies must be given for keyquery5 with keys=before_rope"):
        gqa.build("k=keyquery5,keys=before_rope")


def test_scales_reach_the_largest_value_that_was_measured(gqa):
    for text, largest in (("{}", 1.25), ("{}:h2", 2.0), ("{},sinks=1", 1.25)):
        for layer in range(LAYERS):
            both = [gqa.rest[layer]["v"]] + ([] if "sinks" in text else [gqa.first[layer]["v"]])
            amax = largest * max(np.abs(x).max() for x in both)
            codec = gqa.build(text.format("v=fp8"))[layer].arrays["v"]
            assert isinstance(codec, Fp8) and codec.scale == pytest.approx(amax / 448, rel=1e-6)
            codec = gqa.build(text.format("v=nvfp4"))[layer].arrays["v"]
            assert isinstance(codec, NvFp4) and codec.tensor_scale == pytest.approx(amax / 448 / 6, rel=1e-6)


@pytest.mark.parametrize("headroom", ["", ":h2.5"])
@pytest.mark.parametrize("sinks", ["", ",sinks=1"])
@pytest.mark.parametrize("maps", ["pca5", "pca7:joint", "pca5:rest", "pca5:nomean+haar", "haar", "k=query4:rest"])
def test_scales_after_a_map_are_estimated_from_its_tokens(gqa, maps, sinks, headroom):
    """8 standard deviations, or the mean of encoded first tokens, times the headroom; here of the tokens themselves."""
    factor = float(headroom[2:] or 1.25)
    for layer, storage in enumerate(gqa.build(f"{maps}+fp8{headroom}{sinks}")):
        codec = storage.arrays["k"]
        z = lambda x, map=codec.linear: np.asarray(map.apply(np.float32(x[None]))[0], np.float64)
        first, rest = z(gqa.first[layer]["k"]), z(gqa.rest[layer]["k"])
        tokens = rest if sinks else np.concatenate([rest, first], axis=-2)
        deviations = 8 * np.sqrt(np.square(tokens).mean(-2).max())
        mean = 0.0 if sinks else np.abs(first.mean(-2)).max()
        assert codec.inner.scale * 448 == pytest.approx(factor * max(deviations, mean), rel=1e-4)
        assert np.abs(tokens).max() < codec.inner.scale * 448  # none saturates


def test_a_far_away_first_token_sets_the_scale(gqa):
    """Which is rare: its mean lies beyond 8 standard deviations of all."""
    stats = gqa.statistics.layers[0]["k"]
    far = moments(np.full((K, 1, F), 900.0))
    layer = {"k": dataclasses.replace(stats, first=far), "v": gqa.statistics.layers[0]["v"]}
    statistics = dataclasses.replace(gqa.statistics, layers=(layer,))
    (storage,) = build(parse("k=pca5:rest+fp8"), gqa.entries[:1], statistics)
    z = np.asarray(storage.arrays["k"].linear.apply(jnp.full((1, K, 1, F), 900.0)))
    assert storage.arrays["k"].inner.scale * 448 == pytest.approx(1.25 * np.abs(z).max(), rel=1e-5)


def test_only_the_named_layers_are_compressed(gqa):
    storages = gqa.build("k=int8,sinks=3,recent=5,layers=1")
    exact = Storage({"k": Exact(), "v": Exact()})
    assert storages == (exact, Storage({"k": Int(8), "v": Exact()}, sinks=3, recent=5), exact)


FORMATS = ["exact", "bf16", "int8", "int4", "int2:g4:asym", "int4:channel8", "int2:channel4:r16", "fp8", "fp8:b8"]
FORMATS += ["mxfp8", "mxfp4", "nvfp4"]
MAPS = ["", "", "pca3+", "haar+", "pca50%:rest+haar+", "random7%+"]
SHAPES = [{"k": (1, 7), "v": (1, 7)}, {"k": (3, 5), "v": (3, 8)}, {"latent": (9,)}]


def random_recipe(rng, shapes):
    maps = [*MAPS, f"pca{shapes['k'][0]}:joint+"] if "k" in shapes else MAPS
    codec = lambda: str(rng.choice(maps)) + str(rng.choice(FORMATS))
    texts = [[codec()], [f"{name}={codec()}" for name in shapes], [f"{min(shapes)}={codec()}"]]
    options = [f"sinks={rng.integers(4)}", f"recent={16 * rng.integers(3)}", f"layers={rng.integers(2)}"]
    return ",".join([*texts[rng.integers(3)], *options[rng.integers(3) :]])


def test_bytes_are_those_of_a_real_cache():
    """Encoded slots, exact tokens besides, and what is calibrated, of recipes at random."""
    rng, sizes = np.random.default_rng(0), set()
    for shapes in SHAPES:
        model = Model(shapes, shapes, layers=2)
        for _ in range(7):
            storages, slots = model.build(random_recipe(rng, shapes)), 256 * int(rng.integers(1, 3))
            dtype = rng.choice([jnp.bfloat16, jnp.float32])
            room = lambda a, slots=slots, t=dtype: jax.ShapeDtypeStruct((2, *a.shape[1:-2], slots, a.shape[-1]), t)
            entries = [jax.tree.map(room, entry) for entry in model.entries]
            memory = jax.eval_shape(lambda e=tuple(entries), s=storages: caches.empty(e, s)).memory
            told = describe(storages, entries, slots)
            assert told["bytes_per_token"] * slots * 2 == pytest.approx(nbytes(memory), rel=1e-12)
            kept = sum(nbytes({name: m[name] for name in ("sinks", "recent") if name in m}) for m in memory)
            assert told["exact_bytes"] * 2 == kept
            assert told["encoded_bytes_per_token"] * slots * 2 == pytest.approx(nbytes(memory) - kept, rel=1e-12)
            assert told["calibrated_bytes"] == sum(np.asarray(a).nbytes for a in jax.tree.leaves(storages))
            sizes.add((kept > 0, told["bytes_per_token"]))
    assert len(sizes) > 15 and {kept for kept, _ in sizes} == {True, False}


def test_slots_that_a_cache_cannot_have(gqa):
    with pytest.raises(ValueError, match="slots=100 must be a multiple of 256; nearest: 256 or 256"):
        describe(gqa.build("int8"), gqa.entries, 100)


BITS = {
    "bf16": lambda r: 16 * r,
    "int8": lambda r: 8 * r + 16,
    "int4:g4": lambda r: 4 * r + 16 * math.ceil(r / 4),
    "int2:channel32": lambda r: 2 * r + r,
    "nvfp4": lambda r: 4 * r + 8 * math.ceil(r / 16),
    "exact": lambda r: 32 * r,
}
"""Of a head's token of r dimensions."""


def ranks_of(storages):
    linears = {(layer, n): codec.linear for layer, s in enumerate(storages) for n, codec in s.arrays.items()}
    return {unit: linear.down.shape[-1] for unit, linear in linears.items() if linear is not None}


@pytest.mark.parametrize("allocate", ["uniform", "water", "sensitivity"])
def test_budgets_are_kept_and_leave_no_room(gqa, allocate):
    rng = np.random.default_rng(0)
    weights = {(layer, name): float(rng.random()) for layer in range(LAYERS) for name in "kv"}
    for _ in range(8):
        formats = dict(zip("kv", rng.choice(list(BITS), 2)))
        bits = lambda name, r, formats=formats: K * BITS[formats[name]](r)
        fixed = 2 * K * F * 32  # of layer 0, which is exact
        least, most = (fixed + 2 * sum(bits(n, r) for n in "kv") for r in (1, F))
        budget = int(rng.integers(math.ceil(least / 8), most // 8 + 2))
        text = f"k=pca+{formats['k']},v=random+{formats['v']},layers=1-2,budget={budget},allocate={allocate}"
        storages = gqa.build(text, weights=weights)
        ranks = ranks_of(storages)
        assert ranks.keys() == {(layer, name) for layer in (1, 2) for name in "kv"}
        total = fixed + sum(bits(name, r) for (_, name), r in ranks.items())
        assert total <= 8 * budget
        for (_, name), r in ranks.items():
            assert r == F or total - bits(name, r) + bits(name, r + 1) > 8 * budget
        assert describe(storages, gqa.entries, 256)["encoded_bytes_per_token"] * 8 == total


def test_uniform_ranks_are_the_same_part_of_every_array(gqa, mla):
    for rank in (1, 7, F):
        whole = LAYERS * 2 * K * BITS["nvfp4"](rank)
        ranks = ranks_of(gqa.build(f"pca+nvfp4,budget={math.ceil(whole / 8)}"))
        assert ranks == {(layer, name): rank for layer in range(LAYERS) for name in "kv"}
    half = ranks_of(mla.build("pca+bf16,budget=50%"))
    assert half == {(layer, name): features // 2 for layer in range(LAYERS) for name, features in LATENT.items()}


@pytest.mark.parametrize("weighted", [False, True])
def test_water_goes_where_energies_are(gqa, weighted):
    """Of spectra that are computed from the tokens, each as parts of its sum; all dimensions cost the same."""
    rng = np.random.default_rng(1)
    weights = {(layer, name): float(rng.random()) for layer in range(LAYERS) for name in "kv"}
    listed = []
    for unit, weight in weights.items():
        x_KTF = gqa.rest[unit[0]][unit[1]]
        spectra = np.linalg.svd(x_KTF - x_KTF.mean(1, keepdims=True), compute_uv=False) ** 2
        energies = spectra.sum(0) / spectra.sum() * (weight if weighted else 1.0)
        listed += [(math.inf if number == 0 else energy, unit) for number, energy in enumerate(energies)]
    listed.sort(reverse=True)
    for dimensions in (6, 31, 80):
        kept = [unit for _, unit in listed[:dimensions]]
        budget = f"budget={dimensions * K * 2},allocate={'sensitivity' if weighted else 'water'}"
        ranks = ranks_of(gqa.build(f"pca:rest+bf16,{budget}", weights=weights))
        assert ranks == {unit: kept.count(unit) for unit in weights}
    assert len({kept.count(unit) for unit in weights}) > 2


def test_joint_ranks_are_of_all_heads(gqa):
    most = LAYERS * (BITS["int8"](K * F) + K * F * 32)
    ranks = ranks_of(gqa.build(f"k=pca:joint+haar+int8,budget={most // 8},allocate=water"))
    assert ranks == {(layer, "k"): K * F for layer in range(LAYERS)}


EXACT_BYTES = LAYERS * K * F * 4


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("q=int8", {}, "recipe 'q=int8': array='q' is unknown; choose from k, v"),
        ("int8,layers=1-3", {}, "layers=1-3 must be of the model's 0-2; nearest: 1-2"),
        ("int8,layers=7", {}, "layers=7-7 must be of the model's 0-2; nearest: 2-2"),
        ("k=int4:channel32,recent=5", {}, "recent=5 must be a multiple of the 32 tokens encoded together"),
        (
            "k=pca21",
            {},
            "layer 0, k=pca21: rank=21 must be at least 1 and at most 20, the features of a token's vector",
        ),
        (
            "v=query3",
            {},
            "layer 0, v=query3: kind='query' needs statistics of queries, which this array lacks; choose pca or random",
        ),
        (
            "k=pca11+hadamard",
            {},
            "layer 0, k=pca11+hadamard: n=11 must be the order of a known Hadamard matrix; nearest: 8 and 12",
        ),
        (
            "pca3",
            {"context": 33},
            "statistics of windows of 32 tokens must cover the context=33: calibrate with --context 33",
        ),
        (
            "k=pca+int8,budget=240",
            {},
            f"budget=240, 240 bytes per token, must be at least {EXACT_BYTES + 18}, or 103.8%: {EXACT_BYTES} for arrays "
            "with nothing to choose, and rank 1 for the others",
        ),
        (
            "pca+int8,budget=1%",
            {},
            "budget=1%, 4.8 bytes per token, must be at least 36, or 7.5%: 0 for arrays with nothing to choose, "
            "and rank 1 for the others",
        ),
        (
            "pca+int8,budget=50%,allocate=sensitivity",
            {"weights": {(0, "k"): 1.0}},
            "allocate=sensitivity needs a weight of layer 0, v; or choose water",
        ),
    ],
)
def test_what_a_model_lacks_is_refused(gqa, text, options, message):
    with pytest.raises(ValueError) as error:
        gqa.build(text, **options)
    assert str(error.value) == message


def test_names_of_another_variant_are_refused(mla):
    with pytest.raises(ValueError, match="recipe 'k=int8': array='k' is unknown; choose from k_rope, latent"):
        mla.build("k=int8")
    with pytest.raises(
        ValueError, match="keys=before_rope must go with a model that caches k; this caches k_rope, latent"
    ):
        mla.build("int8,keys=before_rope")
    with pytest.raises(
        ValueError, match="layer 0, k_rope=pca3:joint: joint=True must be left out for an array without"
    ):
        mla.build("pca3:joint")


def test_statistics_must_be_there_and_of_this_model(gqa, mla):
    for text, needs, other in (
        ("k=haar+fp8", "fp8", "fp8:scale1"),
        ("nvfp4:h2", "nvfp4:h2", "mxfp4"),
        ("k=int8,v=pca3+fp8", "pca3", "haar"),
    ):
        with pytest.raises(ValueError) as error:
            build(parse(text), gqa.entries)
        assert str(error.value) == f"{needs} needs statistics: run experiments.calibrate; without, choose {other}"
    with pytest.raises(ValueError, match=r"statistics of 3 layers \(of small\) must be of this model's 2"):
        build(parse("nvfp4"), gqa.entries[:2], gqa.statistics)
    with pytest.raises(ValueError, match=r"statistics \(of small\) lack k in layer 0; this model's is \[2, 20\]"):
        build(parse("nvfp4"), gqa.entries, mla.statistics)
    with pytest.raises(
        ValueError, match=r"statistics \(of small\) have \[2, 20\] of v in layer 0; this model's is \[40\]"
    ):
        entry = {"k": gqa.entries[0]["k"], "v": jax.ShapeDtypeStruct((1, 128, K * F), jnp.float32)}
        build(parse("k=pca3"), [entry] * LAYERS, gqa.statistics)
    # Nothing of them is asked for, so nothing is refused.
    assert build(parse("int8"), gqa.entries[:2], mla.statistics, context=99)[1].arrays["k"] == Int(8)
