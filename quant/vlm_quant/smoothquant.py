"""SmoothQuant: inputs with outliers made smaller and weights as much larger, for layers that round both. Numpy only.

Xiao et al., 2022 (https://arxiv.org/abs/2211.10438): s = max|x|^power / max|w|^(1 − power). The power is the one whose
int8 weights (a scale a row) and int8 inputs (a scale a row of x, or one for all) change the outputs of sampled rows
least.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlm_quant.awq import Scaling
from vlm_quant.grouped import Float

POWERS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_ROWS = 256  # of each matrix, on which powers are compared


def search_smoothing(
    matrices: Sequence[Float], rows: Float, largest: Float, source: NDArray[np.int64], *, whole: bool = False
) -> Scaling:
    """One scale for each source channel, of layers (out_features, columns) that read the sampled `rows` (n, columns).

    `largest` (columns,) is the largest |x| of all rows; `source` (columns,): the channel before that each comes from.
    `whole`: all rows are rounded by one scale, that of the largest number there is.
    """
    size = int(source.max()) + 1
    inputs, weights = np.zeros(size, np.float32), np.zeros(size, np.float32)
    np.maximum.at(inputs, source, largest)
    for matrix in matrices:
        np.maximum.at(weights, source, np.abs(matrix).max(axis=0))
    inputs, weights = (np.maximum(t, 1e-5 * (float(t.max()) or 1.0)) for t in (inputs, weights))
    some = [matrix[:: -(-len(matrix) // _ROWS)] for matrix in matrices]
    ones = np.ones(size, np.float32)

    def error_of(scales: Float) -> float:
        reach = float((largest / scales).max()) if whole else None
        given = round_rows(rows / scales, reach)
        return sum(_error(matrix, rows, given, scales) for matrix in some)

    plain = error_of(ones[source])
    best = Scaling(ones, 0.0, plain, plain)
    for power in POWERS:
        scales = inputs**power / weights ** (1 - power)
        scales = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
        error = error_of(scales[source])
        if error < best.scaled:
            best = Scaling(scales, power, plain, error)
    return best


def round_rows(matrix: Float, reach: float | None = None) -> Float:
    """Each row rounded to int8 by its largest magnitude, or all of them by `reach`, as floats again."""
    scale = np.abs(matrix).max(axis=1, keepdims=True) / np.float32(127)
    if reach is not None:
        scale[:] = np.float32(reach / 127)
    scale[scale == 0] = 1
    rounded: Float = np.rint(matrix / scale) * scale
    return rounded


def _error(matrix: Float, rows: Float, given: Float, scales: Float) -> float:
    change = given @ round_rows(matrix * scales).T - rows @ matrix.T
    return float(np.square(change, dtype=np.float64).sum())
