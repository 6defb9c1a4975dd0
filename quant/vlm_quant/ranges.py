"""Ranges of activations from a stream of them: what is rounded to few levels, and what is clipped. Numpy only.

Every method picks a magnitude beyond which numbers are clipped, for scales with zero in the middle; where no number of
one sign comes so far, the range ends with the numbers. "minmax" clips none; "p99.9" and "p99.99" clip what is beyond
that percentage of the magnitudes; "entropy" loses the least information (KL divergence, nearly as TensorRT's
calibrators have it, but what is clipped counts as lost); "mse" has the least mean squared error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Method = Literal["minmax", "p99.9", "p99.99", "entropy", "mse"]
METHODS: tuple[Method, ...] = get_args(Method)

Counts = NDArray[np.int64]

BINS = 4096
_CANDIDATES = 256
_SMALLEST = -100  # magnitudes below 2^-100 share bins whatever the others are
_BLOCK = 1 << 17  # numbers counted at once: their temporaries stay in the cache


class Histogram:
    """Magnitudes of all numbers observed, in BINS bins of one width from 0, and their exact `low` and `high`.

    The width is a power of two that doubles when a number lies beyond the last bin: memory is constant, and the counts
    depend neither on the order of the numbers nor on how they were cut into arrays.
    """

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self.counts: Counts = np.zeros(BINS, np.int64)
        self._exponent = _SMALLEST

    @property
    def width(self) -> float:
        """Of one bin: bin i counts magnitudes from i · width up to (i + 1) · width."""
        return math.ldexp(1 / BINS, self._exponent)

    @property
    def finite(self) -> bool:
        """Whether numbers were observed, none of them NaN or beyond float32; `range` needs it."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def observe(self, array: NDArray[Any]) -> None:
        """Count an array of any shape and float type."""
        numbers = np.asarray(array).reshape(-1)
        for start in range(0, len(numbers), _BLOCK):
            self._count(numbers[start : start + _BLOCK].astype(np.float32))

    def _count(self, block: NDArray[np.float32]) -> None:
        # np.minimum keeps a NaN once it was seen, which min() does not
        self.low = float(np.minimum(self.low, block.min()))
        self.high = float(np.maximum(self.high, block.max()))
        if not self.finite:
            return
        self._widen(max(self.high, -self.low))
        np.abs(block, out=block)
        block *= np.float32(1 / self.width)
        self.counts += np.bincount(block.astype(np.intp), minlength=BINS)

    def _widen(self, largest: float) -> None:
        """Merge bins in pairs until the last one holds `largest`."""
        exponent = math.frexp(largest)[1] if largest else _SMALLEST
        if exponent <= self._exponent:
            return
        together = min(BINS, 1 << (exponent - self._exponent))
        merged = self.counts.reshape(-1, together).sum(1)
        self.counts = np.pad(merged, (0, BINS - len(merged)))
        self._exponent = exponent

    def range(self, method: Method, *, bits: int = 8) -> tuple[float, float]:
        """The (low, high) to round to `bits`, between which 0 lies. Raises ValueError where it is not `finite`."""
        if not self.finite:
            raise ValueError(f"no range of numbers from {self.low} to {self.high}")
        limit = math.inf if method == "minmax" else _KEPT[method](self.counts, bits) * self.width
        return min(0.0, max(self.low, -limit)), max(0.0, min(self.high, limit))


def _percentile(percent: float) -> Callable[[Counts, int], int]:
    """How many bins hold that percentage of the magnitudes."""

    def kept(counts: Counts, bits: int) -> int:
        held = np.cumsum(counts)
        asked = round(float(held[-1]) * percent / 100, 3)  # 99900 of 100000 is not 99900.00000000001
        return int(np.searchsorted(held, asked)) + 1

    return kept


def _entropy(counts: Counts, bits: int) -> int:
    """How many bins to keep for the least KL(all numbers, clipped || the kept ones, rounded)."""
    levels, shown = 1 << (bits - 1), counts.copy()
    shown[0] = min(shown[:2])  # zeros are exact at any scale: they must not speak for a small one
    tried = list(_candidates(counts, levels))
    return min(tried, key=lambda kept: _divergence(shown, kept, levels)) if len(tried) > 1 else tried[0]


def _divergence(counts: Counts, kept: int, levels: int) -> float:
    """KL of the first `kept` bins, the last of them with all beyond, and the same bins at `levels` levels."""
    clipped = counts[:kept].astype(np.float64)
    clipped[-1] += counts[kept:].sum()
    used = counts[:kept] > 0
    starts = -(-np.arange(levels) * kept // levels)  # the first bin of each level
    level_of = np.arange(kept) * levels // kept
    shares = np.add.reduceat(counts[:kept], starts) / np.maximum(np.add.reduceat(used, starts, dtype=np.int64), 1)
    rounded = np.where(used, shares[level_of], 0.0)
    rounded[-1] = max(rounded[-1], 1)  # numbers may be clipped to where none were
    p, q = clipped[clipped > 0], rounded[clipped > 0]
    return float((p * np.log(p / q)).sum() / p.sum())


def _mse(counts: Counts, bits: int) -> int:
    """How many bins to keep for the least mean squared error, each bin's numbers taken to lie in its middle."""
    levels = (1 << (bits - 1)) - 1
    (used,) = counts.nonzero()
    magnitudes, weights = used + 0.5, counts[used]

    def error(kept: int) -> float:
        step = kept / levels
        rounded = np.minimum(np.rint(magnitudes / step), levels) * step
        return float((weights * (magnitudes - rounded) ** 2).sum())

    return min(_candidates(counts, levels), key=error)


def _candidates(counts: NDArray[Any], levels: int) -> Iterator[int]:
    """Numbers of bins to try, largest first: all that are used, down to one a level."""
    used = int(counts.nonzero()[0].max(initial=0)) + 1
    tried = np.geomspace(used, min(levels, used), _CANDIDATES)
    return iter(np.unique(np.rint(tried).astype(int))[::-1].tolist())


_KEPT: Mapping[str, Callable[[Counts, int], int]] = {
    "p99.9": _percentile(99.9),
    "p99.99": _percentile(99.99),
    "entropy": _entropy,
    "mse": _mse,
}
