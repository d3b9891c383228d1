"""What a layer reads from a compressed cache, against an oracle that stores nothing; and what never changes.

B batch, T tokens, S slots, N query heads.
"""

import copy
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import cache as caches
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.codecs import Exact, Storage
from kvjax.codecs.chain import chain
from kvjax.codecs.floats import Fp8, Half, Mx, NvFp4
from kvjax.codecs.integers import Int, IntPerChannel
from kvjax.codecs.linear import Linear
from kvjax.codecs.rotations import haar
from kvjax.slots import nbytes

BATCH, TOKENS, SLOTS, WIDTH = 2, 29, 32, 23
ATTENTION = {
    "gqa": Grouped(6, 3, head_dim=10),
    "gqa_read": Grouped(6, 3, head_dim=10, rope_on_read=True),
    "low_rank": LowRank(6, head_dim=4, rank=11),
    "low_rank_none": LowRank(6, head_dim=4, rank=None, rank_k=7, rank_v=13, position="none"),
    "mla": Latent(6, rank=13, rope_dim=4, nope_dim=3, value_dim=5),
}
PADDING = (5, 0)
SPLITS = ((TOKENS,), (1,) * TOKENS, (11, *(1,) * 7, 11))


def projection(features, rank, heads=None, joint=False, seed=0):
    """Not orthogonal, with a mean: queries, values and offset must all be right."""
    rng = np.random.default_rng(seed)
    lead = () if heads is None else (heads,)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[-2]), jnp.float32)
    mean = jnp.asarray(rng.standard_normal((*lead, features)), jnp.float32)
    return Linear(draw(*lead, features, rank), draw(*lead, rank, features), mean, joint)


PER_TOKEN = {
    "int8": Storage(Int(8), chunk=8),
    "int4": Storage(Int(4, 5, symmetric=False), chunk=8),
    "int2": Storage(Int(2), chunk=16),
    "half": Storage(Half("bfloat16"), chunk=32),
    "fp8": Storage(Fp8(np.float32(0.01)), chunk=8),
    "nvfp4": Storage(NvFp4.calibrated(5.0), chunk=16),
    "mxfp4_sinks": Storage(Mx("e2m1"), chunk=16, sinks=3),
    "int4_recent": Storage(Int(4), chunk=8, sinks=2, recent=5),
    "exact_recent": Storage(chunk=8, sinks=1, recent=3),
    "haar": Storage(chain(haar(13, 0), Int(8)), chunk=8),
}
GROUPED = {
    "k_int4_v_exact": Storage({"k": Int(4)}, chunk=8),
    "kivi": Storage({"k": IntPerChannel(4, 4), "v": Int(4, 5, symmetric=False)}, chunk=8),
    "kivi_residual": Storage({"k": IntPerChannel(2, 4, residual=8), "v": Int(2)}, chunk=32, sinks=2, recent=8),
    "projected": Storage({n: chain(projection(10, 7, 3), Int(8)) for n in "kv"}, chunk=8),
    "joint_sinks": Storage({"k": chain(projection(10, 17, 3, True), Exact()), "v": Int(4)}, chunk=8, sinks=2),
    "shared_recent": Storage({"v": chain(projection(10, 7), Int(4))}, chunk=8, recent=4),
}
CASES = [("mla", "haar")] + [("gqa", name) for name in GROUPED] + [("gqa_read", "kivi"), ("gqa_read", "projected")]
CASES += [("gqa", name) for name in PER_TOKEN if name != "haar"]
CASES += [(name, codec) for name in ATTENTION for codec in ("nvfp4", "int4_recent") if name != "gqa"]


def storage_of(name, attention="gqa"):
    storage = (PER_TOKEN | GROUPED)[name]
    return Storage({"latent": storage.arrays}, chunk=8) if name == "haar" else storage


