"""The primer against hand-solved numbers, plain loops and identities, in float64."""

import doctest
import math

import numpy as np
import pytest

from kvjax import primer

TIGHT = {"rtol": 0, "atol": 1e-12}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_docstring_examples():
    results = doctest.testmod(primer)
    assert (results.failed, results.attempted) == (0, 9)


# Sizes and counts


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((4096, 32, 32, 128, 2), 2_147_483_648),
        ((4096, 32, 4, 128, 2), 256 * 2**20),
        ((2048, 32, 8, 128), 256 * 2**20),
        ((2048, 32, 4, 128), 128 * 2**20),
        ((2048, 32, 1, 128), 32 * 2**20),
        ((2048, 32, 32, 128, 4), 2048 * 2**20),
        ((1024, 28, 4, 128), 56 * 2**20),  # Qwen2.5-7B at 1,024 tokens
        ((8192, 32, 32, 128, 1, 8), 16 * 2**30),
        ((8192, 32, 32, 128, 0.5, 8), 8 * 2**30),
        ((8192, 32, 32, 128, 0.5625, 8), 9 * 2**30),  # 4-bit values with their scales: 3.56x, not 4x
        ((3, 5, 7, 11, 2, 13), 60_060),
    ],
)
def test_cache_size(arguments, expected):
    size = primer.compute_kv_cache_size(*arguments)
    assert size == expected
    assert type(size) is int


def test_cache_size_is_that_of_the_cache():
    cache = primer.KVCache(max_seq_len=7, num_heads=3, head_dim=5, dtype=np.float16)
    cache.update(np.ones((2, 3, 7, 5), np.float16), np.ones((2, 3, 7, 5), np.float16), 0)
    assert sum(array.nbytes for array in cache.get(7)) == primer.compute_kv_cache_size(7, 1, 3, 5, 2, 2)


def test_operation_counts():
    assert primer.count_attention_operations(100, with_cache=False) == 5050
    assert primer.count_attention_operations(100, with_cache=True) == 100
    assert primer.count_attention_operations(0, with_cache=False) == 0


# Pieces


def test_softmax_by_hand_and_without_overflow():
    np.testing.assert_allclose(
        primer.softmax(np.array([0.0, math.log(2), math.log(5)])), [1 / 8, 1 / 4, 5 / 8], **TIGHT
    )
    np.testing.assert_array_equal(primer.softmax(np.array([1e4, 1e4, -np.inf])), [0.5, 0.5, 0.0])


def test_rms_norm_by_hand():
    x, gain = np.array([3.0, 4.0]), np.array([1.0, 10.0])
    np.testing.assert_allclose(primer.rms_norm(x, gain, eps=0.0), [3 / 12.5**0.5, 40 / 12.5**0.5], **TIGHT)
    np.testing.assert_allclose(primer.rms_norm(x, gain, eps=12.5), [0.6, 8.0], **TIGHT)


def test_rope_by_hand():
    # theta=16 and width 4 turn the two pairs by 1 and by 16^(-1/2) = 1/4 of the position.
    c1, s1, c2, s2 = math.cos(2), math.sin(2), math.cos(0.5), math.sin(0.5)
    x, at_two = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([2])
    half = [c1 - 3 * s1, 2 * c2 - 4 * s2, s1 + 3 * c1, 2 * s2 + 4 * c2]
    np.testing.assert_allclose(primer.rope(x, at_two, 16.0), [half], **TIGHT)
    interleaved = [c1 - 2 * s1, s1 + 2 * c1, 3 * c2 - 4 * s2, 3 * s2 + 4 * c2]
    np.testing.assert_allclose(primer.rope(x, at_two, 16.0, interleaved=True), [interleaved], **TIGHT)
    np.testing.assert_array_equal(primer.rope(x, np.array([0]), 16.0), x)


