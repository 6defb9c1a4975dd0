"""Rows of weights as ggml's blocks, made by ggml itself: the bytes that gguf makes, at two to seven times its rate."""

from __future__ import annotations

import ctypes
import functools
import importlib
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from vlm_models.grid import Grid
from vlm_quant.grid import integers, regrouped, scales
from vlm_runtime.llama import library

_FP16_MAX = float(np.finfo(np.float16).max)
# The largest weight that each type can scale: its blocks hold fp16 numbers, of which the weights are such multiples.
_STEPS = {"f16": 1, "q4_0": 8, "q5_0": 16, "q8_0": 127, "q4_1": 1, "q5_1": 1}


def ggml_type(name: str) -> GGMLQuantizationType:
    """The type that "q8_0" names."""
    return GGMLQuantizationType[name.upper()]


def block(name: str) -> tuple[int, int]:
    """Weights in one block, and its bytes."""
    weights, size = GGML_QUANT_SIZES[ggml_type(name)]
    return int(weights), int(size)


def largest(name: str) -> float:
    """The largest magnitude that a type can hold."""
    return _FP16_MAX * _STEPS[name] if name in _STEPS else float(np.finfo(np.float32).max)


def to_blocks(values: NDArray[np.float32], name: str) -> NDArray[np.uint8]:
    """(rows, columns) → (rows, bytes of a row), rounded to nearest; columns are a multiple of the type's block.

    Works outside the interpreter lock. Raises DependencyError where llama-cpp-python is not installed.
    """
    rows, columns = values.shape
    weights, size = block(name)
    assert columns % weights == 0, (name, columns)
    source, out = np.ascontiguousarray(values, np.float32), np.empty((rows, columns // weights * size), np.uint8)
    written = _quantize()(int(ggml_type(name)), source.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    assert written == out.nbytes, (name, written, out.nbytes)
    return out


def grid_of_blocks(grid: Grid, name: str, columns: int) -> Grid | None:
    """A quantizer's grid as blocks of 32 hold it: q4_0 and q8_0 around zero, q4_1 from a least value; None if not."""
    fits = {"q4_0": (4, True), "q4_1": (4, False), "q8_0": (8, True)}.get(name) == (grid.bits, grid.zeros is None)
    return regrouped(grid, block(name)[0], columns) if fits and columns % block(name)[0] == 0 else None


def grid_to_blocks(values: NDArray[np.float32], name: str, grid: Grid) -> NDArray[np.uint8]:
    """As `to_blocks`, with the integers of a grid that `grid_of_blocks` gave; scales become fp16.

    A block is its scale, the least value in q4_1, and its integers; of 4 bits 16 in the low halves, then 16 high ones.
    """
    rows = len(values)
    digits, scale = integers(values, grid).reshape(rows, -1, 32), scales(grid)
    parts = [scale]
    if name == "q8_0":
        packed = digits.astype(np.int8).view(np.uint8)
    else:
        unsigned = (digits + (8 if grid.zeros is None else 0)).astype(np.uint8)
        packed = unsigned[..., :16] | np.left_shift(unsigned[..., 16:], 4)
        if grid.zeros is not None:
            parts.append(-scale * grid.zeros.astype(np.float32))
    halves = np.stack([part.astype("<f2") for part in parts], axis=-1).view(np.uint8)
    made: NDArray[np.uint8] = np.concatenate([halves.reshape(rows, -1, 2 * len(parts)), packed], axis=2)
    return made.reshape(rows, -1)


@functools.cache
def _quantize() -> Any:
    library()  # of the known version, quiet
    function = importlib.import_module("llama_cpp._ggml").libggml.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    number = ctypes.c_int64
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, number, number, number, ctypes.c_void_p]
    return function
