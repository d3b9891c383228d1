"""Statistics of what a model's cache would hold, gathered in one pass over text, for codecs to be fitted to.

The windows are those of evaluation. Sums leave the device after every layer of every batch, so memory does not
grow with the text. They are float32 within a batch, about the batch's mean, since keys with a large bias have a
second moment that hides their covariance in float32; between batches they are float64.

B batch, T tokens of a window, D width, N query heads, K kv heads, G = N // K, F features of a token,
C = K * F (F without a head axis), M features of a reading.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax import sharding
from kvjax.attention.base import Attention
from kvjax.checks import at_least
from kvjax.codecs.statistics import ArrayStatistics, LayerStatistics, Moments, Statistics
from kvjax.data import Corpus, eval_batches
from kvjax.decoder import Decoder, decodable
from kvjax.train import cast


def calibrate(
    graphdef: nnx.GraphDef[Decoder],
    params: Any,
    corpus: Corpus,
    context: int,
    num_tokens: int,
    batch_size: int,
    *,
    model: str,
    data: str,
    track: Callable[[list], Iterable] = iter,
    seed: int = 0,
) -> Statistics:
    """Statistics of exactly `num_tokens` tokens, in windows of evaluation that are drawn at random by `seed`.

    `model` and `data` say where they come from; `track` may wrap the list of batches to show progress.
    ValueError as in `draw_windows`.
    """
    mesh = sharding.make_mesh(batch_size)
    windows = draw_windows(corpus, context, num_tokens, seed)
    decoder = nnx.merge(*decodable(graphdef, sharding.replicate(params, mesh)))
    blocks = [nnx.split(block) for block in decoder.layers]
    sums: list[LayerStatistics] = [{} for _ in blocks]
    for batch in track(eval_batches(windows, context, batch_size)):
        arrays = sharding.split({name: batch[name] for name in ("tokens_BT", "weights_BT")}, mesh)
        x_BTD = decoder.embedding_VD[...][arrays["tokens_BT"]]
        for layer, (structure, block) in zip(sums, blocks):
            rows = {"x_BTD": x_BTD, "weights_BT": arrays["weights_BT"]}
            x_BTD, found = _layer(structure, mesh, block, rows)
            _accumulate(layer, jax.device_get(found))
    finished = [_finished(layer, block.attention, num_tokens) for layer, block in zip(sums, decoder.layers)]
    return Statistics(tuple(finished), num_tokens, context, model, data)


def num_bytes(statistics: Statistics) -> int:
    """Bytes of all arrays of the statistics: what calibration keeps besides the model and one batch."""
    arrays = [array for layer in statistics.layers for array in layer.values()]
    kept = [value for array in arrays for value in (array.queries, array.output)]
    for moments in (m for array in arrays for m in (array.first, array.rest)):
        kept += [moments.total, moments.outer, moments.cross]
    return sum(value.nbytes for value in kept if value is not None)


def draw_windows(corpus: Corpus, context: int, num_tokens: int, seed: int) -> Corpus:
    """Windows of `eval_batches` in random order, each as a document of its own, that predict `num_tokens` tokens.

    The last one is cut to meet that number. ValueError if the corpus has fewer tokens, if `num_tokens` is below
    `context`, or if no window reaches `context`: statistics must cover all positions of an evaluation.
    """
    at_least("context", context, 1)
    at_least("seed", seed, 0)
    if num_tokens < context:
        raise ValueError(f"num_tokens={num_tokens} must be at least one window, context={context}")
    available = len(corpus.ids) - len(corpus.num_bytes)
    if num_tokens > available:
        raise ValueError(f"num_tokens={num_tokens} must be at most {available}, all that the text has")
    documents = zip(corpus.starts[:-1].tolist(), corpus.starts[1:].tolist())
    firsts = [np.arange(start, stop - 1, context) for start, stop in documents]
    first = np.concatenate(firsts)
    last = np.minimum(first + context, np.repeat(corpus.starts[1:] - 1, [len(part) for part in firsts]))
    # Raw bits of Philox, which every version of NumPy keeps the same.
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(len(first))
    order = np.argsort(bits, kind="stable")
    first, lengths = first[order], (last - first)[order]
    totals = np.cumsum(lengths)
    drawn = int(np.searchsorted(totals, num_tokens)) + 1
    first, lengths = first[:drawn], lengths[:drawn]
    lengths[-1] -= totals[drawn - 1] - num_tokens
    if lengths.max() < context:
        raise ValueError(
            f"context={context} must be at most {lengths.max()}, the longest of {drawn} windows of the text"
        )
    ids = np.concatenate([corpus.ids[start : start + length + 1] for start, length in zip(first, lengths)])
    starts = np.cumsum([0, *(lengths + 1)], dtype=np.int64)
    return Corpus(ids, starts, np.zeros(drawn, np.int64))  # nothing here counts bytes


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(structure, mesh, block, rows):
    """The layer's result, and its sums, one of each device. Layers of equal structure share a program."""

    def run(block, rows):
        module, weights_BT = nnx.merge(structure, block), rows["weights_BT"]
        B, T = weights_BT.shape
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
        arrays, queries = module.attention.observe(module.attention_norm(rows["x_BTD"]), positions_BT)
        sums = {name: _array_sums(x, queries.get(name), weights_BT) for name, x in arrays.items()}
        x_BTD, _ = module(rows["x_BTD"], positions_BT)
        return x_BTD, jax.tree.map(lambda a: a[None], sums)

    return sharding.over_rows(run, mesh, sums=False)(block, rows)


