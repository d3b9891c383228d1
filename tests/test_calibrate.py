"""B batch, T tokens, D width, N query heads, K kv heads, G = N // K, F features of an array.

What is expected is summed in float64 NumPy, token by token, from what `observe` returns.
"""

import functools
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from kvjax import calibrate as module
from kvjax import primer
from kvjax.calibrate import calibrate, draw_windows, num_bytes
from kvjax.data import Corpus
from kvjax.decoder import Decoder, DecoderConfig, decodable

END, CONTEXT, BATCH, TOKENS = 28, 7, 4, 37
VALUES = {"v", "latent", "latent_v"}  # whose weighted sums are read


def corpus_of(lengths) -> Corpus:
    """Documents of these numbers of tokens after their end of text."""
    rng = np.random.default_rng(3)
    parts = [np.append(END, rng.integers(0, END, n)) for n in lengths]
    starts = np.cumsum([0, *map(len, parts)])
    return Corpus(np.concatenate(parts).astype(np.int32), starts.astype(np.int64), np.array(lengths, np.int64))


CORPUS = corpus_of([7, 1, 0, 24, 8, 3])  # 43 tokens: windows of 7, 1, 7 7 7 3, 7 1, 3


@pytest.fixture(scope="module", autouse=True)
def quick(quick_jit):
    """Compile layers quickly, each once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_layer", quick_jit(module._layer.__wrapped__, static_argnums=(0, 1)))
        yield


def gathered(model, corpus=CORPUS, num_tokens=TOKENS, batch_size=BATCH, seed=0, **options):
    arguments = (model.graphdef, model.params, corpus, CONTEXT, num_tokens, batch_size)
    return calibrate(*arguments, model="small", data="random", seed=seed, **options)


def windows_of(corpus: Corpus) -> list[np.ndarray]:
    """The tokens that are read of every document that fits into one window."""
    return [corpus.ids[start : stop - 1] for start, stop in itertools.pairwise(corpus.starts)]


@pytest.fixture(scope="session")
def observed(quick_jit):
    """Function to get arrays, queries and value weights of every layer, for windows padded to one batch."""

    @functools.partial(quick_jit, static_argnums=0)
    def observe(structure, params, x_BTD, positions_BT):
        block = nnx.merge(structure, params)
        found = block.attention.observe(block.attention_norm(x_BTD), positions_BT)
        return *found, block.attention.value_weights(), block(x_BTD, positions_BT)[0]

    def walk(model, windows):
        tokens_BT = np.full((len(windows), CONTEXT), 5, np.int32)
        for row, window in zip(tokens_BT, windows):
            row[: len(window)] = window
        positions_BT = np.tile(np.arange(CONTEXT, dtype=np.int32), (len(windows), 1))
        decoder = nnx.merge(model.graphdef, model.params)
        x_BTD = np.asarray(decoder.embedding_VD[...])[tokens_BT]
        for block in decoder.layers:
            *found, x_BTD = observe(*nnx.split(block), x_BTD, positions_BT)
            yield found

    return walk


def rows_of(x, windows, positions) -> np.ndarray:
    """`[tokens, K, F]` of an array `BKTF` or `BTF` at these positions of every window that has them."""
    x = np.asarray(x, np.float64)
    x = x[:, None] if x.ndim == 3 else x
    return np.array([x[b, :, t] for b, window in enumerate(windows) for t in positions if t < len(window)])


def close(actual, expected, error):
    """Equal but for float32 rounding; one head where there is no axis of heads."""
    assert error(actual, np.reshape(expected, np.shape(actual))) < 2e-5


def check_moments(moments, x_MKF, error):
    flat_MC = x_MKF.reshape(len(x_MKF), -1)
    assert moments.count == len(x_MKF)
    close(moments.total, x_MKF.sum(0), error)
    close(moments.outer, sum(np.einsum("KF,KE->KFE", x, x) for x in x_MKF), error)
    assert moments.amax == pytest.approx(np.abs(x_MKF).max(), rel=1e-5)
    if moments.total.ndim == 1:
        assert moments.cross is None
    else:
        close(moments.cross, sum(np.outer(x, x) for x in flat_MC), error)


def test_statistics_are_sums_over_observed_tokens(model, observed, error):
    """Of all that a variant leaves and its queries: 37 tokens in windows of 7 and less, two layers, two devices."""
    statistics = gathered(model)
    windows = windows_of(draw_windows(CORPUS, CONTEXT, TOKENS, seed=0))
    assert sum(map(len, windows)) == statistics.tokens == TOKENS and min(map(len, windows)) < CONTEXT
    for layer, (arrays, queries, w_NMD) in zip(statistics.layers, observed(model, windows), strict=True):
        assert layer.keys() == arrays.keys()
        for name, array in layer.items():
            check_moments(array.first, rows_of(arrays[name], windows, [0]), error)
            check_moments(array.rest, rows_of(arrays[name], windows, range(1, CONTEXT)), error)
            K = arrays[name].shape[1] if arrays[name].ndim == 4 else 1
            G = 6 // K
            assert (array.queries is None) == (name not in queries)
            if name in queries:
                q_MNF = rows_of(queries[name], windows, range(CONTEXT))
                by_head = np.einsum("MNF,MNE->NFE", q_MNF, q_MNF) / TOKENS
                close(array.queries, [sum(by_head[k * G : (k + 1) * G]) for k in range(K)], error)
            assert (array.output is None) == (name not in VALUES)
            if array.output is not None:
                by_head = [w.astype(np.float64) @ w.astype(np.float64).T for w in np.asarray(w_NMD)]
                close(array.output, [sum(by_head[k * G : (k + 1) * G]) for k in range(K)], error)


def test_names_of_what_is_gathered(model_of):
    """Keys before and after their rotation; queries of latents only where no rotation stands between."""
    of = lambda name: {n: a.queries is not None for n, a in gathered(model_of(name)).layers[1].items()}
    assert of("gqa2") == {"k": True, "k_before_rope": True, "v": False}
    assert of("low_rank") == {"latent": False}
    assert of("low_rank_split_none") == {"latent_k": True, "latent_v": False}
    assert of("mla") == {"latent": True, "k_rope": True}


def test_keys_before_rope_turn_into_the_cached_ones(model_of, observed, error):
    model = model_of("gqa3")
    windows = windows_of(draw_windows(CORPUS, CONTEXT, TOKENS, seed=0))
    arrays, queries, _ = next(observed(model, windows))
    for found in (arrays, queries):
        turned = primer.rope(np.asarray(found["k_before_rope"], np.float64), np.arange(CONTEXT), 101.0)
        assert error(found["k"], turned) < 1e-5


@pytest.fixture(scope="module")
def two(model_of):
    """A model with an axis of heads, and one without."""
    return [model_of("gqa3"), model_of("mla")]


def additive(statistics) -> dict[tuple, np.ndarray]:
    """Every sum of all layers."""
    sums = {}
    for number, layer in enumerate(statistics.layers):
        for name, array in layer.items():
            for part, moments in (("first", array.first), ("rest", array.rest)):
                for field in ("total", "outer", "cross"):
                    sums[number, name, part, field] = getattr(moments, field)
            if array.queries is not None:
                sums[number, name, "queries"] = array.queries * statistics.tokens
    return {key: value for key, value in sums.items() if value is not None}


def extremes(statistics) -> list[tuple[int, float]]:
    """Counts and largest magnitudes."""
    arrays = [array for layer in statistics.layers for array in layer.values()]
    return [(m.count, m.amax) for array in arrays for m in (array.first, array.rest)]


def check_same(a, b, error):
    ours, theirs = additive(a), additive(b)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert error(value, theirs[key]) < 1e-5, key
    for (count, amax), (expected_count, expected) in zip(extremes(a), extremes(b), strict=True):
        assert count == expected_count and amax == pytest.approx(expected, rel=1e-5)


def test_the_batch_size_changes_nothing(two, error):
    """A stream of batches and one batch, both with rows that only fill the last one."""
    assert BATCH < len(windows_of(draw_windows(CORPUS, CONTEXT, TOKENS, seed=0))) < 14
    for model in two:
        check_same(gathered(model), gathered(model, batch_size=14), error)


def test_statistics_add_up_over_documents(two, error):
    """Those of a long document and two short ones, in a batch that is padding for the most part."""
    documents = corpus_of([7, 3, 1])
    for model in two:
        whole = gathered(model, documents, 11)
        # A window must reach the context: short documents are read with the long one, which is taken off again.
        parts = [gathered(model, apart(documents, d), n) for d, n in (([0, 1], 10), ([0, 2], 8), ([0], 7))]
        sums = [additive(part) for part in parts]
        for key, value in additive(whole).items():
            assert error(value, sums[0][key] + sums[1][key] - sums[2][key]) < 1e-5, key
        for (count, amax), *others in zip(*map(extremes, (whole, *parts)), strict=True):
            counts, largest = zip(*others)
            assert count == counts[0] + counts[1] - counts[2]
            assert amax == pytest.approx(max(largest), rel=1e-6)


def apart(corpus: Corpus, documents) -> Corpus:
    parts = [corpus.ids[corpus.starts[d] : corpus.starts[d + 1]] for d in documents]
    starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return Corpus(np.concatenate(parts), starts, corpus.num_bytes[documents])


def test_a_large_mean_leaves_the_covariance(error):
    """As of keys with a bias of 400, whose squares differ by less than float32 resolves."""
    rng = np.random.default_rng(0)
    x_BTC = (400 + rng.standard_normal((3, 50, 6))).astype(np.float32)
    weights_BT = (rng.random((3, 50)) < 0.8).astype(np.float32)
    sums = {name: np.asarray(a) for name, a in module._moment_sums(x_BTC, weights_BT, (2, 3)).items()}
    moments = module._moments(sums)
    real = x_BTC[weights_BT > 0].astype(np.float64)
    assert error(moments.joint_covariance, np.cov(real.T, bias=True)) < 1e-4
    assert error(moments.covariance[1], np.cov(real.T, bias=True)[3:, 3:]) < 1e-4
    in_float32 = np.einsum("BTC,BTE,BT->CE", x_BTC, x_BTC, weights_BT) / weights_BT.sum()
    plain = in_float32 - np.outer(real.mean(0), real.mean(0))
    assert error(plain, np.cov(real.T, bias=True)) > 1e-3  # what the deviations are for


def test_progress_and_bytes(model_of):
    """Each of k, k_before_rope and v: 2 x (20 + 200 + 400) numbers, and queries or output of 200."""
    batches = []
    statistics = gathered(model_of("gqa3"), track=lambda all: batches.extend(all) or all)
    assert len(batches) == -(-len(windows_of(draw_windows(CORPUS, CONTEXT, TOKENS, 0))) // BATCH)
    assert num_bytes(statistics) == 2 * 3 * (2 * (20 + 200 + 400) + 200) * 8
    assert (statistics.context, statistics.model, statistics.data) == (CONTEXT, "small", "random")


def test_windows_are_those_of_evaluation():
    """Each once, in an order that the seed decides; the last one cut."""
    whole = draw_windows(CORPUS, CONTEXT, 43, seed=1)
    expected = []
    for start, stop in itertools.pairwise(CORPUS.starts):
        expected += [tuple(CORPUS.ids[i : min(i + 8, stop)]) for i in range(start, stop - 1, CONTEXT)]
    drawn = [tuple(whole.ids[i:j]) for i, j in itertools.pairwise(whole.starts)]
    assert sorted(drawn) == sorted(expected) and drawn != expected
    part = draw_windows(CORPUS, CONTEXT, 30, seed=1)
    assert len(part.ids) - len(part.num_bytes) == 30
    np.testing.assert_array_equal(part.ids, whole.ids[: len(part.ids)])
    assert whole.ids.tobytes() != draw_windows(CORPUS, CONTEXT, 43, seed=2).ids.tobytes()


@pytest.mark.parametrize(
    ("lengths", "num_tokens", "options", "message"),
    [
        ([7, 30], 38, {}, "num_tokens=38 must be at most 37, all that the text has"),
        ([7, 30], 6, {}, "num_tokens=6 must be at least one window, context=7"),
        ([6, 6, 5], 17, {}, "context=7 must be at most 6, the longest of 3 windows of the text"),
        ([7, 30], 7, {"seed": -1}, "seed=-1 must be at least 0"),
        ([7, 30], 7, {"batch_size": 3}, "batch_size=3 must be a multiple of the 2 devices; nearest: 2 or 4"),
    ],
)
def test_errors(model_of, lengths, num_tokens, options, message):
    with pytest.raises(ValueError) as error:
        gathered(model_of("mqa"), corpus_of(lengths), num_tokens, **options)
    assert str(error.value) == message


def test_a_scanned_model_is_unrolled(model_of, draw_params, error):
    """Its statistics are those of the same weights without the scan."""
    config = DecoderConfig(width=23, depth=2, mlp_width=31, scan=True)
    scanned = draw_params(lambda: Decoder(config, model_of("gqa3").attention, 29, jax.random.key(0)))
    of = lambda graphdef, params: gathered(SimpleNamespace(graphdef=graphdef, params=params))
    check_same(of(*scanned), of(*decodable(*scanned)), error)
