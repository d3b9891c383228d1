"""One array of a layer's cache, as a recipe has it: its bits, its energies, its codec.

F features of a token, R dimensions of what maps give.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import jax
import numpy as np

from kvjax.codecs import fit
from kvjax.codecs.base import Codec
from kvjax.codecs.chain import chain
from kvjax.codecs.linear import Linear
from kvjax.codecs.rotations import haar, hadamard
from kvjax.codecs.statistics import ArrayStatistics
from kvjax.recipe_steps import FORMATS, Step, codec_of
from kvjax.recipes import Chain, chain_text

EXACT = Step("exact")
_DEVIATIONS = 8.0  # 10 with the default headroom


def token_bits(codec: Codec, heads: int, features: int, element_bits: int) -> Fraction:
    """Bits per token: those of tokens that are encoded together are a whole number."""
    return Fraction(round(codec.bits_per_token(heads, features, element_bits) * codec.group), codec.group)


@dataclass(frozen=True)
class PlannedArray:
    """One array of one layer, and how it is to be stored."""

    layer: int
    name: str
    steps: Chain
    shape: jax.Array | jax.ShapeDtypeStruct
    encodes_first: bool
    """Whether encoded forms of first tokens are read: the cache keeps none exact."""
    stats: ArrayStatistics | None

    @property
    def format(self) -> Step:
        return self.steps[-1] if self.steps[-1].name in FORMATS else EXACT

    @property
    def open(self) -> bool:
        """Whether a budget decides the rank."""
        return self.steps[0].fitted and not self.steps[0].size

    @property
    def joint(self) -> bool:
        return self.steps[0].has("joint")

    @property
    def limit(self) -> int:
        """The largest rank."""
        return self.shape.shape[-1] * (self.heads if self.joint else 1)

    @property
    def heads(self) -> int:
        return math.prod(self.shape.shape[1:-2])

    def bits(self, rank: int | None = None) -> Fraction:
        """Stored bits per token at a rank, where it has one."""
        codec, features = codec_of(self.format), self.shape.shape[-1]
        if self.steps == (self.format,):
            return token_bits(codec, self.heads, features, 8 * self.shape.dtype.itemsize)
        width = self._rank(rank) if self.steps[0].fitted else features
        return token_bits(codec, 1 if self.joint else self.heads, width, 32)

    def energies(self) -> np.ndarray:
        """What each dimension keeps, best first, as parts of all."""
        with self._located():
            values = fit.eigenvalues(self._known, self.steps[0].name, **self._options)
        values = values.sum(0) if values.ndim == 2 else values
        return values / (values.sum() or 1.0)

    def codec(self, rank: int | None) -> Codec:
        """Fitted and calibrated."""
        maps: list[Linear] = []
        with self._located():
            for step in self.steps:
                width = maps[-1].down.shape[-1] if maps else self.shape.shape[-1]
                if step.fitted:
                    seed = {"seed": step.get("seed")} if step.name == "random" else {}
                    maps.append(fit.fit(step.name, self._known, self._rank(rank), **self._options, **seed))
                elif step.name not in FORMATS:
                    maps.append(hadamard(width) if step.name == "hadamard" else haar(width, step.get("seed")))
            amax = self._amax(functools.reduce(Linear.then, maps) if maps else None)
            return chain(*maps, codec_of(self.format, amax))

    @property
    def _known(self) -> ArrayStatistics:
        assert self.stats is not None
        return self.stats

    @property
    def _options(self) -> dict[str, bool]:
        step = self.steps[0]
        sinks = step.has("all") or (self.encodes_first and not step.has("rest"))
        return {"mean": not step.has("nomean"), "sinks": sinks, "joint": self.joint}

    def _rank(self, rank):
        return self.steps[0].rank(self.limit) if rank is None else rank

    def _amax(self, linear: Linear | None) -> float:
        """The largest magnitude that the format is to hold; after a map, where none was measured, an estimate.

        That is 8 standard deviations of the widest dimension, or the largest of the first tokens' mean.
        """
        if not self.format.calibrated:
            return 1.0
        moments = self._known.moments(self.encodes_first)
        if linear is None:
            return moments.amax
        down_FR, about_F = (np.asarray(a, np.float64) for a in (linear.down, linear.mean))
        mean_F, second_FF, first_F = moments.mean, moments.second, self._known.first.mean
        if linear.joint:
            down_FR, about_F = down_FR.reshape(-1, down_FR.shape[-1]), about_F.reshape(-1)
            mean_F, second_FF, first_F = moments.joint_mean, moments.joint_second, first_F.reshape(-1)
        outer = lambda a, b: a[..., :, None] * b[..., None, :]
        spread_FF = second_FF - outer(mean_F, mean_F) + outer(mean_F - about_F, mean_F - about_F)
        variances = np.einsum("...FR,...FE,...ER->...R", down_FR, spread_FF, down_FR)
        largest = _DEVIATIONS * math.sqrt(max(variances.max(), 0.0))
        if not self.encodes_first:
            return largest
        return max(largest, np.abs(np.einsum("...F,...FR->...R", first_F - about_F, down_FR)).max())

    @contextlib.contextmanager
    def _located(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"layer {self.layer}, {self.name}={chain_text(self.steps)}: {error}") from error