def _array_sums(x, q_BNTF, weights_BT):
    """Of `x` `BKTF` or `BTF`, and of the queries that read it, over tokens of weight 1."""
    B, T = weights_BT.shape
    x, heads = x.astype(jnp.float32), x.shape[1:-2]
    x_BTC = jnp.swapaxes(x, 1, 2).reshape(B, T, -1) if heads else x
    lead = (*heads, x.shape[-1])
    sums: dict[str, Any] = {"first": _moment_sums(x_BTC[:, :1], weights_BT[:, :1], lead)}
    sums["rest"] = _moment_sums(x_BTC[:, 1:], weights_BT[:, 1:], lead)
    if q_BNTF is not None:
        q_BNTF = jnp.where(weights_BT[:, None, :, None] > 0, q_BNTF.astype(jnp.float32), 0.0)
        q_BKGTF = q_BNTF.reshape(B, heads[0] if heads else 1, -1, *q_BNTF.shape[2:])
        product = jnp.einsum("BKGTF,BKGTE->KFE", q_BKGTF, q_BKGTF, precision="highest")
        sums["queries"] = product if heads else product[0]
    return sums


def _moment_sums(x_BTC, weights_BT, lead):
    """Count and mean, the sums of deviations and of their products, and the largest magnitude."""
    real_BT1 = weights_BT[..., None] > 0
    count = weights_BT.sum()
    x_BTC = jnp.where(real_BT1, x_BTC, 0.0)
    mean_C = x_BTC.sum((0, 1)) / jnp.maximum(count, 1.0)
    d_BTC = jnp.where(real_BT1, x_BTC - mean_C[None, None], 0.0)
    return {
        "count": count,
        "mean": mean_C.reshape(lead),
        "total": d_BTC.sum((0, 1)),
        "cross": jnp.einsum("BTC,BTE->CE", d_BTC, d_BTC, precision="highest"),
        "amax": jnp.abs(x_BTC).max(initial=0.0),
    }


def _moments(sums: dict[str, np.ndarray]) -> Moments:
    """The sums about 0, of those about a mean."""
    lead, count = sums["mean"].shape, int(sums["count"])
    mean_C, total_C = (sums[name].reshape(-1).astype(np.float64) for name in ("mean", "total"))
    cross_CC = sums["cross"].astype(np.float64) + np.outer(mean_C, total_C) + np.outer(total_C, mean_C)
    cross_CC += count * np.outer(mean_C, mean_C)
    total, amax = (total_C + count * mean_C).reshape(lead), float(sums["amax"])
    if len(lead) == 1:
        return Moments(count, total, cross_CC, None, amax)
    outer_KFF = np.einsum("KFKE->KFE", cross_CC.reshape(*lead, *lead)).copy()
    return Moments(count, total, outer_KFF, cross_CC, amax)


def _accumulate(layer: LayerStatistics, found: dict[str, Any]) -> None:
    """Adds a batch's sums, whose leading axis is the devices; `queries` is a sum until all are there."""
    for name, sums in found.items():
        for device in range(len(sums["first"]["count"])):
            one = jax.tree.map(lambda a, device=device: a[device], sums)
            first, rest = _moments(one["first"]), _moments(one["rest"])
            queries = one["queries"].astype(np.float64) if "queries" in one else None
            if name in layer:
                before = layer[name]
                first, rest = before.first + first, before.rest + rest
                queries = None if queries is None or before.queries is None else before.queries + queries
            layer[name] = ArrayStatistics(first, rest, queries, None)


def _finished(layer: LayerStatistics, attention: Attention, tokens: int) -> LayerStatistics:
    """With means of queries, and with what reads the values."""

    def finish(name, array):
        queries = None if array.queries is None else array.queries / tokens
        output = _output(attention, array.rest.total.shape[:-1]) if name == attention.values else None
        return dataclasses.replace(array, queries=queries, output=output)

    return {name: finish(name, array) for name, array in layer.items()}


def _output(attention: Attention, heads: tuple[int, ...]) -> np.ndarray:
    """The sum of W W^T over the heads that read a kv head, or all of them."""
    structure, params = nnx.split(attention)
    with jax.default_matmul_precision("highest"):
        weights = nnx.merge(structure, cast(params, jnp.dtype("float32"))).value_weights()
    w_NMD = np.asarray(weights, np.float64)
    N, M, D = w_NMD.shape
    K = heads[0] if heads else 1
    w_KMF = np.swapaxes(w_NMD.reshape(K, N // K, M, D), 1, 2).reshape(K, M, -1)  # F = G * D
    output_KMM = w_KMF @ np.swapaxes(w_KMF, 1, 2)
    return output_KMM if heads else output_KMM[0]
