"""Symmetric integers with one scale a block of columns, as Core ML and TensorRT store them. Numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

_CHUNK = 1 << 17  # weights rounded at once, in the cache
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a block's largest magnitude: where an int4 scale is tried


def quantize_blocks(matrix: Floats, block: int, bits: int, scale_type: Any = None) -> tuple[NDArray[np.int8], Floats]:
    """Integers of a matrix (rows, columns) whose columns `block` divides: w ≈ values · scale.

    values (rows, columns), −127…127 at 8 bits and −8…7 at 4; scales (rows, columns / block) of the matrix's own type
    unless another is given.
    Values are rounded in float32 against the scale as it is stored. int4 takes, of several scales, the one with the
    least squared error; a block of zeros keeps the scale 1.
    """
    rows, columns = matrix.shape
    dtype = matrix.dtype if scale_type is None else np.dtype(scale_type)
    values, scales = np.empty((rows, columns), np.int8), np.empty((rows, columns // block), dtype)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        weights = matrix[part].astype(np.float32).reshape(-1, block)
        digits, scale = (_int8 if bits == 8 else _int4)(weights, dtype)
        values[part] = digits.reshape(-1, columns)
        scales[part] = scale.reshape(-1, columns // block)
    return values, scales


def dequantize_blocks(values: NDArray[np.int8], scales: Floats) -> NDArray[np.float32]:
    """(rows, columns) float32."""
    rows, columns = values.shape
    grouped = values.reshape(rows, scales.shape[1], -1).astype(np.float32) * scales.astype(np.float32)[:, :, None]
    return grouped.reshape(rows, columns)


def _int8(weights: NDArray[np.float32], dtype: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    largest = _largest(weights)
    scale = _stored(largest / np.float32(127), dtype)
    short = scale * np.float32(127.5) < largest  # fp16's subnormal numbers are far apart: round up, or values are cut
    scale[short] = np.nextafter(scale[short].astype(dtype), dtype.type(np.inf))
    return np.clip(np.rint(weights / scale[:, None]), -127, 127), scale


def _int4(weights: NDArray[np.float32], dtype: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    largest = _largest(weights)
    least = np.full(len(weights), np.inf, np.float32)
    digits, scales = np.empty_like(weights), np.empty(len(weights), np.float32)
    for shrink in _SHRINK:
        scale = _stored(largest * np.float32(shrink / 7), dtype)
        rounded = np.clip(np.rint(weights / scale[:, None]), -8, 7)
        error = np.square(rounded * scale[:, None] - weights).sum(axis=1)
        better = error < least
        least[better], scales[better], digits[better] = error[better], scale[better], rounded[better]
    return digits, scales


def _largest(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    largest: NDArray[np.float32] = np.maximum(weights.max(axis=1), -weights.min(axis=1))
    return largest


def _stored(scale: NDArray[np.float32], dtype: Any) -> NDArray[np.float32]:
    """What the file will hold, as float32; 1 where that is zero."""
    kept: NDArray[np.float32] = scale.astype(dtype).astype(np.float32)
    kept[kept == 0] = 1
    return kept
