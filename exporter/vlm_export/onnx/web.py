"""Weights in groups as onnxruntime-web multiplies them fast in WebAssembly, where MatMulNBits has no kernel of its own.

There it widens the whole matrix for each token. The same integers go into operators that have kernels: 4-bit layers
into batched integer products, whose rows are rounded in groups as MatMulNBits rounds them, and the 8-bit head into
plain products of a matrix that is widened once, when the graph is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from vlm_export.onnx.graph import MICROSOFT, Graph, Region
from vlm_quant.affine import Int4, Int8Groups

_WIDTH = 512  # output channels of one product at most: its weights then lie near each other


def web_notes(part: str, linears: Mapping[str, int], *, web: bool) -> list[str]:
    """One line for the console on what `--web` changed in a part whose linear layers are so many of each precision."""
    changed = sum(count for precision, count in linears.items() if ":g" in precision)
    if not web or not changed:
        return []
    layers = "layer is" if changed == 1 else "layers are"
    return [
        f"{part}: {changed} linear {layers} written for WebAssembly, where onnxruntime-web has no fast MatMulNBits; "
        "other runtimes run this graph too, but slower"
    ]


class Products:
    """A matrix of 4-bit weights (rows, columns) as integer products, one for each group of columns.

    `x` is cut into `groups` of `group` columns; chunks of `width` output channels are the outer axis of everything.
    """

    def __init__(self, graph: Graph, name: str, rows: int, columns: int, group: int) -> None:
        self.graph, self.name, self.rows, self.columns, self.group = graph, name, rows, columns, group
        self.width = 2 * -(-rows // (2 * -(-rows // _WIDTH)))  # even, since two weights lie in a byte
        self.chunks, self.groups = -(-rows // self.width), -(-columns // group)
        beside = (self.chunks, self.groups, 1, self.width)
        half = (self.chunks, self.groups, group, self.width // 2)
        self._packed = graph.reserve(f"{name}.weight", half, np.uint8, int4=True)
        self._scales = graph.reserve(f"{name}.scale", beside, np.float32)
        self._zeros = graph.reserve(f"{name}.zero", beside, np.int8)

    def write(self, start: int, quantized: Int4) -> None:
        """Rows start… of the matrix, at most `width` of them from a multiple of it on."""
        chunk, (rows, groups, half) = start // self.width, quantized.packed.shape
        digits = np.stack([quantized.packed & 15, quantized.packed >> 4], -1).reshape(rows, groups, 2 * half)
        zeros = np.stack([quantized.zero_points & 15, quantized.zero_points >> 4], -1).reshape(rows, -1)[:, :groups]
        turned = self._turned(digits)
        signed = (turned[..., ::2] | turned[..., 1::2] << 4) ^ 0x88  # from 0…15 to −8…7, as nibbles
        self._packed.write(chunk, signed[None])
        self._scales.write(chunk, self._turned(quantized.scales[..., None])[None])
        self._zeros.write(chunk, (self._turned(zeros[..., None]).astype(np.int16) - 8).astype(np.int8)[None])

    def emit(self, rounded: str, step: str, output: str) -> str:
        """y (1, S, rows) of rows rounded by `round_groups`."""
        graph, name = self.graph, self.name
        weight = graph.node("Cast", [f"{name}.weight"], f"{name}.int8", to=TensorProto.INT8)
        one = graph.tensor("one", np.array(1, np.float32))
        inputs = [rounded, weight, one, f"{name}.scale", "middle", f"{name}.zero"]
        product = graph.node("MatMulIntegerToFloat", inputs, f"{output}.products", MICROSOFT)  # (chunks, groups, S, …)
        scaled = graph.node("Mul", [product, step], f"{output}.scaled")
        groups = graph.tensor("axis.groups", np.array([1], np.int64))
        padded = self.chunks * self.width > self.rows
        last = f"{output}.padded" if padded else output
        y = graph.node("ReduceSum", [scaled, groups], f"{output}.chunks", keepdims=0)
        if self.chunks > 1:
            y = graph.node("Transpose", [y], f"{output}.turned", perm=[1, 0, 2])
        width = self.chunks * self.width
        shape = graph.tensor(f"shape.{width}", np.array([1, -1, width], np.int64))
        y = graph.node("Reshape", [y, shape], last)
        return _first(graph, y, self.rows, output) if padded else y

    def _turned(self, values: NDArray[Any]) -> NDArray[Any]:
        """(rows, groups, …) → (groups, …, width), rows that are missing as zeros."""
        return np.pad(values.transpose(1, 2, 0), ((0, 0), (0, 0), (0, self.width - len(values))))


def round_groups(graph: Graph, x: str, columns: int, group: int) -> tuple[str, str]:
    """x (1, S, columns) as uint8 (1, groups, S, group) with 128 for zero; the step of each group (1, groups, S, 1)."""
    groups, name = -(-columns // group), f"{x}.g{group}"
    if missing := groups * group - columns:
        pads = graph.tensor(f"pads.{missing}", np.array([0, 0, 0, 0, 0, missing], np.int64))
        x = graph.node("Pad", [x, pads], f"{name}.padded")
    shape = graph.tensor(f"shape.{groups}.{group}", np.array([1, -1, groups, group], np.int64))
    cut = graph.node("Reshape", [x, shape], f"{name}.cut")
    cut = graph.node("Transpose", [cut], f"{name}.groups", perm=[0, 2, 1, 3])
    axis = graph.tensor("channels", np.array([-1], np.int64))
    unit, middle = graph.tensor("unit", np.array(1 / 127, np.float32)), graph.tensor("middle", np.array(128, np.uint8))
    endless = graph.tensor("endless", np.array(np.finfo(np.float32).max))
    largest = graph.node("ReduceMax", [graph.node("Abs", [cut], f"{name}.abs"), axis], f"{name}.largest", keepdims=1)
    step = graph.node("Mul", [largest, unit], f"{name}.step")
    zero = graph.node("QuantizeLinear", [step, endless, middle], f"{name}.zero")  # 128 in the steps' shape
    inputs = [cut, step, zero]
    return graph.node("QuantizeLinear", inputs, f"{name}.uint8", axis=-1, block_size=group), step


class Widened:
    """A matrix of 8-bit weights (rows, columns) in groups of columns, each a product of floats; their sum is y."""

    def __init__(self, graph: Graph, name: str, rows: int, columns: int, group: int) -> None:
        self.graph, self.name = graph, name
        self._sizes = [min(group, columns - start) for start in range(0, columns, group)]
        self._parts: list[tuple[Region, Region]] = [
            (
                graph.reserve(f"{name}.{n}.weight", (size, rows), np.int8),
                graph.reserve(f"{name}.{n}.scale", (rows,), np.float32),
            )
            for n, size in enumerate(self._sizes)
        ]

    def write(self, start: int, quantized: Int8Groups) -> None:
        """Rows start… of the matrix."""
        for n, (size, (weight, scale)) in enumerate(zip(self._sizes, self._parts, strict=True)):
            values = quantized.values[:, n, :size].astype(np.int16) - 128
            weight.write_columns(start, values.T.astype(np.int8))
            scale.write(start, np.ascontiguousarray(quantized.scales[:, n]))

    def emit(self, x: str, output: str) -> str:
        """y (…, rows)."""
        graph, count = self.graph, len(self._sizes)
        pieces = [f"{output}.{n}.x" for n in range(count)]
        sizes = graph.tensor(f"{self.name}.sizes", np.array(self._sizes, np.int64))
        graph.node("Split", [x, sizes], pieces, axis=-1)
        products = []
        for n, piece in enumerate(pieces):
            name = f"{self.name}.{n}"
            wide = graph.node("Cast", [f"{name}.weight"], f"{name}.wide", to=TensorProto.FLOAT)
            matrix = graph.node("Mul", [wide, f"{name}.scale"], f"{name}.float")
            products.append(graph.node("MatMul", [piece, matrix], f"{output}.{n}.product"))
        return graph.node("Sum", products, output)


def _first(graph: Graph, x: str, count: int, output: str) -> str:
    """The first `count` channels."""
    bounds = [
        graph.tensor(f"first.{key}", np.array([value], np.int64)) for key, value in (("start", 0), (f"{count}", count))
    ]
    return graph.node("Slice", [x, *bounds, graph.tensor("channels", np.array([-1], np.int64))], output)