@functools.cache
def inputs():
    x_BTD = np.random.default_rng(1).standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32)
    positions_BT = np.maximum(np.arange(TOKENS)[None] - np.array(PADDING)[:, None], -1).astype(np.int32)
    return x_BTD, positions_BT


def replayed(module, queries, entry):
    """The module, but its projection gives parts of these: equal bits in every program, so equal codes.

    Its input holds nothing but the first token's number.
    """

    def project(self, x_BTD, positions_BT):
        start = x_BTD[0, 0, 0].astype(jnp.int32)
        take = lambda a: jax.lax.dynamic_slice_in_dim(a, start, x_BTD.shape[1], a.ndim - 2)
        return jax.tree.map(take, queries), jax.tree.map(take, entry)

    module = copy.copy(module)
    module.__class__ = type("Replayed", (type(module),), {"project": project})
    return module


def empty(entry, storage, slots=SLOTS):
    shape = lambda a: jax.ShapeDtypeStruct((*a.shape[:-2], slots, a.shape[-1]), a.dtype)
    return caches.empty((jax.tree.map(shape, entry),), storage)


def step_of(module, jit):
    def step(cache, x_BTD, positions_BT):
        claim = cache.claim(positions_BT)
        y_BTD, layer = module(x_BTD, positions_BT, claim.layer(0))
        return y_BTD, claim.written([layer])

    return jit(step)


def feed(step, cache, positions_BT, split):
    outs, start = [], 0
    for n in split:
        number = np.full((BATCH, n, WIDTH), start, np.float32)
        y_BTD, cache = step(cache, number, positions_BT[:, start : start + n])
        outs.append(np.asarray(y_BTD))
        start += n
    return np.concatenate(outs, axis=1), cache


