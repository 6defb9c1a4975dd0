"""How Core ML stores fewer bits: constants decompressed when a program is loaded, activations quantized on the way.

Source of the semantics: coremltools/converters/mil/mil/ops/defs/iOS16/constexpr_ops.py, iOS17/quantization_ops.py,
iOS18/compression.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlm_runtime.mil.ops_elementwise import room, wide
from vlm_runtime.mil.ops_tensor import integers
from vlm_runtime.mil.values import NUMPY, Array
from vlm_runtime.mil.wire import Unsound


def constexpr_blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """(data - offset) · scale; each scale and offset serves a block of data along every axis."""
    blocked, shape = _blocks(data, scale.shape)
    values = blocked.astype(np.float32)
    if offset is not None:
        values -= _per_block(offset)
    values *= _per_block(scale)
    return np.asarray(values.reshape(shape))


def _blocks(data: Array, scales: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
    """(a, b) in (p, q) blocks as (p, a/p, q, b/q)."""
    if data.ndim != len(scales) or any(m < 1 or n % m for n, m in zip(data.shape, scales, strict=True)):
        raise Unsound(f"scales of {scales} for data of {data.shape}")
    parts = [size for n, m in zip(data.shape, scales, strict=True) for size in (m, n // m)]
    return data.reshape(parts), data.shape


def _per_block(scale: Array) -> Array:
    """(p, q) as (p, 1, q, 1)."""
    return wide(scale).astype(np.float32).reshape([size for n in scale.shape for size in (n, 1)])


def constexpr_lut_to_dense(indices: Array, lut: Array, vector_axis: Array | None = None) -> Array:
    """Palettized: lut (…, entries, vector) at each index; a lut serves a block of indices along every axis."""
    *groups, entries, vector = lut.shape
    blocked, shape = _blocks(indices, tuple(groups))
    if blocked.size and int(blocked.max()) >= entries:
        raise Unsound(f"an index of {int(blocked.max())} into a palette of {entries}")
    number = np.arange(int(np.prod(groups)), dtype=np.int64).reshape([size for n in groups for size in (n, 1)])
    room(indices.size, vector)
    chosen = wide(lut).reshape(-1, vector)[(number * entries + blocked).reshape(shape)]
    if vector == 1:
        return np.asarray(chosen.reshape(shape))
    axis = int(vector_axis) % indices.ndim if vector_axis is not None else 0
    longer = [n * vector if i == axis else n for i, n in enumerate(shape)]
    return np.moveaxis(chosen, -1, axis + 1).reshape(longer)


def constexpr_sparse_to_dense(nonzero_data: Array, mask: Array) -> Array:
    """Pruned: the data in order where the mask is 1, else 0."""
    kept = mask.astype(bool)
    if int(kept.sum()) != nonzero_data.size:
        raise Unsound(f"{nonzero_data.size} numbers for a mask of {int(kept.sum())}")
    dense = np.zeros(mask.shape, wide(nonzero_data).dtype)
    dense[kept] = nonzero_data
    return dense


def constexpr_sparse_blockwise_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    """Pruned and quantized: the mask, and the dequantized numbers where it is 1."""
    dense = constexpr_sparse_to_dense(nonzero_data, data_mask)
    return data_mask, constexpr_blockwise_shift_scale(dense, scale, offset)[data_mask.astype(bool)]


def constexpr_lut_to_sparse(
    indices_mask: Array, indices_nonzero_data: Array, lut: Array, vector_axis: Array | None = None
) -> tuple[Array, Array]:
    """Pruned and palettized: the mask, and the palette's numbers where it is 1."""
    if lut.shape[-1] != 1:
        raise Unsound("a sparse palette of vectors")
    dense = constexpr_sparse_to_dense(indices_nonzero_data, indices_mask)
    return indices_mask, constexpr_lut_to_dense(dense, lut)[indices_mask.astype(bool)]


def constexpr_affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> Array:
    """(data - zero point) · scale along `axis` (iOS16)."""
    return (quantized_data.astype(np.float32) - _along(zero_point, quantized_data, axis)) * _along(
        scale, quantized_data, axis
    )


def constexpr_cast(source_val: Array, output_dtype: str) -> Array:
    """A constant stored as float16, used as float32 (iOS16)."""
    if output_dtype != "fp32":
        raise Unsound(f"constexpr_cast to {output_dtype!r}")
    return source_val.astype(np.float32)


def quantize(
    input: Array, scale: Array, output_dtype: str, zero_point: Array | None = None, axis: Array | None = None
) -> Array:
    """round(x / scale) + zero point, within the range of int8 or uint8 (iOS17)."""
    if output_dtype not in ("int8", "uint8"):
        raise Unsound(f"quantize to {output_dtype!r}")
    values = np.round(wide(input) / _along(scale, input, axis))
    if zero_point is not None:
        values = values + _along(zero_point, input, axis)
    limits = np.iinfo(output_dtype)
    return np.clip(values, limits.min, limits.max).astype(NUMPY[output_dtype])


def dequantize(input: Array, scale: Array, zero_point: Array | None = None, axis: Array | None = None) -> Array:
    """(x - zero point) · scale (iOS17)."""
    values = input.astype(np.float32)
    if zero_point is not None:
        values -= _along(zero_point, input, axis)
    return values * _along(scale, input, axis)


def _along(parameter: Array, data: Array, axis: Array | None) -> Array:
    """One number, or one for each place of `axis`, as float32 that fits `data`."""
    values = wide(np.asarray(parameter)).astype(np.float32)
    if values.ndim == 0 or values.size == 1:
        return values.reshape(())
    if axis is None:
        raise Unsound(f"{values.size} scales and no axis")
    where = integers(axis)[0] % data.ndim
    return values.reshape([-1 if i == where else 1 for i in range(data.ndim)])


OPS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        constexpr_affine_dequantize, constexpr_blockwise_shift_scale, constexpr_cast, constexpr_lut_to_dense,
        constexpr_lut_to_sparse, constexpr_sparse_blockwise_shift_scale, constexpr_sparse_to_dense, dequantize,
        quantize,
    )
}  # fmt: skip
