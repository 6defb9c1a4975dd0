"""Integers in groups of columns, each group with a scale and maybe a zero point: what roundings are decided on.

Numpy only. A weight matrix is (rows, columns) = (out_features, in_features), float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]

GROUPS = (128, 64, 32, 16)  # that symmetric int4 falls back on: TensorRT keeps no others at four bits
FINEST = 8  # columns: finer groups would take more than int8 does

_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group's range: where a scale is tried
_BLOCK = 1 << 18  # weights handled at once


@dataclass(frozen=True)
class Form:
    """Which grids are allowed: `bits` 4 or 8, a scale for `group_size` columns (0: one a row), zeros or none.

    Symmetric integers are −8…7 and −127…127; others 0…15 and 0…255, over a range that always holds 0. `inputs`: what
    the layer is given is rounded to int8 too, by a scale a row or one for all that it is ever given.
    """

    bits: int
    group_size: int
    symmetric: bool
    inputs: Literal["", "row", "tensor"] = ""

    @property
    def range(self) -> tuple[int, int]:
        """Least and largest integer."""
        if not self.symmetric:
            return 0, 2**self.bits - 1
        return (-8, 7) if self.bits == 4 else (1 - 2 ** (self.bits - 1), 2 ** (self.bits - 1) - 1)

    def width(self, columns: int) -> int:
        """Columns that share a scale in a matrix of so many."""
        return self.group_size or columns


@dataclass(frozen=True)
class Grouped:
    """w ≈ (integers − zeros) · scales: integers (rows, columns), scales and zeros (rows, groups); no zeros: 0.

    The last group is shorter where `group_size` does not divide the columns.
    """

    integers: NDArray[Any]
    scales: Float
    zeros: NDArray[np.uint8] | None
    group_size: int
    bits: int


def symmetric_group(asked: int, columns: int) -> int:
    """Columns that share a scale of symmetric int4: `asked` where it divides `columns`, else the largest that does.

    Of GROUPS below `asked` if one of them divides, so that all targets can keep it, else of any size; 0 where only
    groups finer than FINEST would fit.
    """
    fitting = [group for group in (asked, *GROUPS) if group <= asked and columns % group == 0]
    group = fitting[0] if fitting else max(n for n in range(1, asked + 1) if columns % n == 0)
    return group if group >= FINEST else 0


def quantize_grouped(matrix: Float, scales: Float, zeros: Float, form: Form) -> Grouped:
    """Round each weight to the nearest integer of its group's grid."""
    width = form.width(matrix.shape[1])
    low, high = form.range
    scale, zero = (spread(t, width, matrix.shape[1]) for t in (scales, zeros))
    integers = np.clip(np.rint(matrix / scale) + zero, low, high)
    if form.symmetric:
        return Grouped(integers.astype(np.int8), scales, None, width, form.bits)
    return Grouped(integers.astype(np.uint8), scales, zeros.astype(np.uint8), width, form.bits)


def dequantize_grouped(grouped: Grouped) -> Float:
    """(rows, columns) float32."""
    columns = grouped.integers.shape[1]
    values = grouped.integers.astype(np.float32)
    if grouped.zeros is not None:
        values -= spread(grouped.zeros.astype(np.float32), grouped.group_size, columns)
    return values * spread(grouped.scales, grouped.group_size, columns)


def fit(matrix: Float, form: Form, importance: Float | None = None) -> tuple[Float, Float]:
    """Scales and zeros (rows, groups), float32: each group's whole range, as round-to-nearest takes it.

    With `importance` (columns,) shorter ranges are tried as well, and scales set to the least weighted squared error.
    A group of zeros keeps the scale 1.
    """
    rows, columns = matrix.shape
    width = form.width(columns)
    groups = -(-columns // width)
    scales, zeros = np.empty((rows, groups), np.float32), np.empty((rows, groups), np.float32)
    weigh = None if importance is None else _grouped(importance[None], width)[0]
    step = max(1, _BLOCK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        scales[part], zeros[part] = _fit(_grouped(matrix[part], width), form, weigh)
    return scales, zeros


def spread(values: Float, width: int, columns: int) -> Float:
    """Of each group's value one a column: (rows, groups) → (rows, columns)."""
    return np.repeat(values, width, axis=1)[:, :columns]


def _grouped(matrix: Float, width: int) -> Float:
    """(rows, groups, width), padded with zeros."""
    if missing := -matrix.shape[1] % width:
        matrix = np.pad(matrix, ((0, 0), (0, missing)))
    return matrix.reshape(len(matrix), -1, width)


def _fit(block: Float, form: Form, weigh: Float | None) -> tuple[Float, Float]:
    """Of (rows, groups, width); `weigh` (groups, width)."""
    low, high = form.range
    bottom, top = block.min(axis=2, initial=0), block.max(axis=2, initial=0)
    if form.symmetric:
        top = np.maximum(top, -bottom)
        bottom = -top
    whole = _range_grid(bottom, top, np.float32(1), form)
    if weigh is None:
        return whole
    best_scale, best_zero = whole
    least = np.full(best_scale.shape, np.inf, np.float32)
    for shrink in _SHRINK:
        scale, zero = _range_grid(bottom, top, np.float32(shrink), form)
        steps = np.clip(np.rint(block / scale[..., None]) + zero[..., None], low, high) - zero[..., None]
        square = (steps * steps * weigh).sum(axis=2)
        square[square == 0] = np.inf  # all rounded to zero: the scale cannot be had from them
        found = (block * steps * weigh).sum(axis=2) / square
        scale = np.where(found > 0, found, scale)
        error = (np.square(steps * scale[..., None] - block) * weigh).sum(axis=2)
        better = error < least
        least[better], best_scale[better], best_zero[better] = error[better], scale[better], zero[better]
    return best_scale, best_zero


def _range_grid(bottom: Float, top: Float, shrink: np.float32, form: Form) -> tuple[Float, Float]:
    """Scales and zeros for a part of the range bottom…top."""
    low, high = form.range
    scale = (top - bottom) * shrink / np.float32(2 * high if form.symmetric else high)
    scale[scale == 0] = 1
    if form.symmetric:
        return scale, np.zeros_like(scale)
    return scale, np.clip(np.rint(-bottom * shrink / scale), low, high)
