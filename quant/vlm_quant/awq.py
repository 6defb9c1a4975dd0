"""AWQ: channels that inputs use much are made larger before rounding, and their inputs as much smaller. Numpy only.

Lin et al., 2023 (https://arxiv.org/abs/2306.00978): scales are a power of each channel's mean magnitude. The power is
the one whose rounded weights change the layers' outputs on sampled rows least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm_quant.grouped import Float, Form, dequantize_grouped, fit, quantize_grouped

POWERS = tuple(i / 12 for i in range(12))
_ROWS = 128  # of each matrix, on which powers are compared
_LEAST = 1e-4


@dataclass(frozen=True)
class Scaling:
    """What to divide the input channels by, and the squared output error without and with it (over the rows tried)."""

    scales: Float
    power: float
    plain: float
    scaled: float


def search_scales(
    matrices: Sequence[tuple[Float, Form]], rows: Float, magnitude: Float, source: NDArray[np.int64]
) -> Scaling:
    """One scale for each source channel, of layers (out_features, columns) that read the sampled `rows` (n, columns).

    `magnitude` (columns,) is the mean |x| of all rows. `source` (columns,) names the channel before that each column
    comes from: several heads may read one.
    """
    counts = np.bincount(source)
    mean = np.maximum(np.bincount(source, magnitude) / counts, _LEAST * float(magnitude.mean()) or 1.0)
    some = [(matrix[:: -(-len(matrix) // _ROWS)], form) for matrix, form in matrices]
    best, plain = Scaling(np.ones(len(counts), np.float32), 0.0, np.inf, np.inf), np.inf
    for power in POWERS:
        scales = mean**power
        scales = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
        wide = scales[source]
        error = sum(_error(matrix, wide, rows, form) for matrix, form in some)
        plain = error if power == 0 else plain
        if error < best.scaled:
            best = Scaling(scales, power, plain, error)
    return best


def _error(matrix: Float, scales: Float, rows: Float, form: Form) -> float:
    """Squared change of x Wᵀ by rounding W · scales."""
    change = rows @ (round_scaled(matrix, scales, form) - matrix).T
    return float(np.square(change, dtype=np.float64).sum())


def round_scaled(matrix: Float, scales: Float, form: Form) -> Float:
    """The weights that W · scales, rounded to nearest, and x / scales amount to."""
    larger = matrix * scales
    return dequantize_grouped(quantize_grouped(larger, *fit(larger, form), form)) / scales
