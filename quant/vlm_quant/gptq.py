"""GPTQ: columns rounded one after the other, each error made good by the columns that are still free. Numpy only.

Frantar et al., 2022 (https://arxiv.org/abs/2210.17323), with columns in the order of how much they count and grids
fixed beforehand, so that groups stay neighbouring columns whatever the order. What earlier errors ask of a column is
read from the Cholesky factor of the Hessian itself, which gives the integers that rows of its inverse's would.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_quant.grouped import Float, Form, Grouped, fit

DAMPING = 0.01  # of the mean diagonal
_PANEL = 256  # columns factorized at once
_FEW = 8  # columns rounded without a matrix product between them


def quantize_gptq(
    matrix: Float, hessian: NDArray[np.floating[Any]], form: Form, *, damping: float = DAMPING
) -> Grouped:
    """Round (rows, columns) so that x Wᵀ changes least; `hessian` (columns, columns) is the sum of xᵀx over the inputs.

    A channel that no input uses is rounded to nearest. Takes memory for one more Hessian in float32.
    """
    matrix = np.ascontiguousarray(matrix, np.float32)
    diagonal = np.diag(hessian).astype(np.float64)
    mean = float(diagonal.mean()) or 1.0
    weigh = np.maximum(diagonal / mean, 1e-6).astype(np.float32)
    scales, zeros = fit(matrix, form, weigh)
    order = np.argsort(-diagonal, kind="stable")[::-1]  # the last one is rounded first
    width = form.width(matrix.shape[1])
    scale, zero = (np.ascontiguousarray(t.T) for t in (scales, zeros))
    wanted = np.ascontiguousarray(matrix.T[order])
    rounded = _rounded(wanted, unit_factor(hessian, order, damping), scale, zero, order // width, form.range)
    integers = np.empty(matrix.shape, np.int8 if form.symmetric else np.uint8)
    integers[:, order] = rounded.T
    return Grouped(integers, scales, None if form.symmetric else zeros.astype(np.uint8), width, form.bits)


def _rounded(
    wanted: Float, factor: Float, scales: Float, zeros: Float, groups: NDArray[np.int64], ends: tuple[int, int]
) -> NDArray[np.int16]:
    """Integers (columns, rows) of the transposed matrix, its last column first; `groups` (columns,) index the scales.

    Errors e of columns j make column i better rounded from wᵢ + Σ Lⱼᵢ eⱼ.
    """
    integers = np.empty(wanted.shape, np.int16)
    moved = np.zeros_like(wanted)  # what a column is to be moved by, and once it is rounded, its error

    def round_column(i: int, start: int) -> None:
        scale, zero = scales[groups[i]], zeros[groups[i]]
        integers[i] = value = np.clip(np.rint((wanted[i] + moved[i]) / scale) + zero, *ends)
        moved[i] = wanted[i] - (value - zero) * scale
        moved[start:i] += factor[i, start:i, None] * moved[i]

    def round_columns(start: int, stop: int) -> None:
        if stop - start <= _FEW:
            for i in reversed(range(start, stop)):
                round_column(i, start)
        else:
            half = (start + stop) // 2
            round_columns(half, stop)
            moved[start:half] += factor[half:stop, start:half].T @ moved[half:stop]
            round_columns(start, half)

    round_columns(0, len(wanted))
    return integers


def unit_factor(hessian: NDArray[np.floating[Any]], order: NDArray[np.int64], damping: float) -> Float:
    """L of H + damping = L D Lᵀ, lower triangular with a diagonal of ones, of H in that order, its mean diagonal 1.

    Panel by panel in place, in float32. A matrix that this finds not to be positive is damped ten times as much.
    """
    n, mean = len(hessian), float(np.diag(hessian).mean()) or 1.0
    lower = np.zeros((n, n), np.float32)
    for i, row in enumerate(order):
        lower[i, : i + 1] = hessian[row][order[: i + 1]]
        lower[i, : i + 1] /= mean
    lower.flat[:: n + 1] += damping
    for start in range(0, n, _PANEL):
        stop = min(start + _PANEL, n)
        lower[start:, start:stop] -= lower[start:, :start] @ lower[start:stop, :start].T
        try:
            corner = np.linalg.cholesky(lower[start:stop, start:stop].astype(np.float64))
        except np.linalg.LinAlgError:
            return unit_factor(hessian, order, 10 * damping)
        lower[start:stop, start:stop] = corner
        lower[stop:, start:stop] = lower[stop:, start:stop] @ np.linalg.inv(corner).T.astype(np.float32)
    lower /= np.diag(lower).copy()
    return lower
