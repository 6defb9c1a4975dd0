"""GPTQ: columns rounded one after the other, each error made good by the columns that are still free. Numpy only.

Frantar et al., 2022 (https://arxiv.org/abs/2210.17323), with columns in the order of how much they count and grids
fixed beforehand, so that groups stay neighbouring columns whatever the order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_quant.grouped import Float, Form, Grouped, dequantize_grouped, fit, spread

Double = NDArray[np.float64]

DAMPING = 0.01  # of the mean diagonal
_COLUMNS = 128  # rounded before their errors reach the columns after them
_ROWS = 64  # whose scales are solved for at once


def quantize_gptq(matrix: Float, hessian: Double, form: Form, *, damping: float = DAMPING) -> Grouped:
    """Round (rows, columns) so that x Wᵀ changes least; `hessian` (columns, columns) is the sum of xᵀx over the inputs.

    A channel that no input uses is rounded to nearest.
    """
    matrix = np.ascontiguousarray(matrix, np.float32)
    diagonal = np.diag(hessian).astype(np.float64)
    mean = float(diagonal.mean()) or 1.0
    weigh = np.maximum(diagonal / mean, 1e-6).astype(np.float32)
    scales, zeros = fit(matrix, form, weigh)
    order = np.argsort(-diagonal, kind="stable")
    factor = inverse_factor(hessian, order, damping)
    width, columns = form.width(matrix.shape[1]), matrix.shape[1]
    scale, zero = (np.ascontiguousarray(spread(t, width, columns).T[order]) for t in (scales, zeros))
    rounded = _rounded(np.ascontiguousarray(matrix.T[order]), factor, scale, zero, form.range)
    integers = np.empty(matrix.shape, np.int16)
    integers[:, order] = rounded.T
    kept = None if form.symmetric else zeros.astype(np.uint8)
    return Grouped(integers.astype(np.int8 if form.symmetric else np.uint8), scales, kept, width, form.bits)


def _rounded(free: Float, factor: Float, scales: Float, zeros: Float, ends: tuple[int, int]) -> NDArray[np.int16]:
    """Integers (columns, rows) of the transposed matrix `free`, which is used up."""
    integers = np.empty(free.shape, np.int16)
    for start in range(0, len(free), _COLUMNS):
        stop = min(start + _COLUMNS, len(free))
        errors = np.empty((stop - start, free.shape[1]), np.float32)
        for i in range(start, stop):
            value = np.clip(np.rint(free[i] / scales[i]) + zeros[i], *ends)
            integers[i] = value
            errors[i - start] = (free[i] - (value - zeros[i]) * scales[i]) / factor[i, i]
            free[i + 1 : stop] -= factor[i, i + 1 : stop, None] * errors[i - start]
        free[stop:] -= factor[start:stop, stop:].T @ errors
    return integers


def inverse_factor(hessian: Double, order: NDArray[np.int64], damping: float) -> Float:
    """Upper triangular U with (H + damping)⁻¹ = UᵀU, of H in that order, its mean diagonal 1.

    By the Cholesky factor of H turned round, H = R Rᵀ, U = R⁻¹: half the work of inverting first, and nothing kept.
    """
    damped = hessian[np.ix_(order[::-1], order[::-1])]
    damped /= float(np.diag(hessian).mean()) or 1.0
    damped.flat[:: len(damped) + 1] += damping
    lower = np.linalg.cholesky(damped)
    del damped
    return _inverse(np.asarray(lower[::-1, ::-1], np.float64)).astype(np.float32)


def _inverse(upper: Double) -> Double:
    """Of an upper triangular matrix, by halves."""
    n = len(upper)
    if n <= 64:
        return np.triu(np.linalg.inv(upper))
    half, out = n // 2, np.zeros_like(upper)
    out[:half, :half], out[half:, half:] = _inverse(upper[:half, :half]), _inverse(upper[half:, half:])
    out[:half, half:] = -out[:half, :half] @ (upper[:half, half:] @ out[half:, half:])
    return out


def refit(matrix: Float, grouped: Grouped, hessian: NDArray[np.floating[Any]]) -> Grouped:
    """The same integers with the scales that change x Wᵀ least: one small linear system a row.

    A scale that would turn negative, or more than double or halve, stays.
    """
    width, columns = grouped.group_size, matrix.shape[1]
    groups = grouped.scales.shape[1]
    pad = groups * width - columns
    wide = np.pad(np.asarray(hessian, np.float32), ((0, pad), (0, pad)))
    unit = Grouped(grouped.integers, np.ones_like(grouped.scales), grouped.zeros, width, grouped.bits)
    steps = np.pad(dequantize_grouped(unit), ((0, 0), (0, pad))).reshape(-1, groups, width)
    target = np.pad(matrix, ((0, 0), (0, pad))) @ wide
    scales = grouped.scales.copy()
    for start in range(0, len(matrix), _ROWS):
        part = slice(start, start + _ROWS)
        block = steps[part]
        system = np.empty((len(block), groups, groups), np.float64)
        for g in range(groups):
            pulled = (block[:, g] @ wide[g * width : (g + 1) * width]).reshape(len(block), groups, width)
            system[:, g] = np.einsum("rgw,rgw->rg", pulled, block)
        wanted = np.einsum("rgw,rgw->rg", target[part].reshape(len(block), groups, width), block, dtype=np.float64)
        system += np.eye(groups) * (1e-6 * np.trace(system, axis1=1, axis2=2) / groups + 1e-30)[:, None, None]
        solved = np.linalg.solve(system, wanted[..., None])[..., 0]
        old = scales[part]
        scales[part] = np.where((solved > 0.5 * old) & (solved < 2 * old), solved, old)
    return Grouped(grouped.integers, scales, grouped.zeros, width, grouped.bits)