def test_rope_layouts_differ_by_a_permutation():
    x, positions = normal(3, 5, 8), np.arange(5)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    interleaved = primer.rope(x, positions, 1e4, interleaved=True)
    np.testing.assert_allclose(primer.rope(x[..., order], positions, 1e4), interleaved[..., order], **TIGHT)
    assert np.abs(primer.rope(x, positions, 1e4) - interleaved)[:, 1:].max() > 0.1


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_scores_depend_on_distance_alone(interleaved):
    q, k = normal(1, 6, seed=1), normal(1, 6, seed=2)

    def score(q_position: int, k_position: int) -> float:
        turned_q = primer.rope(q, np.array([q_position]), 100.0, interleaved)
        return float((turned_q @ primer.rope(k, np.array([k_position]), 100.0, interleaved).T)[0, 0])

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-12)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_attention_by_hand():
    # Scores of the second query are 0 and log 3, so it takes 1/4 and 3/4.
    q, k = np.array([[[5.0], [2.0]]]), np.array([[[0.0], [math.log(3)]]])
    v = np.array([[[8.0, 0.0], [4.0, 1.0]]])
    np.testing.assert_allclose(primer.causal_attention(q, k, v, scale=0.5), [[[8.0, 0.0], [5.0, 0.75]]], **TIGHT)


def loop_attention(q, k, v, scale, visible):
    """One head of one query at a time; head i of N reads KV head i // (N / K)."""
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    for head in range(len(q)):
        kv_head = head // (len(q) // len(k))
        for t in range(q.shape[1]):
            weights = {
                s: math.exp(scale * float(q[head, t] @ k[kv_head, s])) for s in range(k.shape[1]) if visible(t, s)
            }
            for s, weight in weights.items():
                out[head, t] += weight / sum(weights.values()) * v[kv_head, s]
    return out


def test_attention_matches_loops_and_is_aligned_to_the_end():
    q, k, v = normal(6, 3, 5, seed=1), normal(2, 7, 5, seed=2), normal(2, 7, 4, seed=3)
    np.testing.assert_allclose(
        primer.causal_attention(q, k, v, 0.3),
        loop_attention(q, k, v, 0.3, lambda t, s: s <= 4 + t),
        **TIGHT,
    )
    mask = np.array([[True, False, True, False, False, False, True]] * 3)
    np.testing.assert_allclose(
        primer.causal_attention(q, k, v, 0.3, mask),
        loop_attention(q, k, v, 0.3, lambda t, s: s in (0, 2, 6)),
        **TIGHT,
    )


# Grouped heads


