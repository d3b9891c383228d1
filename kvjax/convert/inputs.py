"""What goes into the attention of every layer, for conversions that fit text and not weights alone."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flax import nnx

from kvjax.attention.base import Attention
from kvjax.calibrate import calibrate
from kvjax.data import Corpus
from kvjax.decoder import Decoder, decodable


class _Watched(nnx.Module):
    """An attention layer of which calibration sees the input."""

    values = ""

    def __init__(self, attention: Attention):
        self.attention = attention

    def observe(self, x_BTD, positions_BT):
        return {"input": x_BTD}, {}

    def __call__(self, x_BTD, positions_BT, cache):
        return self.attention(x_BTD, positions_BT, cache)


def input_moments(
    graphdef: nnx.GraphDef[Decoder],
    params: Any,
    corpus: Corpus,
    context: int,
    num_tokens: int,
    batch_size: int,
    *,
    track: Callable[[list], Iterable] = iter,
    seed: int = 0,
) -> tuple[np.ndarray, ...]:
    """E[x^T x] of the normed input x of every attention layer, float64 `[D, D]`, over `num_tokens` tokens.

    One pass over windows drawn by `seed`; sums, tokens and ValueError are those of `kvjax.calibrate`.
    """
    model: Any = nnx.merge(*decodable(graphdef, params))
    for block in model.layers:
        block.attention = _Watched(block.attention)
    statistics = calibrate(
        *nnx.split(model), corpus, context, num_tokens, batch_size, model="", data="", track=track, seed=seed
    )
    return tuple(layer["input"].moments(sinks=True).second for layer in statistics.layers)
