"""One linear layer, y = x Wᵀ + b, as TensorRT reads it: W stored (in, out), DequantizeLinear before a plain MatMul.

Networks are strongly typed: x, y and the scales have the type in which the part computes, weights their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from vlm_export.onnx.graph import Graph
from vlm_export.onnx.linear import Tally, Weight, check_fp16, stream
from vlm_export.rules import kept
from vlm_models.errors import RecipeError
from vlm_models.grid import Grid
from vlm_quant.affine import widen
from vlm_quant.blockwise import quantize_blocks
from vlm_quant.grid import pack_blocks
from vlm_quant.grouped import GROUPS, symmetric_group
from vlm_quant.recipe import Precision
from vlm_quant.tensorrt_types import TENSORRT_TYPES

Compute = Literal["fp32", "fp16", "bf16"]
Ranges = Mapping[str, tuple[float, float]]
"""Linear layer ("layers.0.mlp.down_proj") → least and largest number that it is given."""

NUMPY: Mapping[Compute, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
ONNX: Mapping[Compute, int] = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FP8_MAX = 448.0


def compute_type(precision: Precision) -> Compute:
    """The type in which a part computes: its own where its weights are floats, else fp16."""
    if precision.format == "bf16":
        return "bf16"
    return "fp32" if precision.weights == "fp32" else "fp16"


class Linears:
    """Emits the linear layers of one graph, which computes in `compute`; those that read the same x share its rounding.

    `ranges` are those of the layers whose inputs are rounded too (w8a8, fp8).
    """

    def __init__(self, graph: Graph, precision: Precision, ranges: Ranges | None = None) -> None:
        self.graph, self.precision, self.ranges = graph, precision, {} if ranges is None else ranges
        self.compute = compute_type(precision)
        self.dtype, self.onnx = NUMPY[self.compute], ONNX[self.compute]
        self.tally = Tally()
        self.layers: list[str] = []
        self._rounded: dict[tuple[str, str], str] = {}

    @property
    def needs_check_graph(self) -> bool:
        """Whether ONNX Runtime's CPU cannot run what has been written (`check_graph.write_check_graph`)."""
        return self.compute == "bf16" or "fp8" in self.tally.linears

    def emit(self, x: str, weight: Weight, output: str) -> str:
        """y (…, rows) from x (…, columns). Raises RecipeError for weights that fp16 cannot hold, or without a range."""
        self.layers.append(weight.name)
        return self._emit(x, weight, output, self.precision.at(weight.name))

    def emit_head(self, x: str, weight: Weight, output: str) -> str:
        """The layer that gives the logits: int8 weights in every integer part, since its errors count most."""
        precision = self.precision.at(weight.name)
        own = self.precision.rule(weight.name) is not None
        if own or precision.weights not in ("int8", "int4"):
            return self.emit(x, weight, output)
        self.layers.append(weight.name)
        if precision != Precision("int8"):
            self.tally.kept[weight.name] = "int8: its errors count most; a rule for it rounds more"
        return self._emit(x, weight, output, Precision("int8"))

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """A constant in the type in which the part computes; the same name is written once."""
        if self.compute == "fp16":
            check_fp16(name, widen(array))
        return self.graph.tensor(name, array.astype(self.dtype))

    def _emit(self, x: str, weight: Weight, output: str, precision: Precision) -> str:
        kind = precision.format or precision.weights
        group = 0
        if kind == "int4":
            kind, group = self._int4_group(weight, precision.group_size)
        if kind in ("fp16", "bf16") or (kind == "fp32" and self.compute == "fp32"):
            kind = self.compute
        self.tally.linears[f"int4:g{group}" if group else kind] += 1
        if kept(self.precision, precision):
            self.tally.kept[weight.name] = f"{kind}: asked for by a rule"
        if kind == "fp32" and self.compute != "fp32":
            return self._wide(x, weight, output)
        if kind == self.compute:
            return self._product(x, weight, self._plain(weight, self.dtype), output)
        if kind in TENSORRT_TYPES:
            x = self._round(x, weight.name, kind)
        write = {"int4": self._int4, "int8": self._int8, "w8a8": self._int8, "fp8": self._fp8}[kind]
        return self._product(x, weight, write(weight, group), output)

    def _product(self, x: str, weight: Weight, matrix: str, output: str) -> str:
        product = self.graph.node("MatMul", [x, matrix], output if weight.bias is None else f"{output}.product")
        if weight.bias is None:
            return product
        return self.graph.node("Add", [product, self.constant(f"{weight.name}.bias", weight.bias)], output)

    def _plain(self, weight: Weight, dtype: np.dtype[Any]) -> str:
        region = self.graph.reserve(f"{weight.name}.weight", (weight.columns, weight.rows), dtype)

        def write(start: int, rows: NDArray[Any]) -> None:
            values = widen(rows)
            if dtype == np.float16:
                check_fp16(f"{weight.name}.weight", values)
            region.write_columns(start, values.T.astype(dtype))

        stream(weight, write)
        return f"{weight.name}.weight"

    def _wide(self, x: str, weight: Weight, output: str) -> str:
        """A layer that a rule keeps at float32 in a part of fewer bits."""
        wide = self.graph.node("Cast", [x], f"{output}.wide", to=TensorProto.FLOAT)
        matrix = self._plain(weight, NUMPY["fp32"])
        product = self.graph.node("MatMul", [wide, matrix], f"{output}.product")
        if weight.bias is not None:
            bias = self.graph.tensor(f"{weight.name}.bias", weight.bias.astype(np.float32))
            product = self.graph.node("Add", [product, bias], f"{output}.biased")
        return self.graph.node("Cast", [product], output, to=self.onnx)

    def _int8(self, weight: Weight, group: int) -> str:
        """One scale an output channel."""
        name = weight.name
        values = self.graph.reserve(f"{name}.weight", (weight.columns, weight.rows), np.int8)
        scales = self.graph.reserve(f"{name}.scale", (weight.rows,), self.dtype)

        grid = self.tally.regrouped(weight, 8, weight.columns, symmetric=True)

        def write(start: int, rows: NDArray[Any]) -> None:
            integers, scale = self._integers(name, start, rows, weight.columns, 8, grid)
            values.write_columns(start, integers.T)
            scales.write(start, scale[:, 0])

        stream(weight, write)
        return self.graph.node("DequantizeLinear", [f"{name}.weight", f"{name}.scale"], f"{name}.float", axis=1)

    def _int4(self, weight: Weight, group: int) -> str:
        """One scale a group of inputs of an output channel; two neighbouring outputs share a byte."""
        name, groups = weight.name, weight.columns // group
        values = self.graph.reserve(f"{name}.weight", (weight.columns, weight.rows // 2), np.uint8, int4=True)
        scales = self.graph.reserve(f"{name}.scale", (groups, weight.rows), self.dtype)

        grid = self.tally.regrouped(weight, 4, group, symmetric=True)

        def write(start: int, rows: NDArray[Any]) -> None:
            integers, scale = self._integers(name, start, rows, group, 4, grid)
            digits = integers.T.view(np.uint8) & 15
            values.write_columns(start // 2, digits[:, ::2] | digits[:, 1::2] << 4)
            scales.write_columns(start, scale.T)

        stream(weight, write)
        inputs = [f"{name}.weight", f"{name}.scale"]
        return self.graph.node("DequantizeLinear", inputs, f"{name}.float", axis=0, block_size=group)

    def _integers(
        self, name: str, start: int, rows: NDArray[Any], group: int, bits: int, grid: Grid | None
    ) -> tuple[NDArray[np.int8], NDArray[Any]]:
        """Rows from `start` on as integers, and scales in the type in which the part computes."""
        self._fits(name, rows)
        if grid is not None:
            return pack_blocks(rows, grid.rows(start, start + len(rows)), self.dtype)
        return quantize_blocks(rows, group, bits, self.dtype)

    def _int4_group(self, weight: Weight, asked: int) -> tuple[str, int]:
        """The group size nearest below the asked one that divides the inputs; int8 where there is none."""
        fitting = min(symmetric_group(asked, weight.columns), GROUPS[0])
        if fitting not in GROUPS or weight.rows % 2:
            none = f"no group of int4 divides {weight.columns} inputs"
            self.tally.kept[weight.name] = f"int8: {f'{weight.rows} outputs are odd' if fitting in GROUPS else none}"
            return "int8", 0
        if fitting != asked:
            why = f"{asked} does not divide {weight.columns} inputs" if asked <= GROUPS[0] else "128 is the largest"
            self.tally.kept[weight.name] = f"int4:g{fitting}: {why}"
        return "int4", fitting

    def _fp8(self, weight: Weight, group: int) -> str:
        """One scale for the whole matrix, which is read twice."""
        name, largest = weight.name, [0.0]
        values = self.graph.reserve(f"{name}.weight", (weight.columns, weight.rows), FP8)
        stream(weight, lambda start, rows: largest.append(_largest(widen(rows))))
        scale = self._scale(f"{name}.scale", max(largest) / FP8_MAX)

        def write(start: int, rows: NDArray[Any]) -> None:
            self._fits(name, rows)
            values.write_columns(start, _fp8(widen(rows).T / scale))

        stream(weight, write)
        return self.graph.node("DequantizeLinear", [f"{name}.weight", f"{name}.scale"], f"{name}.float")

    def _round(self, x: str, layer: str, kind: str) -> str:
        """x rounded to 8 bits over the layer's range, symmetric as TensorRT wants it."""
        if (x, kind) not in self._rounded:
            if layer not in self.ranges:
                raise RecipeError(
                    f"{kind} needs the range of what {layer} is given: add --calibration, or choose int8 for the part"
                )
            zero = np.zeros((), FP8 if kind == "fp8" else np.int8)
            self._scale(f"{x}.{kind}.scale", max(map(abs, self.ranges[layer])) / (FP8_MAX if kind == "fp8" else 127))
            inputs = [f"{x}.{kind}.scale", self.graph.tensor(f"{kind}.zero", zero)]
            rounded = self.graph.node("QuantizeLinear", [x, *inputs], f"{x}.{kind}")
            self._rounded[x, kind] = self.graph.node("DequantizeLinear", [rounded, *inputs], f"{x}.{kind}.rounded")
        return self._rounded[x, kind]

    def _scale(self, name: str, value: float) -> np.float32:
        """Write a scale; returns what the graph holds, 1 where that would be zero."""
        stored = np.array(value, np.float32).astype(self.dtype)
        stored = stored if stored > 0 else np.ones((), self.dtype)
        self.graph.tensor(name, stored)
        return np.float32(stored)

    def _fits(self, name: str, rows: NDArray[Any]) -> None:
        if self.compute == "fp16":
            check_fp16(f"{name}.weight", widen(rows))


def _fp8(values: NDArray[np.float32]) -> NDArray[Any]:
    return np.clip(values, -FP8_MAX, FP8_MAX).astype(FP8)


def _largest(values: NDArray[np.float32]) -> float:
    return float(max(values.max(initial=0), -values.min(initial=0)))
