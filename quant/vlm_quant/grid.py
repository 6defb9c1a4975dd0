"""Weights that stand on a grid already: the integers a quantizer has chosen for them, found again. Numpy only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_models.errors import CheckpointError
from vlm_models.grid import Grid
from vlm_quant.affine import Int4, Int8, Int8Groups, blocks, widen
from vlm_quant.blockwise import Floats, quantize_blocks

_NEAR = 0.35  # of a step: more than float16 moves 8-bit integers by, and bfloat16 4-bit ones


def integers(matrix: NDArray[Any], grid: Grid) -> NDArray[np.int16]:
    """Of weights (rows, columns): from 0 to 2^bits − 1 where the grid has zero points, else around 0.

    Raises CheckpointError for weights that do not stand on the grid.
    """
    rows, columns = matrix.shape
    found = np.empty((rows, columns), np.int16)
    group_of = np.arange(columns) // min(grid.group_size, columns)
    low, high = (0, 2**grid.bits - 1) if grid.zeros is not None else (-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1)
    for part in blocks(rows, columns):
        steps = widen(matrix[part])
        steps /= scales(grid)[part][:, group_of]
        whole = np.rint(steps)
        off = float(np.abs(steps - whole).max(initial=0))
        if grid.zeros is not None:
            whole += grid.zeros[part].astype(np.float32)[:, group_of]
        if not off <= _NEAR or whole.min(initial=0) < low or whole.max(initial=0) > high:
            raise CheckpointError(f"weights are {off:.2f} steps beside their grid of {grid.bits} bits: quantize again")
        found[part] = whole
    return found


def values(numbers: NDArray[Any], grid: Grid) -> NDArray[np.float32]:
    """The weights (rows, columns) of integers: the inverse of `integers`."""
    columns = numbers.shape[1]
    group_of = np.arange(columns) // min(grid.group_size, columns)
    around: NDArray[np.float32] = numbers.astype(np.float32)
    if grid.zeros is not None:
        around -= grid.zeros.astype(np.float32)[:, group_of]
    return around * scales(grid)[:, group_of]


def scales(grid: Grid) -> NDArray[np.float32]:
    """(rows, groups); 1 where the grid has 0, which stands for groups of zeros."""
    found = np.array(grid.scales, np.float32)
    found[found == 0] = 1
    return found


def regrouped(grid: Grid, group_size: int, columns: int) -> Grid | None:
    """The same grid with a scale for each `group_size` of `columns`; None where its own groups do not fall on these."""
    own = min(grid.group_size, columns)
    if own != columns and own % min(group_size, columns):
        return None
    first = np.arange(0, columns, group_size) // own
    zeros = None if grid.zeros is None else grid.zeros[:, first]
    return replace(grid, group_size=group_size, scales=grid.scales[:, first], zeros=zeros)


def pack_int8(matrix: NDArray[Any], grid: Grid) -> Int8:
    """Weights on a symmetric 8-bit grid with one scale a row."""
    return Int8(integers(matrix, grid).astype(np.int8), scales(grid)[:, 0])


def pack_int8_groups(matrix: NDArray[Any], grid: Grid) -> Int8Groups:
    """Weights on a symmetric 8-bit grid in groups of columns."""
    digits = _padded(integers(matrix, grid) + 128, grid.group_size, 128)
    return Int8Groups(digits.astype(np.uint8), scales(grid))


def pack_int4(matrix: NDArray[Any], grid: Grid) -> Int4:
    """Weights on a 4-bit grid in groups of columns; a symmetric one gets the zero point 8."""
    zeros = np.full(grid.scales.shape, 8, np.uint8) if grid.zeros is None else np.asarray(grid.zeros, np.uint8)
    shift = 8 if grid.zeros is None else 0
    digits = _padded(integers(matrix, grid) + shift, grid.group_size, zeros[:, -1:])
    even = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
    return Int4(_nibbles(digits), scales(grid), _nibbles(even))


def pack_blocks(matrix: NDArray[Any], grid: Grid, scale_type: Any) -> tuple[NDArray[np.int8], Floats]:
    """Weights on a symmetric grid whose groups divide the columns: integers (rows, columns), scales (rows, groups).

    The integers are the grid's, whatever `scale_type` does to the scales; only rows with a scale so small that it moves
    weights by half a step and more (in float16 below 8e-6 at 8 bits) are rounded to nearest, on scales that it has.
    """
    exact, numbers = scales(grid), integers(matrix, grid).astype(np.int8)
    stored = exact.astype(scale_type)
    far = (np.abs(stored.astype(np.float32) - exact) * 2 ** (grid.bits - 1) > exact / 2).any(axis=1)
    if far.any():
        size = min(grid.group_size, matrix.shape[1])
        numbers[far], stored[far] = quantize_blocks(widen(matrix[far]), size, grid.bits, scale_type)
    return numbers, stored


def _padded(digits: NDArray[Any], group_size: int, zero: int | NDArray[np.uint8]) -> NDArray[Any]:
    """(rows, groups, group_size), the columns beyond the matrix at the number that stands for zero."""
    rows, columns = digits.shape
    full = np.empty((rows, -(-columns // group_size) * group_size), digits.dtype)
    full[:, :columns] = digits
    full[:, columns:] = zero
    return full.reshape(rows, -1, group_size)


def _nibbles(digits: NDArray[Any]) -> NDArray[np.uint8]:
    """Two to a byte, the first one low."""
    packed = digits[..., 1::2].astype(np.uint8)
    packed <<= 4
    packed |= digits[..., ::2].astype(np.uint8)
    return packed