def test_groups_are_contiguous():
    # One key, so a head returns its group's value: i // 4 gives 1 1 1 1 2 2 2 2, i % 2 gives 1 2 1 2 1 2 1 2.
    V = np.array([[[1.0]], [[2.0]]])
    out = primer.grouped_query_attention(normal(8, 1, 3), normal(2, 1, 3), V, num_kv_groups=2)
    np.testing.assert_array_equal(out.ravel(), [1, 1, 1, 1, 2, 2, 2, 2])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_grouped_equals_mha_on_repeated_heads(groups, causal):
    Q, K, V = normal(2, 6, 5, 4, seed=1), normal(2, groups, 7, 4, seed=2), normal(2, groups, 7, 4, seed=3)
    repeated = (np.repeat(array, 6 // groups, axis=1) for array in (K, V))
    mha = primer.grouped_query_attention(Q, *repeated, 6, causal=causal)
    np.testing.assert_allclose(primer.grouped_query_attention(Q, K, V, groups, causal), mha, **TIGHT)
    expected = loop_attention(Q[1], K[1], V[1], 0.5, lambda t, s: s <= t + 2 or not causal)
    np.testing.assert_allclose(mha[1], expected, **TIGHT)


# The latent


def test_compression_error_is_the_tail_of_the_spectrum():
    K, V = normal(2, 9, 5, seed=1), normal(2, 9, 4, seed=2) * 3
    singular = np.linalg.svd(np.concatenate([K, V], -1).reshape(18, 9), compute_uv=False)
    for rank in (1, 4, 8):
        latent, W_uk, W_uv = primer.compress_kv(K, V, rank)
        assert latent.shape == (2, 9, rank)
        assert (W_uk.shape, W_uv.shape) == ((rank, 5), (rank, 4))
        K_near, V_near = primer.decompress_kv(latent, W_uk, W_uv)
        error = np.sum((K - K_near) ** 2) + np.sum((V - V_near) ** 2)
        assert error == pytest.approx(np.sum(singular[rank:] ** 2), rel=1e-12)


@pytest.mark.parametrize(("tokens", "rank"), [(20, 9), (3, 3), (3, 7)])
def test_compression_is_exact_at_full_rank(tokens, rank):
    K, V = normal(tokens, 5, seed=1), normal(tokens, 4, seed=2)
    latent, W_uk, W_uv = primer.compress_kv(K, V, rank)
    assert latent.shape == (tokens, rank)
    for near, exact in zip(primer.decompress_kv(latent, W_uk, W_uv), (K, V), strict=True):
        np.testing.assert_allclose(near, exact, **TIGHT)


def test_joint_rank_one_by_hand():
    # V is twice K, so one number a token is enough: K / sqrt(5) * 5 = sqrt(5) K.
    K = np.array([[1.0], [-2.0]])
    latent, W_uk, W_uv = primer.compress_kv(K, 2 * K, 1)
    np.testing.assert_allclose(np.abs(latent), np.abs(K) * 5**0.5, **TIGHT)
    np.testing.assert_allclose(W_uv, 2 * W_uk, **TIGHT)


# The cache


def test_exercise_example_runs():
    """Default float32 cache, float64 tokens: a prompt of ten, then five more."""
    cache = primer.KVCache(max_seq_len=64, num_heads=4, head_dim=8)
    lengths = []
    for tokens in (10, 1, 1, 1, 1, 1):
        new = normal(1, 4, tokens, 8)
        output, returned = primer.attention_with_kv_cache(new, new, new, cache=cache, position=cache.length)
        assert returned is cache
        assert output.shape == (1, 4, tokens, 8)
        lengths.append(cache.length)
    assert lengths == [10, 11, 12, 13, 14, 15]
    assert cache.get(15)[0].dtype == np.float32


@pytest.mark.parametrize("pieces", [[11], [1] * 11, [5, 1, 3, 2]])
@pytest.mark.parametrize("kv_heads", [2, 6])
def test_cached_equals_uncached(pieces, kv_heads):
    q, k, v = (
        normal(2, 6, 11, 4, seed=1),
        normal(2, kv_heads, 11, 4, seed=2),
        normal(2, kv_heads, 11, 4, seed=3),
    )
    whole, no_cache = primer.attention_with_kv_cache(q, k, v, None, 0)
    assert no_cache is None
    np.testing.assert_allclose(whole[1], loop_attention(q[1], k[1], v[1], 0.5, lambda t, s: s <= t), **TIGHT)
    cache = primer.KVCache(13, kv_heads, 4, np.float64)
    outputs = []
    for size in pieces:
        new = slice(cache.length, cache.length + size)
        part = (array[:, :, new] for array in (q, k, v))
        outputs.append(primer.attention_with_kv_cache(*part, cache, cache.length)[0])
    np.testing.assert_allclose(np.concatenate(outputs, axis=2), whole, **TIGHT)
    last, _ = primer.attention_with_kv_cache(q[:, :, 10:], k, v, None, 10)
    np.testing.assert_allclose(last, whole[:, :, 10:], **TIGHT)


def test_cache_keeps_rewinds_and_forgets():
    cache = primer.KVCache(5, 1, 1, np.float64)
    k = np.arange(4.0).reshape(1, 1, 4, 1)
    cache.update(k, -k, 0)
    keys, values = cache.get(3)
    np.testing.assert_array_equal(keys.ravel(), [0, 1, 2])
    np.testing.assert_array_equal(values.ravel(), [0, -1, -2])
    cache.update(k[:, :, 3:] + 6, k[:, :, 3:], 1)
    assert cache.length == 2
    np.testing.assert_array_equal(cache.get(2)[0].ravel(), [0, 9])
    cache.reset()
    assert cache.length == 0
    cache.update(np.ones((7, 1, 5, 1)), np.ones((7, 1, 5, 1)), 0)
    assert cache.length == 5


def ones(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("k", "v", "position", "message"),
    [
        (ones(2, 3, 1, 5), ones(2, 3, 1, 5), 3, "position=3 must be from 0 to length=2"),
        (ones(2, 3, 1, 5), ones(2, 3, 1, 5), -1, "position=-1 must be from 0"),
        (ones(2, 3, 3, 5), ones(2, 3, 3, 5), 2, "5 tokens do not fit in max_seq_len=4"),
        (ones(1, 3, 1, 5), ones(1, 3, 1, 5), 2, r"must both be \(2, 3, tokens, 5\)"),
        (ones(2, 1, 1, 5), ones(2, 1, 1, 5), 2, "must both be"),
        (ones(2, 3, 1, 1), ones(2, 3, 1, 1), 2, "must both be"),
        (ones(2, 3, 1, 5), ones(2, 3, 2, 5), 2, "must both be"),
        (ones(3, 1, 5), ones(3, 1, 5), 2, "must both be"),
        (ones(2, 3, 1, 5), ones(2, 3, 1, 5, dtype=np.complex64), 2, "cannot be stored as float32"),
    ],
)
def test_cache_refuses(k, v, position, message):
    cache = primer.KVCache(max_seq_len=4, num_heads=3, head_dim=5)
    cache.update(ones(2, 3, 2, 5), ones(2, 3, 2, 5), 0)
    with pytest.raises(ValueError, match=message):
        cache.update(k, v, position)
    assert cache.length == 2


# Generation


class TinyModel:
    """One attention layer over random embeddings; counts the query rows and query-key products computed."""

    def __init__(self, vocabulary: int = 23, width: int = 8, max_seq_len: int = 32):
        self.embed, self.unembed = normal(vocabulary, width, seed=5), normal(width, vocabulary, seed=6)
        self.q, self.k, self.v = normal(3, width, width, seed=7)
        self.places = normal(max_seq_len, width, seed=8)
        self.calls, self.rows, self.products = [], 0, 0

    def __call__(self, tokens, cache, position):
        length = tokens.shape[-1]
        if cache is None:
            cache = primer.KVCache(len(self.places), 1, self.q.shape[0], np.float64)
        x = self.embed[tokens] + self.places[position : position + length]
        x = x.reshape(-1, 1, length, len(self.q))
        mixed, cache = primer.attention_with_kv_cache(x @ self.q, x @ self.k, x @ self.v, cache, position)
        self.calls.append((position, length))
        self.rows += length
        self.products += sum(range(position + 1, position + length + 1))
        logits = (x + mixed) @ self.unembed
        return logits.reshape(*tokens.shape, -1), cache


@pytest.mark.parametrize("prompt", [[3, 1, 4], [[3, 1, 4, 1], [5, 9, 2, 6]]])
def test_both_ways_generate_the_same_tokens(prompt):
    model = TinyModel()
    cached = primer.generate_with_cache(prompt, model, 17)
    np.testing.assert_array_equal(cached, primer.generate_without_cache(prompt, model, 17))
    assert cached.shape == (*np.shape(prompt)[:-1], np.shape(prompt)[-1] + 17)
    np.testing.assert_array_equal(cached[..., :-17], prompt)
    assert len(set(cached.ravel().tolist())) > 5
    # Every new token is the best one given all before it.
    logits, _ = model(cached[..., :-1], None, 0)
    np.testing.assert_array_equal(logits.argmax(-1)[..., -17:], cached[..., -17:])


def test_cached_model_sees_each_token_once():
    model = TinyModel()
    primer.generate_with_cache(np.array([3, 1, 4]), model, 4)
    assert model.calls == [(0, 3), (3, 1), (4, 1), (5, 1)]


def test_operation_counts_are_those_of_the_models():
    steps = 12
    cached, uncached = TinyModel(), TinyModel()
    primer.generate_with_cache([3], cached, steps)
    primer.generate_without_cache([3], uncached, steps)
    assert cached.rows == primer.count_attention_operations(steps, with_cache=True) == 12
    assert uncached.rows == primer.count_attention_operations(steps, with_cache=False) == 78
    assert cached.products == steps * (steps + 1) // 2
    assert uncached.products == steps * (steps + 1) * (steps + 2) // 6


def test_no_new_tokens_is_the_prompt():
    np.testing.assert_array_equal(primer.generate_with_cache([1, 2], TinyModel(), 0), [1, 2])


# Layers


def grouped_weights(D=12, N=6, K=2, H=4):
    shapes = {"q": (D, N, H), "k": (D, K, H), "v": (D, K, H), "o": (N, H, D)}
    return {name: normal(*shape, seed=i) / 3 for i, (name, shape) in enumerate(shapes.items())}


def test_grouped_layer_matches_loops():
    x, weights = normal(5, 12, seed=9), grouped_weights()
    extra = {"q_bias": (6, 4), "k_bias": (2, 4), "v_bias": (2, 4), "q_norm": (4,), "k_norm": (4,)}
    weights |= {name: normal(*shape, seed=20 + i) for i, (name, shape) in enumerate(extra.items())}

    def heads(name: str) -> np.ndarray:
        made = np.zeros((weights[name].shape[1], 5, 4))
        for n in range(len(made)):
            for t in range(5):
                vector = x[t] @ weights[name][:, n] + weights[f"{name}_bias"][n]
                if name != "v":
                    vector = vector / math.sqrt(float(vector @ vector) / 4 + 1e-6) * weights[f"{name}_norm"]
                    # Complex numbers turn by multiplication: an independent rotation.
                    turned = (vector[:2] + 1j * vector[2:]) * np.exp(1j * t * np.array([1.0, 50.0**-0.5]))
                    vector = np.concatenate([turned.real, turned.imag])
                made[n, t] = vector
        return made

    mixed = loop_attention(heads("q"), heads("k"), heads("v"), 0.5, lambda t, s: s <= t)
    expected = sum(mixed[n] @ weights["o"][n] for n in range(6))
    np.testing.assert_allclose(primer.grouped_attention_layer(x, weights, theta=50.0), expected, **TIGHT)


def test_layers_accept_a_batch():
    x, weights = normal(3, 5, 12), grouped_weights()
    one_by_one = [primer.grouped_attention_layer(row, weights) for row in x]
    np.testing.assert_allclose(primer.grouped_attention_layer(x, weights), one_by_one, **TIGHT)
    weights = mla_weights(low_rank_query=True)
    for layer in (primer.mla_layer, primer.mla_layer_absorbed):
        np.testing.assert_allclose(layer(x, weights), [layer(row, weights) for row in x], **TIGHT)


@pytest.mark.parametrize("position", ["rope", "none"])
def test_low_rank_layer_equals_mha_with_multiplied_weights(position):
    x = normal(7, 12)
    q, up_k, up_v, o = (
        normal(*s, seed=i) / 3 for i, s in enumerate([(12, 3, 4), (5, 3, 4), (5, 3, 4), (3, 4, 12)])
    )
    down = normal(12, 5, seed=9)
    mha = {"q": q, "k": np.tensordot(down, up_k, 1), "v": np.tensordot(down, up_v, 1), "o": o}
    expected = primer.grouped_attention_layer(x, mha, theta=1e4 if position == "rope" else None)
    joint = {"q": q, "down": down, "up_k": up_k, "up_v": up_v, "o": o}
    np.testing.assert_allclose(primer.low_rank_layer(x, joint, position), expected, **TIGHT)
    down_v = normal(12, 2, seed=10)
    split = {"q": q, "down_k": down, "down_v": down_v, "up_k": up_k, "up_v": up_v[:2], "o": o}
    mha["v"] = np.tensordot(down_v, up_v[:2], 1)
    expected = primer.grouped_attention_layer(x, mha, theta=1e4 if position == "rope" else None)
    np.testing.assert_allclose(primer.low_rank_layer(x, split, position), expected, **TIGHT)


def mla_weights(low_rank_query: bool, D=12, N=3, H=5, P=4, E=2, R=6, Q=7):
    shapes = {"kv_down": (D, R + P), "kv_norm": (R,), "kv_up": (R, N, H + E), "o": (N, E, D)}
    if low_rank_query:
        shapes |= {"q_down": (D, Q), "q_norm": (Q,), "q_up": (Q, N, H + P)}
    else:
        shapes["q"] = (D, N, H + P)
    return {name: normal(*shape, seed=i) / 2 for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("low_rank_query", [False, True])
def test_absorbed_equals_expanded(low_rank_query, interleaved):
    x, weights = normal(9, 12), mla_weights(low_rank_query)
    expanded = primer.mla_layer(x, weights, 100.0, interleaved)
    absorbed = primer.mla_layer_absorbed(x, weights, 100.0, interleaved)
    np.testing.assert_allclose(absorbed[1:], expanded[1:], **TIGHT)
    assert np.abs(expanded - primer.mla_layer(x, weights, 100.0, not interleaved))[1:].max() > 1e-3


@pytest.mark.parametrize("low_rank_query", [False, True])
def test_mla_matches_loops(low_rank_query):
    x, weights = normal(4, 12), mla_weights(low_rank_query)

    def norm(vector, gain):
        return vector / math.sqrt(float(vector @ vector) / len(vector) + 1e-6) * gain

    def turn(vector, t):
        turned = (vector[0::2] + 1j * vector[1::2]) * np.exp(1j * t * np.array([1.0, 0.1]))
        return np.stack([turned.real, turned.imag], axis=-1).ravel()

    q, k, v = np.zeros((3, 4, 9)), np.zeros((3, 4, 9)), np.zeros((3, 4, 2))
    for t in range(4):
        down = x[t] @ weights["kv_down"]
        latent = norm(down[:6], weights["kv_norm"])
        for n in range(3):
            up = latent @ weights["kv_up"][:, n]
            if low_rank_query:
                query = norm(x[t] @ weights["q_down"], weights["q_norm"]) @ weights["q_up"][:, n]
            else:
                query = x[t] @ weights["q"][:, n]
            q[n, t] = [*query[:5], *turn(query[5:], t)]
            k[n, t], v[n, t] = [*up[:5], *turn(down[6:], t)], up[5:]
    mixed = loop_attention(q, k, v, 9**-0.5, lambda t, s: s <= t)
    expected = sum(mixed[n] @ weights["o"][n] for n in range(3))
    np.testing.assert_allclose(primer.mla_layer(x, weights, 100.0, interleaved=True), expected, **TIGHT)


def test_mla_without_a_rotated_part_is_a_low_rank_layer():
    x, weights = normal(5, 12), mla_weights(low_rank_query=False, P=0, E=5)
    latent = primer.rms_norm(x @ weights["kv_down"], weights["kv_norm"])
    up_k, up_v = weights["kv_up"][..., :5], weights["kv_up"][..., 5:]
    # The query reads x, the rest a normed latent: both stand side by side in the plain layer's input.
    both = np.concatenate([x, latent], axis=-1)
    plain = {
        "q": np.concatenate([weights["q"], np.zeros((6, 3, 5))]),
        "down": np.concatenate([np.zeros((12, 6)), np.eye(6)]),
        "up_k": up_k,
        "up_v": up_v,
        "o": weights["o"],
    }
    expected = primer.low_rank_layer(both, plain, position="none")
    np.testing.assert_allclose(primer.mla_layer(x, weights), expected, **TIGHT)
    np.testing.assert_allclose(primer.mla_layer_absorbed(x, weights), expected, **TIGHT)


LAYERS = {
    "grouped": lambda x: primer.grouped_attention_layer(x, grouped_weights()),
    "mla": lambda x: primer.mla_layer(x, mla_weights(True)),
    "gqa": primer.GroupedQueryAttention(12, 6, 2),
    "low_rank": primer.LowRankKVAttention(12, 3, 5),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layers_are_causal(layer):
    x = normal(7, 12)
    changed = x.copy()
    changed[4] += 1
    difference = np.abs(layer(x) - layer(changed)).max(axis=-1)
    assert difference[:4].max() == 0
    assert difference[4:].min() > 1e-4


@pytest.mark.parametrize("name", ["gqa", "low_rank"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_classes_keep_shape_and_dtype(name, dtype):
    x = normal(2, 7, 12).astype(dtype)
    out = LAYERS[name](x)
    assert (out.shape, out.dtype) == (x.shape, dtype)
    np.testing.assert_allclose(out[1], LAYERS[name](x[1]), rtol=0, atol=1e-5 if dtype is np.float32 else 1e-12)


def test_classes_draw_from_their_seed():
    draw = [primer.GroupedQueryAttention(12, 6, 2, seed=seed).weights["k"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert np.abs(draw[0] - draw[2]).max() > 0.1
    # Each product sums over 64 inputs, so its weights have a deviation of 1/8.
    for array in primer.GroupedQueryAttention(64, 4, 4).weights.values():
        assert array.std() == pytest.approx(1 / 8, rel=0.05)


def test_exercise_classes():
    gqa = primer.GroupedQueryAttention(d_model=64, num_q_heads=8, num_kv_heads=2)
    assert gqa(normal(10, 64)).shape == (10, 64)
    assert gqa.cache_elements_per_token == 2 * 2 * 8
    low_rank = primer.LowRankKVAttention(d_model=512, num_heads=8, d_latent=128)
    assert low_rank(normal(10, 512)).shape == (10, 512)
    assert low_rank.cache_elements_per_token == 128
    assert {name: array.shape for name, array in low_rank.weights.items()} == {
        "q": (512, 8, 64),
        "down": (512, 128),
        "up_k": (128, 8, 64),
        "up_v": (128, 8, 64),
        "o": (8, 64, 512),
    }


def test_float32_stays_float32():
    x = normal(5, 12).astype(np.float32)
    narrow = {name: array.astype(np.float32) for name, array in mla_weights(True).items()}
    assert primer.mla_layer(x, narrow).dtype == np.float32
    assert primer.mla_layer_absorbed(x, narrow).dtype == np.float32
    assert all(array.dtype == np.float32 for array in primer.compress_kv(x, x, 3))


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: primer.compute_kv_cache_size(0, 1, 1, 1), "seq_len=0 must be positive"),
        (lambda: primer.compute_kv_cache_size(1, 1, 1, 1, batch_size=-2), "batch_size=-2 must be positive"),
        (lambda: primer.compute_kv_cache_size(1, 1, 1, 1, 0.3), "dtype_bytes=0.3 must give whole bytes"),
        (lambda: primer.count_attention_operations(-1, True), "seq_len=-1"),
        (lambda: primer.rope(ones(2, 3), np.arange(2), 1e4), "the last axis, 3, must be even"),
        (
            lambda: primer.grouped_query_attention(ones(6, 2, 3), ones(4, 2, 3), ones(4, 2, 3), 4),
            "query heads=6 must be a multiple of KV heads=4: nearest is 8",
        ),
        (
            lambda: primer.grouped_query_attention(ones(4, 2, 3), ones(2, 2, 3), ones(2, 2, 3), 4),
            "num_kv_groups=4 must be K's heads, 2",
        ),
        (lambda: primer.causal_attention(ones(2, 2, 3), ones(2, 2, 3), ones(2, 1, 3), 1.0), "must match k"),
        (
            lambda: primer.causal_attention(ones(2, 3, 3), ones(2, 2, 3), ones(2, 2, 3), 1.0),
            "3 queries, 2 keys",
        ),
        (
            lambda: primer.causal_attention(ones(1, 1, 3), ones(1, 2, 3), ones(1, 2, 3), 1.0, ones(1, 2) < 0),
            "every query must see at least one",
        ),
        (lambda: primer.compress_kv(ones(9, 3), ones(9, 4), 8), "d_latent=8 must be from 1 to 7"),
        (lambda: primer.compress_kv(ones(9, 3), ones(9, 4), 0), "d_latent=0 must be from 1 to 7"),
        (lambda: primer.KVCache(4, 0, 5), "num_heads=0 must be positive"),
        (lambda: primer.KVCache(4, 3, 5).get(0), "nothing was stored"),
        (lambda: primer.KVCache(4, 3, 5).get(1), "end_position=1 must be from 0 to length=0"),
        (
            lambda: primer.attention_with_kv_cache(*[ones(1, 1, 2, 3)] * 3, None, 5),
            "position=5: queries up to token 7 need 7 keys, not 2",
        ),
        (lambda: primer.attention_with_kv_cache(*[ones(1, 1, 2, 3)] * 3, None, -1), "position=-1"),
        (lambda: primer.generate_with_cache([], TinyModel(), 3), "at least one token"),
        (lambda: primer.generate_with_cache([0.5], TinyModel(), 3), "float64 must be an integer dtype"),
        (lambda: primer.generate_without_cache([1], TinyModel(), -1), "max_new_tokens=-1"),
        (lambda: primer.generate_without_cache([1], lambda *_: (ones(3), None), 1), r"logits \(3,\) must be"),
        (
            lambda: primer.GroupedQueryAttention(64, 6, 2),
            "must be a multiple of num_q_heads=6: nearest is 66",
        ),
        (
            lambda: primer.GroupedQueryAttention(64, 2, 4),
            "num_q_heads=2 must be a multiple of num_kv_heads=4",
        ),
        (lambda: primer.LowRankKVAttention(64, 4, 0), "d_latent=0 must be positive"),
        (lambda: LAYERS["gqa"](ones(5, 11)), r"x \(5, 11\) must be \(\[B,\] T, 12\)"),
        (lambda: LAYERS["gqa"](ones(5, 12, dtype=np.int32)), "int32 must be a floating dtype"),
        (
            lambda: primer.grouped_attention_layer(ones(5, 12), grouped_weights() | {"k_nrom": ones(4)}),
            r"missing \[\], unknown \['k_nrom'\]",
        ),
        (lambda: primer.mla_layer(ones(5, 12), {"q": ones(12, 3, 9)}), "missing .*'kv_down'"),
        (lambda: primer.low_rank_layer(ones(5, 12), {}, "rope"), "missing .*'down_k'"),
        (
            lambda: primer.low_rank_layer(ones(5, 12), LAYERS["low_rank"].weights, "alibi"),
            "position='alibi' must be 'rope' or 'none'",
        ),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