def remembered(storage, entry, positions_BT, jit):
    """What each array decodes to when all its tokens are encoded at once, in whole groups from slot 0."""

    def roundtrip(codec, x):
        room = -(-TOKENS // codec.group) * codec.group
        used = np.zeros((BATCH, room), bool)
        used[:, :TOKENS] = positions_BT >= 0
        padded = np.concatenate([x, np.zeros((*x.shape[:-2], room - TOKENS, x.shape[-1]), x.dtype)], -2)
        tokens = codec.tokens if isinstance(codec, IntPerChannel) else 1
        for b, start in itertools.product(range(BATCH), range(0, room, tokens)):
            now = slice(start, start + tokens)
            real = padded[b][..., now, :][..., used[b, now], :]
            if tokens > 1 and real.size:  # padding takes a value within the extremes of its group
                padded[b][..., start + np.flatnonzero(~used[b, now]), :] = real.max(-2, keepdims=True)
        return np.asarray(jit(lambda x: codec.decode(codec.encode(x), jnp.float32))(padded))[..., :TOKENS, :]

    return {name: roundtrip(storage.arrays[name], np.array(x)) for name, x in entry.items()}


def expected(module, storage, queries, entry, positions_BT, jit):
    """Every query alone: exact sinks, exact newest tokens, and what the codecs make of the others."""
    storage = storage.by_name(sorted(entry))
    coded = remembered(storage, entry, positions_BT, jit)
    exact = {name: np.asarray(x) for name, x in entry.items()}
    boundary_T = (np.arange(TOKENS) + 1 - storage.recent) // storage.group * storage.group
    if not storage.recent and storage.group == 1:
        boundary_T[:] = TOKENS
    expand = jit(lambda memory: module.expand(queries, memory, positions_BT))
    heads = []
    for t in range(TOKENS):
        as_is_BT = (positions_BT < storage.sinks) | (np.arange(TOKENS)[None] >= boundary_T[t])
        choose = lambda a, b, kept=as_is_BT: np.where(kept.reshape(BATCH, *(1,) * (a.ndim - 3), TOKENS, 1), a, b)
        memory = {name: choose(exact[name], coded[name]) for name in entry}
        q_BKGTH, k_BKSH, v_BKSV = (np.asarray(a, np.float64) for a in expand(memory))
        logits = np.einsum("BKGH,BKSH->BKGS", q_BKGTH[:, :, :, t], k_BKSH) * module.scale
        seen_BS = (positions_BT >= 0) & (np.arange(TOKENS)[None] <= t)
        logits = np.where(seen_BS[:, None, None], logits, -1e30)
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        o_BKGV = np.einsum("BKGS,BKSV->BKGV", probs / probs.sum(-1, keepdims=True), v_BKSV)
        heads.append(o_BKGV.reshape(BATCH, -1, o_BKGV.shape[-1]))
    return np.asarray(jit(module.merge)(np.stack(heads, axis=2).astype(np.float32)))


def projected(module, jit):
    return jit(module.project)(*inputs()), inputs()[1]


@pytest.mark.parametrize(("attention", "name"), CASES)
def test_what_is_read_equals_the_oracle_whatever_the_parts(attention, name, build, error, quick_jit):
    """One pass, single tokens and anything between read the same: the fast evaluation is the slow one."""
    module, storage = build(ATTENTION[attention]), storage_of(name)
    (queries, entry), positions_BT = projected(module, quick_jit)
    want_BTD = expected(module, storage, queries, entry, positions_BT, quick_jit)
    step = step_of(replayed(module, queries, entry), quick_jit)
    for split in SPLITS:
        got_BTD, _ = feed(step, empty(entry, storage), positions_BT, split)
        assert error(got_BTD[positions_BT >= 0], want_BTD[positions_BT >= 0]) < 3e-5


@pytest.mark.parametrize("name", ["int4", "nvfp4", "int2", "kivi", "kivi_residual", "projected"])
def test_later_tokens_never_change_what_earlier_ones_decode_to(name, build, quick_jit):
    module, storage = build(ATTENTION["gqa"]), storage_of(name)
    (queries, entry), positions_BT = projected(module, quick_jit)
    step, cache = step_of(replayed(module, queries, entry), quick_jit), empty(entry, storage)
    group = storage.by_name(["k", "v"]).group
    read = quick_jit(lambda cache: _decoded(cache))
    before, seen = {}, 0
    for t in range(TOKENS):
        _, cache = step(cache, np.full((BATCH, 1, WIDTH), t, np.float32), positions_BT[:, t : t + 1])
        now = {n: np.asarray(a) for n, a in read(cache).items()}
        for n, a in before.items():
            np.testing.assert_array_equal(now[n][..., :seen, :], a[..., :seen, :])
        before, seen = now, (t + 1) // group * group
    assert seen >= 24


def _decoded(cache):
    layer = cache.claim(jnp.zeros((BATCH, 0), jnp.int32)).layer(0)
    parts = [
        part for start in range(0, SLOTS, layer.chunk) for part in layer.sources()[0].read(start, layer.chunk)
    ]
    return {n: jnp.concatenate([part.memory[n] for part in parts], -2) for n in parts[0].memory}


@pytest.mark.parametrize("name", [*PER_TOKEN, *GROUPED])
def test_a_cache_takes_the_bytes_that_the_formula_says(name, build):
    """Codes and scales of every slot, exact tokens besides: counted from the arrays, and in closed form."""
    attention = "mla" if name == "haar" else "gqa"
    _, entry = jax.eval_shape(build(ATTENTION[attention]).project, *inputs())
    cache, storage = empty(entry, storage_of(name), 64), storage_of(name).by_name(sorted(entry))
    bits = 0.0
    for n, a in entry.items():
        heads, features = int(np.prod(a.shape[1:-2])), a.shape[-1]
        bits += 64 * storage.arrays[n].bits_per_token(heads, features, 32)
        kept = storage.sinks + storage.recent + (storage.group if storage.group > 1 else 0)
        bits += kept * heads * features * 32
    assert nbytes(cache.memory) == round(BATCH * bits / 8, 6)
    assert cache.bytes_per_token() == round(bits / 8 / 64, 6)
