"""What calibration keeps of a model's entries: sums over tokens, from which every fit is solved.

K kv heads, F features of a token; arrays without a head axis lack K. Everything is float64 NumPy.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Sums over an array's tokens."""

    count: int
    """Tokens."""
    total: np.ndarray
    """`[K, F]` or `[F]`: the sum of x."""
    outer: np.ndarray
    """`[K, F, F]` or `[F, F]`: the sum of x^T x."""
    cross: np.ndarray | None
    """`[K F, K F]`: the sum of x^T x of all heads side by side; None without a head axis."""
    amax: float
    """The largest magnitude."""

    def __add__(self, other: "Moments") -> "Moments":
        """Those of both sets of tokens."""
        assert (self.cross is None) == (other.cross is None)
        cross = None if self.cross is None or other.cross is None else self.cross + other.cross
        total, outer = self.total + other.total, self.outer + other.outer
        return Moments(self.count + other.count, total, outer, cross, max(self.amax, other.amax))

    @property
    def mean(self) -> np.ndarray:
        """`[K, F]` or `[F]`: E[x]."""
        return self.total / self._tokens

    @property
    def second(self) -> np.ndarray:
        """`[K, F, F]` or `[F, F]`: E[x^T x]."""
        return self.outer / self._tokens

    @property
    def covariance(self) -> np.ndarray:
        """`[K, F, F]` or `[F, F]`: E[(x - E x)^T (x - E x)]."""
        return self.second - self.mean[..., :, None] * self.mean[..., None, :]

    @property
    def joint_mean(self) -> np.ndarray:
        """`[K F]`: E[x] of all heads side by side."""
        return self.mean.reshape(-1)

    @property
    def joint_second(self) -> np.ndarray:
        """`[K F, K F]`: E[x^T x] of all heads side by side; ValueError without a head axis."""
        if self.cross is None:
            raise ValueError("joint=True must be left out for an array without heads: there is nothing to join")
        return self.cross / self._tokens

    @property
    def joint_covariance(self) -> np.ndarray:
        """`[K F, K F]`: E[(x - E x)^T (x - E x)] of all heads side by side; ValueError as `joint_second`."""
        return self.joint_second - np.outer(self.joint_mean, self.joint_mean)

    @property
    def _tokens(self) -> int:
        if self.count < 1:
            raise ValueError(f"count={self.count} must be at least 1: these statistics are of no tokens")
        return self.count


@dataclass(frozen=True)
class ArrayStatistics:
    """Of one array of a layer's entries."""

    first: Moments
    """Of tokens at position 0 of their window, which are often attention sinks."""
    rest: Moments
    """Of all other tokens."""
    queries: np.ndarray | None
    """`[K, F, F]` or `[F, F]`: E[q^T q], summed over the query heads that read a kv head, of the queries
    whose inner products read this array; None if none do."""
    output: np.ndarray | None
    """`[K, F, F]` or `[F, F]`: W_O W_O^T, summed over those heads, of what reads the weighted sums of this
    array; None if nothing does."""

    def moments(self, sinks: bool) -> Moments:
        """Of all tokens if `sinks`, else of all but the first (for caches that keep them exact)."""
        return self.first + self.rest if sinks else self.rest


LayerStatistics = dict[str, ArrayStatistics]
"""By array name."""


@dataclass(frozen=True)
class Statistics:
    """Of a model's entries, and where they come from."""

    layers: tuple[LayerStatistics, ...]
    tokens: int
    """Tokens of the data."""
    context: int
    """Length of the windows that they were read in."""
    model: str
    data: str
