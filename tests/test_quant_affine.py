"""Integers with scales: quantize and dequantize are a pair whose error is at most half a step."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from vlm_quant import affine

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
SHAPES = ((3, 64), (1, 32), (700, 576), (5, 50), (2, 7))


def matrix(shape: tuple[int, int], dtype: Any) -> np.ndarray:
    """Rows of very different sizes, one of zeros, one that never changes its sign."""
    values = np.random.default_rng(1).standard_normal(shape) * np.geomspace(1e-4, 10, shape[0])[:, None]
    values[-1] = np.abs(values[-1]) + 1
    values[0] = 0 if shape[0] > 2 else values[0]
    return values.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_widening_is_a_cast(dtype: Any) -> None:
    w = matrix((9, 33), dtype)
    assert np.array_equal(affine.widen(w), w.astype(np.float32))
    assert np.array_equal(affine.widen(w[2:5, 3:9]), w[2:5, 3:9].astype(np.float32))


def test_every_float16_is_widened_to_itself() -> None:
    """Subnormals, zeros of both signs, infinities and all that is no number."""
    w = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    assert np.array_equal(affine.widen(w).view(np.uint32), w.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_within_half_a_step_of_every_weight(shape: tuple[int, int], dtype: Any) -> None:
    w = matrix(shape, dtype)
    quantized = affine.quantize_int8(w)
    error = np.abs(affine.dequantize_int8(quantized) - w.astype(np.float32))
    assert (error <= quantized.scales[:, None] * 0.501).all()
    assert np.abs(quantized.values.astype(int)).max() == 127


@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_groups_are_within_half_a_step_of_every_weight(shape: tuple[int, int], group: int) -> None:
    w = matrix(shape, np.float32)
    quantized = affine.quantize_int8_groups(w, group)
    error = np.abs(affine.dequantize_int8_groups(quantized, shape[1]) - w)
    assert (error <= np.repeat(quantized.scales, group, axis=1)[:, : shape[1]] * 0.501).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_is_within_a_step_of_every_weight_and_keeps_zero_exact(
    shape: tuple[int, int], group: int, dtype: Any
) -> None:
    w = matrix(shape, dtype)
    w[:, 3] = 0
    quantized = affine.quantize_int4(w, group)
    back = affine.dequantize_int4(quantized, shape[1])
    # Half a step of rounding, and up to half a step more at an end of the range where the zero point was rounded.
    step = np.repeat(quantized.scales, group, axis=1)[:, : shape[1]]
    assert (np.abs(back - w.astype(np.float32)) <= step * 1.01).all()
    assert np.abs(back - w.astype(np.float32)).mean() <= step.mean() * 0.5
    assert (back[:, 3] == 0).all()
    groups = -(-shape[1] // group)
    assert quantized.packed.shape == (shape[0], groups, group // 2)
    assert quantized.zero_points.shape == (shape[0], (groups + 1) // 2)


def test_a_matrix_already_of_sixteen_levels_comes_back_exactly() -> None:
    levels = np.random.default_rng(2).integers(0, 16, (8, 64))
    levels[:, ::32], levels[:, 1::32] = 0, 15
    w = ((levels - 6) * 0.25).astype(np.float32)
    assert np.array_equal(affine.dequantize_int4(affine.quantize_int4(w, 32), 64), w)


def test_the_first_of_two_values_is_in_the_low_nibble() -> None:
    w = np.array([[0.0, 15.0, 3.0, 7.0] + [0.0] * 12], np.float32)
    assert affine.quantize_int4(w, 16).packed[0, 0, :2].tolist() == [0xF0, 0x73]
