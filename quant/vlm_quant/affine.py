"""Round-to-nearest integers with scales: each format's quantize and dequantize side by side. Numpy only.

A weight matrix is (rows, columns) = (out_features, in_features), float32, float16 or bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]

# Weights handled at once: small enough that all temporaries stay in a core's cache.
_BLOCK = 96 * 1024


@dataclass(frozen=True)
class Int8:
    """Symmetric, one scale a row: w ≈ values · scales[:, None], values in −127…127."""

    values: NDArray[np.int8]
    scales: Float


@dataclass(frozen=True)
class Int8Groups:
    """One scale a group of columns: w ≈ (value − 128) · scale. The layout of MatMulNBits at 8 bits.

    values (rows, groups, group_size), scales (rows, groups). Columns beyond the matrix in the last group stand for
    exact zeros.
    """

    values: NDArray[np.uint8]
    scales: Float


@dataclass(frozen=True)
class Int4:
    """One scale and one zero point a group of `group_size` columns: w ≈ (value − zero point) · scale.

    Packed as ONNX Runtime's MatMulNBits reads it, the first of two values in the low nibble:
    packed (rows, groups, group_size / 2), scales (rows, groups), zero_points (rows, ceil(groups / 2)).
    Columns beyond the matrix in the last group stand for exact zeros.
    """

    packed: NDArray[np.uint8]
    scales: Float
    zero_points: NDArray[np.uint8]


def widen(matrix: NDArray[Any]) -> Float:
    """A new float32 copy; of bfloat16 and float16 matrices by moving bits, two and three times as fast as a cast."""
    if matrix.dtype.name == "float16" and matrix.ndim == 2:
        return _widen_half(matrix)
    if matrix.dtype.name != "bfloat16":
        return np.array(matrix, np.float32)
    bits = np.empty(matrix.shape, np.uint32)
    bits[...] = matrix.view(np.uint16)
    bits <<= 16
    return bits.view(np.float32)


def _widen_half(matrix: NDArray[np.float16]) -> Float:
    """Exponent and fraction moved to float32's place are the number times 2^-112, for subnormals too."""
    bits = np.empty(matrix.shape, np.int32)
    wide = bits.view(np.float32)
    for part in blocks(*matrix.shape):
        block, floats = bits[part], wide[part]
        block[...] = matrix[part].view(np.int16)  # the sign fills the upper bits
        block <<= 13
        block &= np.int32(~0x70000000)  # of which it keeps the first
        floats *= np.float32(2.0**112)
        if floats.max(initial=0) >= 65536 or floats.min(initial=0) <= -65536:  # were infinite or no numbers
            floats[...] = matrix[part]
    return wide


def quantize_int8(matrix: NDArray[Any]) -> Int8:
    """Round each row to int8 by its largest magnitude; a row of zeros keeps the scale 1."""
    rows, columns = matrix.shape
    values, scales = np.empty((rows, columns), np.int8), np.empty(rows, np.float32)
    for part in blocks(rows, columns):
        block = widen(matrix[part])
        scale = np.maximum(block.max(axis=1, initial=0), -block.min(axis=1, initial=0)) / np.float32(127)
        scale[scale == 0] = 1
        block /= scale[:, None]
        values[part] = np.rint(block, out=block)
        scales[part] = scale
    return Int8(values, scales)


def dequantize_int8(quantized: Int8) -> Float:
    """(rows, columns) float32."""
    return quantized.values.astype(np.float32) * quantized.scales[:, None]


def quantize_int8_groups(matrix: NDArray[Any], group_size: int) -> Int8Groups:
    """Round groups of columns by their largest magnitude; a group of zeros keeps the scale 1."""
    rows, columns = matrix.shape
    groups = -(-columns // group_size)
    values, scales = np.empty((rows, groups, group_size), np.uint8), np.empty((rows, groups), np.float32)
    for part in blocks(rows, columns):
        block = _grouped(matrix[part], group_size)
        scale = np.maximum(block.max(axis=2), -block.min(axis=2)) / np.float32(127)
        scale[scale == 0] = 1
        block /= scale[:, :, None]
        values[part] = np.rint(block, out=block) + np.float32(128)
        scales[part] = scale
    return Int8Groups(values, scales)


def dequantize_int8_groups(quantized: Int8Groups, columns: int) -> Float:
    """(rows, columns) float32."""
    weights = (quantized.values.astype(np.float32) - np.float32(128)) * quantized.scales[:, :, None]
    return weights.reshape(len(weights), -1)[:, :columns]


def quantize_int4(matrix: NDArray[Any], group_size: int) -> Int4:
    """Round groups of columns to 0…15 over their range, which always holds 0; a group of zeros keeps the scale 1."""
    rows, columns = matrix.shape
    groups = -(-columns // group_size)
    packed = np.empty((rows, groups, group_size // 2), np.uint8)
    scales, zeros = np.empty((rows, groups), np.float32), np.zeros((rows, groups + groups % 2), np.uint8)
    for part in blocks(rows, columns):
        # (group_size, groups): reductions and packing run along whole rows of memory.
        values = np.ascontiguousarray(_grouped(matrix[part], group_size).reshape(-1, group_size).T)
        low, high = values.min(axis=0, initial=0), values.max(axis=0, initial=0)
        scale = (high - low) / np.float32(15)
        scale[scale == 0] = 1
        zero = np.rint(-low / scale)
        values /= scale
        values += zero + np.float32(0.5)
        digits = np.clip(values, 0, 15.5, out=values).astype(np.uint8)
        digits[::2] |= digits[1::2] << 4
        packed[part] = digits[::2].T.reshape(-1, groups, group_size // 2)
        scales[part] = scale.reshape(-1, groups)
        zeros[part, :groups] = zero.reshape(-1, groups)
    return Int4(packed, scales, zeros[:, ::2] | zeros[:, 1::2] << 4)


def dequantize_int4(quantized: Int4, columns: int) -> Float:
    """(rows, columns) float32."""
    rows, groups, half = quantized.packed.shape
    values = np.stack([quantized.packed & 15, quantized.packed >> 4], axis=-1).reshape(rows, groups, 2 * half)
    zeros = np.stack([quantized.zero_points & 15, quantized.zero_points >> 4], axis=-1).reshape(rows, -1)[:, :groups]
    weights = (values.astype(np.float32) - zeros[:, :, None]) * quantized.scales[:, :, None]
    return weights.reshape(rows, -1)[:, :columns]


def _grouped(matrix: NDArray[Any], group_size: int) -> Float:
    """(rows, groups, group_size), padded with zeros."""
    wide = widen(matrix)
    if missing := -matrix.shape[1] % group_size:
        wide = np.pad(wide, ((0, 0), (0, missing)))
    return wide.reshape(len(wide), -1, group_size)


def blocks(rows: int, columns: int) -> list[slice]:
    """Row ranges whose float32 copies stay in a core's cache."""
    step = max(1, _BLOCK // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
