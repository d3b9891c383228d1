"""KV caching on bare NumPy arrays: a few lines for each idea, and the oracle the tests compare against.

Read it in this order:

1. *Why there is a cache.* Keys and values of past tokens never change, so a step needs only the new ones:
   `attention_with_kv_cache`, `generate_with_cache`. `count_attention_operations` says what that saves.
2. *What it costs.* Two vectors for each token, KV head and layer: `compute_kv_cache_size`.
3. *Fewer heads.* Several query heads read one KV head: `grouped_query_attention` (one KV head alone: MQA).
4. *Narrower vectors.* Keys and values share one latent: `compress_kv` finds the best linear one for given
   tokens; `LowRankKVAttention` is a layer that never had anything else.
5. *Both.* `mla_layer` is DeepSeek's latent attention with every head rebuilt; `mla_layer_absorbed` is the
   same function as a single KV head that reads the latent itself.

Arrays go in and come out as NumPy, in the precision they came in. Leading batch axes may stand where `...`
is written. Letters of axes: D width, N query heads, K KV heads, G = N // K, H head dim (in MLA the unrotated
part), E value head dim, P rotary dim, R latent rank, Q query rank, T query tokens, S remembered tokens.

Some figures that exercises on this subject print, against the formula:

>>> MiB, GiB = 2**20, 2**30
>>> compute_kv_cache_size(4096, 32, 32, 128) / GiB  # Llama-2 7B, 4,096 tokens, fp16, "2GB": right
2.0
>>> compute_kv_cache_size(4096, 32, 4, 128) / MiB  # with 4 KV heads, "256MB": right
256.0
>>> compute_kv_cache_size(2048, 32, 32, 128) / MiB  # "1024 MB" needs 2 bytes a number, not the 4 beside it
1024.0
>>> compute_kv_cache_size(8192, 80, 8, 128) / GiB  # "70B, FP16, 8K: 32 GB" is 2.5 GiB a sequence ...
2.5
>>> compute_kv_cache_size(8192, 32, 32, 128, batch_size=8) / GiB  # ... and fits a 7B shape at batch 8
32.0
>>> compute_kv_cache_size(32768, 80, 64, 128) / GiB  # "70B, 32K: 100GB+": less, even with 64 KV heads
80.0
>>> compute_kv_cache_size(4096, 32, 1, 256) / MiB  # "d_latent=256": counts a joint latent twice, 64 is right
128.0
>>> 2 * 512 / LowRankKVAttention(512, 8, 128).cache_elements_per_token  # "4x smaller": 8x for a joint latent
8.0
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

Array = np.ndarray
Weights = dict[str, np.ndarray]

# (tokens [..., t], cache, position of the first) -> (logits [..., t, vocabulary], cache to pass next).
# Given None it starts a cache. Of the logits, only the last token's are read.
AttentionFn = Callable[[Array, Any, int], tuple[Array, Any]]


def _require(rule_holds: bool, message: str) -> None:
    if not rule_holds:
        raise ValueError(message)


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        _require(value > 0, f"{name}={value} must be positive")


def _require_multiple(name: str, value: int, of_name: str, of: int) -> None:
    nearest = max(1, round(value / of)) * of
    _require(value % of == 0, f"{name}={value} must be a multiple of {of_name}={of}: nearest is {nearest}")


def _require_names(weights: Weights, required: str, optional: str = "") -> None:
    missing = set(required.split()) - weights.keys()
    unknown = weights.keys() - set(required.split()) - set(optional.split())
    _require(not missing and not unknown, f"weights: missing {sorted(missing)}, unknown {sorted(unknown)}")


def compute_kv_cache_size(
    seq_len: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    dtype_bytes: float = 2,
    batch_size: int = 1,
) -> int:
    """Bytes of cached keys and values; `dtype_bytes` is bytes a number (4 bits + a scale for 16: 0.5625)."""
    _require_positive(**locals())
    size = 2 * batch_size * num_layers * num_kv_heads * seq_len * head_dim * dtype_bytes
    _require(size == int(size), f"dtype_bytes={dtype_bytes} must give whole bytes, not {size}")
    return int(size)


def count_attention_operations(seq_len: int, with_cache: bool) -> int:
    """Query rows computed to make N tokens one by one; a row is one query against all the keys it may see.

    Uncached, step t computes t rows: N(N+1)/2 in all. Cached, it computes one: N. Only rows (and projections)
    become linear: counted in query-key products, a cache takes N(N+1)(N+2)/6 to N(N+1)/2, cubic to quadratic.
    """
    _require(seq_len >= 0, f"seq_len={seq_len} must be at least 0")
    return seq_len if with_cache else seq_len * (seq_len + 1) // 2


def softmax(logits: Array) -> Array:
    """Softmax over the last axis."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def rms_norm(x: Array, gain: Array, eps: float = 1e-6) -> Array:
    """Scale the last axis to a root mean square of 1, then by `gain`."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * gain


def rope(x: Array, positions: Array, theta: float, interleaved: bool = False) -> Array:
    """Turn pair j of the last axis of x [..., T, H] by positions [T] * theta^(-2j/H) (RoFormer, eq. 34).

    Pairs are (j, j + H/2), or (2j, 2j + 1) if `interleaved`: equal up to a permutation, which the weights
    must follow. Nothing turns at position 0, so a wrong layout shows only from position 1 on.
    """
    width = x.shape[-1]
    _require(width % 2 == 0, f"rope: the last axis, {width}, must be even")
    angles = np.asarray(positions)[..., None] * theta ** (-np.arange(0, width, 2) / width)
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., : width // 2], x[..., width // 2 :])
    turned = a * cos - b * sin, a * sin + b * cos
    return np.stack(turned, axis=-1).reshape(x.shape) if interleaved else np.concatenate(turned, axis=-1)


def causal_attention(q: Array, k: Array, v: Array, scale: float, mask: Array | None = None) -> Array:
    """Attend with q [..., N, T, H] to k [..., K, S, H] and v [..., K, S, E]; returns [..., N, T, E].

    Query head i reads KV head i // G (`repeat_interleave`, but nothing is repeated in memory). The last query
    is the last token: query t sees keys 0 to S - T + t. A mask [T, S], true where a query may look, replaces
    that rule.
    """
    (heads, queries, _), (kv_heads, slots, _) = q.shape[-3:], k.shape[-3:]
    _require_multiple("query heads", heads, "KV heads", kv_heads)
    _require(v.shape[:-1] == k.shape[:-1], f"v {v.shape} must match k {k.shape} up to the last axis")
    ends_aligned = np.arange(slots) <= np.arange(queries)[:, None] + (slots - queries)
    visible = ends_aligned if mask is None else mask
    none_blind = bool(visible.any(axis=-1).all())
    _require(none_blind, f"{queries} queries, {slots} keys: every query must see at least one")
    q_KGTH = q.reshape(*q.shape[:-3], kv_heads, heads // kv_heads, *q.shape[-2:])
    logits_KGTS = q_KGTH @ k[..., None, :, :].swapaxes(-1, -2) * float(scale)
    mixed_KGTE = softmax(np.where(visible, logits_KGTS, -np.inf)) @ v[..., None, :, :]
    return mixed_KGTE.reshape(*mixed_KGTE.shape[:-4], heads, queries, v.shape[-1])


def grouped_query_attention(Q: Array, K: Array, V: Array, num_kv_groups: int, causal: bool = False) -> Array:
    """Attend with Q [..., num_q_heads, T, H] to K and V [..., num_kv_groups, S, H], scaled by H^-0.5.

    `num_kv_groups` is the number of KV heads: 8 query heads in 2 groups are Q1-Q4 on K1 and Q5-Q8 on K2.
    (Some libraries call the size of a group, 4 here, by that name.) No mask unless `causal`, as in the usual
    exercise; then the queries are the last T of the S tokens.
    """
    _require(num_kv_groups == K.shape[-3], f"num_kv_groups={num_kv_groups} must be K's heads, {K.shape[-3]}")
    everything = np.ones((Q.shape[-2], K.shape[-2]), bool)
    return causal_attention(Q, K, V, Q.shape[-1] ** -0.5, None if causal else everything)


def compress_kv(K: Array, V: Array, d_latent: int) -> tuple[Array, Array, Array]:
    """Best joint latent [..., tokens, R] of K and V [..., tokens, features], and W_uk, W_uv [R, features].

    latent = [K|V] @ W_down, and [W_uk|W_uv] = W_down^T holds the top right singular vectors of [K|V]. No
    linear latent does better on these tokens (Eckart-Young): the squared error is the sum of the squared
    singular values left out. Leading axes share one basis: to compress across heads, lay them side by side
    in `features`.
    """
    joint = np.concatenate([K, V], axis=-1)
    rows = joint.reshape(-1, joint.shape[-1])
    allowed = 1 <= d_latent <= rows.shape[1]
    _require(allowed, f"d_latent={d_latent} must be from 1 to {rows.shape[1]}, the width of [K|V]")
    # With fewer tokens than d_latent, the full basis supplies directions that no token uses.
    up = np.linalg.svd(rows, full_matrices=len(rows) < d_latent).Vh[:d_latent]
    return joint @ up.T, up[:, : K.shape[-1]], up[:, K.shape[-1] :]


def decompress_kv(kv_latent: Array, W_uk: Array, W_uv: Array) -> tuple[Array, Array]:
    """K and V [..., tokens, features] from their latent."""
    return kv_latent @ W_uk, kv_latent @ W_uv


class KVCache:
    """Keys and values [batch, num_heads, tokens, head_dim] of one layer, allocated once, at the first update.

    They are stored as `dtype`: wider floats are rounded to it, so an oracle in float64 asks for float64.
    """

    def __init__(self, max_seq_len: int, num_heads: int, head_dim: int, dtype: DTypeLike = np.float32) -> None:
        _require_positive(max_seq_len=max_seq_len, num_heads=num_heads, head_dim=head_dim)
        self.max_seq_len, self.num_heads, self.head_dim = max_seq_len, num_heads, head_dim
        self.dtype = np.dtype(dtype)
        self.reset()

    @property
    def length(self) -> int:
        """Tokens remembered."""
        return self._length

    def reset(self) -> None:
        """Forget all tokens, and the batch size."""
        self._length = 0
        self._kv: Array | None = None

    def update(self, k: Array, v: Array, position: int) -> None:
        """Write k and v [batch, num_heads, tokens, head_dim] at `position`, which is at most `length`.

        A write before `length` rewinds: later tokens came after the ones it replaces, and are forgotten.
        """
        batch = k.shape[0] if self._kv is None else self._kv.shape[1]
        fits = k.ndim == 4 and k.shape == (batch, self.num_heads, k.shape[2], self.head_dim) == v.shape
        rule = f"({batch}, {self.num_heads}, tokens, {self.head_dim})"
        _require(fits, f"k {k.shape} and v {v.shape} must both be {rule}")
        storable = all(np.can_cast(array.dtype, self.dtype, "same_kind") for array in (k, v))
        _require(storable, f"k {k.dtype} and v {v.dtype} cannot be stored as {self.dtype}")
        end = position + k.shape[2]
        contiguous = 0 <= position <= self._length
        _require(contiguous, f"position={position} must be from 0 to length={self._length}")
        _require(end <= self.max_seq_len, f"{end} tokens do not fit in max_seq_len={self.max_seq_len}")
        if self._kv is None:
            self._kv = np.zeros((2, batch, self.num_heads, self.max_seq_len, self.head_dim), self.dtype)
        self._kv[0, :, :, position:end], self._kv[1, :, :, position:end] = k, v
        self._length = end

    def get(self, end_position: int) -> tuple[Array, Array]:
        """K and V of the tokens before `end_position`: views, not copies."""
        allowed = 0 <= end_position <= self._length
        _require(allowed, f"end_position={end_position} must be from 0 to length={self._length}")
        if self._kv is None:
            raise ValueError("cache: nothing was stored, so there is no batch size yet")
        return self._kv[0, :, :, :end_position], self._kv[1, :, :, :end_position]


def attention_with_kv_cache(
    q: Array, k: Array, v: Array, cache: KVCache | None, position: int
) -> tuple[Array, KVCache | None]:
    """Write the new k and v at `position`; attend with q, whose tokens start there, to all remembered.

    q [batch, N, tokens, H], k and v [batch, K, tokens, H]; causal by absolute position, scaled by H^-0.5.
    With `cache=None`, k and v are all the tokens from 0 on.
    """
    last, end = position + q.shape[-2], k.shape[-2] + (0 if cache is None else position)
    _require(position >= 0, f"position={position} must be at least 0")
    _require(last <= end, f"position={position}: queries up to token {last} need {last} keys, not {end}")
    if cache is not None:
        cache.update(k, v, position)
        k, v = cache.get(end)
    visible = np.arange(end) <= np.arange(position, last)[:, None]
    return causal_attention(q, k, v, q.shape[-1] ** -0.5, visible), cache


def _checked_prompt(prompt_tokens: ArrayLike, max_new_tokens: int) -> Array:
    tokens = np.asarray(prompt_tokens)
    _require(tokens.size > 0 and tokens.ndim > 0, "prompt_tokens: at least one token is needed")
    _require(tokens.dtype.kind in "iu", f"prompt_tokens: {tokens.dtype} must be an integer dtype")
    _require(max_new_tokens >= 0, f"max_new_tokens={max_new_tokens} must be at least 0")
    return tokens.astype(np.int64)


def _append_best(tokens: Array, logits: Array) -> Array:
    _require(logits.ndim == tokens.ndim + 1, f"logits {logits.shape} must be (..., tokens, vocabulary)")
    return np.concatenate([tokens, logits[..., -1:, :].argmax(axis=-1)], axis=-1)


def generate_with_cache(prompt_tokens: ArrayLike, attention_fn: AttentionFn, max_new_tokens: int) -> Array:
    """Prompt [..., T] and its greedy continuation, `max_new_tokens` more; the model sees each token once."""
    tokens, cache, seen = _checked_prompt(prompt_tokens, max_new_tokens), None, 0
    for _ in range(max_new_tokens):
        logits, cache = attention_fn(tokens[..., seen:], cache, seen)
        seen = tokens.shape[-1]
        tokens = _append_best(tokens, logits)
    return tokens


def generate_without_cache(prompt_tokens: ArrayLike, attention_fn: AttentionFn, max_new_tokens: int) -> Array:
    """The same tokens as `generate_with_cache`, from a model that sees all of them again at every step."""
    tokens = _checked_prompt(prompt_tokens, max_new_tokens)
    for _ in range(max_new_tokens):
        tokens = _append_best(tokens, attention_fn(tokens, None, 0)[0])
    return tokens


def grouped_attention_layer(
    x: Array, weights: Weights, theta: float | None = 10_000.0, interleaved: bool = False
) -> Array:
    """MHA, GQA or MQA on x [..., T, D]; a token leaves behind 2KH numbers. `theta=None`: no rotation.

    weights: q [D, N, H], k and v [D, K, H], o [N, H, D]; optionally q_bias [N, H], k_bias and v_bias [K, H],
    and the gains q_norm and k_norm [H] of an RMSNorm on each head, after the bias and before the rotation.
    """
    _require_names(weights, "q k v o", "q_bias k_bias v_bias q_norm k_norm")
    heads = {}
    for name in ("q", "k", "v"):
        head = np.einsum("...TD,DNH->...NTH", x, weights[name])
        if f"{name}_bias" in weights:
            head = head + weights[f"{name}_bias"][:, None, :]
        if f"{name}_norm" in weights:
            head = rms_norm(head, weights[f"{name}_norm"])
        if name != "v" and theta is not None:
            head = rope(head, np.arange(x.shape[-2]), theta, interleaved)
        heads[name] = head
    mixed = causal_attention(heads["q"], heads["k"], heads["v"], weights["q"].shape[-1] ** -0.5)
    return np.einsum("...NTH,NHD->...TD", mixed, weights["o"])


def low_rank_layer(
    x: Array, weights: Weights, position: str = "rope", theta: float = 10_000.0, interleaved: bool = False
) -> Array:
    """Attention with keys and values rebuilt from a latent of x [..., T, D]; a token leaves behind R numbers.

    weights: q [D, N, H], down [D, R] (or a latent for each: down_k and down_v), up_k and up_v [R, N, H],
    o [N, H, D]. position="rope" turns the rebuilt keys, so each step must rebuild them all; with "none" up_k
    could move to the query as in `mla_layer_absorbed`.
    """
    down_k, down_v = ("down", "down") if "down" in weights else ("down_k", "down_v")
    _require_names(weights, f"q {down_k} {down_v} up_k up_v o")
    _require(position in ("rope", "none"), f"position={position!r} must be 'rope' or 'none'")
    q = np.einsum("...TD,DNH->...NTH", x, weights["q"])
    k = np.einsum("...SR,RNH->...NSH", x @ weights[down_k], weights["up_k"])
    v = np.einsum("...SR,RNH->...NSH", x @ weights[down_v], weights["up_v"])
    if position == "rope":
        q, k = (rope(heads, np.arange(x.shape[-2]), theta, interleaved) for heads in (q, k))
    return np.einsum("...NTH,NHD->...TD", causal_attention(q, k, v, q.shape[-1] ** -0.5), weights["o"])


def _mla_project(x: Array, weights: Weights, theta: float, interleaved: bool) -> tuple[Array, ...]:
    """Queries [..., N, T, H] and [..., N, T, P]; what is cached: latent [..., T, R], one key [..., T, P]."""
    query_names = "q" if "q" in weights else "q_down q_norm q_up"
    _require_names(weights, f"{query_names} kv_down kv_norm kv_up o")
    latent, k_rope = np.split(x @ weights["kv_down"], [len(weights["kv_norm"])], axis=-1)
    latent = rms_norm(latent, weights["kv_norm"])
    if "q" in weights:
        q = np.einsum("...TD,DNH->...NTH", x, weights["q"])
    else:
        q_latent = rms_norm(x @ weights["q_down"], weights["q_norm"])
        q = np.einsum("...TQ,QNH->...NTH", q_latent, weights["q_up"])
    q, q_rope = np.split(q, [q.shape[-1] - k_rope.shape[-1]], axis=-1)
    q_rope, k_rope = (rope(part, np.arange(x.shape[-2]), theta, interleaved) for part in (q_rope, k_rope))
    return q, q_rope, latent, k_rope


def mla_layer(x: Array, weights: Weights, theta: float = 10_000.0, interleaved: bool = False) -> Array:
    """Multi-head latent attention (DeepSeek-V2, eqs. 9-19) on x [..., T, D], every head's k and v rebuilt.

    A token leaves behind R + P numbers: the normed latent, and one rotated key for all heads.
    weights: q [D, N, H+P] (or q_down [D, Q], q_norm [Q], q_up [Q, N, H+P]), kv_down [D, R+P], kv_norm [R],
    kv_up [R, N, H+E], o [N, E, D]; in each sum the parts lie in the order written.
    """
    q, q_rope, latent, k_rope = _mla_project(x, weights, theta, interleaved)
    k, v = np.split(np.einsum("...SR,RNH->...NSH", latent, weights["kv_up"]), [q.shape[-1]], axis=-1)
    k_rope = np.broadcast_to(k_rope[..., None, :, :], (*k.shape[:-1], k_rope.shape[-1]))
    q, k = np.concatenate([q, q_rope], axis=-1), np.concatenate([k, k_rope], axis=-1)
    return np.einsum("...NTE,NED->...TD", causal_attention(q, k, v, q.shape[-1] ** -0.5), weights["o"])


def mla_layer_absorbed(x: Array, weights: Weights, theta: float = 10_000.0, interleaved: bool = False) -> Array:
    """`mla_layer` as decoding runs it: q (U c) = (q U) c, so the query moves and nothing is rebuilt.

    One KV head is left, with keys [latent|k_rope] and the latent again as values. The scale stays (H+P)^-0.5.
    """
    q, q_rope, latent, k_rope = _mla_project(x, weights, theta, interleaved)
    up_k, up_v = np.split(weights["kv_up"], [q.shape[-1]], axis=-1)
    scale = (q.shape[-1] + q_rope.shape[-1]) ** -0.5
    q = np.concatenate([np.einsum("...NTH,RNH->...NTR", q, up_k), q_rope], axis=-1)
    k = np.concatenate([latent, k_rope], axis=-1)
    mixed = causal_attention(q, k[..., None, :, :], latent[..., None, :, :], scale)
    return np.einsum("...NTE,NED->...TD", np.einsum("...NTR,RNE->...NTE", mixed, up_v), weights["o"])


class _Layer:
    d_model: int
    weights: Weights

    def _draw(self, seed: int, **shapes: tuple[int, ...]) -> None:
        rng = np.random.default_rng(seed)
        self.weights = {}
        for name, shape in shapes.items():
            fan_in = np.prod(shape[:-1]) if name == "o" else shape[0]
            self.weights[name] = rng.standard_normal(shape) / np.sqrt(fan_in)

    def _weights_for(self, x: Array) -> Weights:
        rule = f"([B,] T, {self.d_model})"
        _require(x.ndim in (2, 3) and x.shape[-1] == self.d_model, f"x {x.shape} must be {rule}")
        _require(x.dtype.kind == "f", f"x: {x.dtype} must be a floating dtype")
        return {name: array.astype(x.dtype) for name, array in self.weights.items()}


class GroupedQueryAttention(_Layer):
    """Causal GQA without rotation on x [T, D] or [B, T, D]; weights of `grouped_attention_layer`."""

    def __init__(self, d_model: int, num_q_heads: int, num_kv_heads: int, *, seed: int = 0) -> None:
        _require_positive(d_model=d_model, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads)
        _require_multiple("d_model", d_model, "num_q_heads", num_q_heads)
        _require_multiple("num_q_heads", num_q_heads, "num_kv_heads", num_kv_heads)
        self.d_model, head_dim = d_model, d_model // num_q_heads
        q, kv = (d_model, num_q_heads, head_dim), (d_model, num_kv_heads, head_dim)
        self._draw(seed, q=q, k=kv, v=kv, o=(num_q_heads, head_dim, d_model))
        self.cache_elements_per_token = 2 * num_kv_heads * head_dim

    def __call__(self, x: Array) -> Array:
        """The layer's output, of x's shape and dtype."""
        return grouped_attention_layer(x, self._weights_for(x), theta=None)


class LowRankKVAttention(_Layer):
    """Causal attention from one latent, no rotation, on x [T, D] or [B, T, D]; weights of `low_rank_layer`.

    `down` takes x to the latent in one step: [x W_k|x W_v] @ W_down, as in `compress_kv`, multiplied out.
    """

    def __init__(self, d_model: int, num_heads: int, d_latent: int, *, seed: int = 0) -> None:
        _require_positive(d_model=d_model, num_heads=num_heads, d_latent=d_latent)
        _require_multiple("d_model", d_model, "num_heads", num_heads)
        self.d_model, head_dim = d_model, d_model // num_heads
        q, up = (d_model, num_heads, head_dim), (d_latent, num_heads, head_dim)
        self._draw(seed, q=q, down=(d_model, d_latent), up_k=up, up_v=up, o=(num_heads, head_dim, d_model))
        self.cache_elements_per_token = d_latent

    def __call__(self, x: Array) -> Array:
        """The layer's output, of x's shape and dtype."""
        return low_rank_layer(x, self._weights_for(x), position="none")
