"""One linear layer, y = x Wᵀ + b, at any precision: weights streamed into the data file, nodes into the graph."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from vlm_export.onnx.graph import MICROSOFT, Graph
from vlm_export.onnx.web import Products, Widened, round_groups
from vlm_export.rules import kept
from vlm_models.errors import RecipeError
from vlm_models.grid import Grid
from vlm_quant.affine import Int4, Int8Groups, quantize_int4, quantize_int8, quantize_int8_groups, widen
from vlm_quant.grid import pack_int4, pack_int8, pack_int8_groups, regrouped
from vlm_quant.recipe import Precision

CHUNK = 2048  # rows read, converted and written by one thread at a time
HEAD_GROUP = 128  # of the 8-bit head: fewer scales to read than 32; the demo's parity is the same with both
SATURATION = "int8 sums are exact with VNNI (x86) or dot-product (Arm) instructions; older x86 cores may saturate them"
_FP16_MAX = float(np.finfo(np.float16).max)
_ENDLESS = np.array(np.finfo(np.float32).max)  # a step that rounds everything to zero


@dataclass(frozen=True)
class Weight:
    """A weight matrix (rows, columns) = (out_features, in_features) that is read in row ranges when it is written.

    `layer` is the name that rules go by, by default `name`; `grid` the values on which it has been put already.
    """

    name: str
    rows: int
    columns: int
    read: Callable[[int, int], NDArray[Any]]
    bias: NDArray[np.float32] | None = None
    layer: str = ""
    grid: Grid | None = None


@dataclass
class Tally:
    """What became of the weights of one part: linear layers by precision, and those kept at another one and why.

    `grids` counts the layers whose integers are a quantizer's, `rounded_again` names those whose grid has no such form.
    `int8_note` is what there is to say of int8 layers.
    """

    linears: Counter[str] = field(default_factory=Counter)
    kept: dict[str, str] = field(default_factory=dict)
    grids: int = 0
    rounded_again: list[str] = field(default_factory=list)
    int8_note: str = ""

    def regrouped(self, weight: Weight, bits: int, group: int, *, symmetric: bool = False) -> Grid | None:
        """The weight's own grid in groups of `group` columns, counted; None where it has none of this form."""
        if weight.grid is None:
            return None
        fits = weight.grid.bits == bits and not (symmetric and weight.grid.zeros is not None)
        found = regrouped(weight.grid, group, weight.columns) if fits else None
        if found is None:
            self.rounded_again.append(weight.name)
        else:
            self.grids += 1
        return found

    def details(self) -> dict[str, Any]:
        """Plain values for `Part.details`."""
        details: dict[str, Any] = {"linears": dict(self.linears), "kept": dict(self.kept)}
        if self.grids or self.rounded_again:
            details |= {"grids": self.grids, "rounded_again": list(self.rounded_again)}
        return {**details, "note": self.int8_note} if self.int8_note and "int8" in self.linears else details


class Linears:
    """Emits the linear layers of one graph; layers that read the same x share its int8 rounding.

    `web`: weights in groups go into operators that are fast in WebAssembly.
    """

    def __init__(self, graph: Graph, precision: Precision, *, web: bool = False) -> None:
        self.graph, self.precision, self._web = graph, precision, web
        self.tally = Tally(int8_note=SATURATION)
        self.layers: list[str] = []
        self._rounded: dict[str | tuple[str, int], tuple[str, str]] = {}
        self._zero = ""
        self._widened: set[str] = set()

    def emit(self, x: str, weight: Weight, output: str) -> str:
        """y (…, rows) from x (…, columns). Raises RecipeError for weights that fp16 cannot hold."""
        precision = self.precision.at(self._named(weight))
        self.tally.linears[str(precision)] += 1
        if reason := kept(self.precision, precision):
            self.tally.kept[weight.name] = reason
        if precision.weights == "int4":
            return self._int4(x, weight, output, precision.group_size)
        if precision.weights == "int8":
            return self._int8(x, weight, output)
        return self._float(x, weight, output, half=precision.weights == "fp16")

    def rows_change(self) -> None:
        """The layers to come may read another number of rows than those before."""
        self._zero = ""

    def half(self, name: str, array: NDArray[np.float32]) -> str:
        """A constant stored as fp16 and widened when the graph is loaded."""
        if f"{name}.float" not in self._widened:
            check_fp16(name, array)
            self.graph.tensor(name, array.astype(np.float16))
            self._widened.add(self.graph.node("Cast", [name], f"{name}.float", to=TensorProto.FLOAT))
        return f"{name}.float"

    def _float(self, x: str, weight: Weight, output: str, *, half: bool) -> str:
        dtype = np.float16 if half else np.float32
        name = f"{weight.name}.weight"
        region = self.graph.reserve(name, (weight.columns, weight.rows), dtype)

        def write(start: int, rows: NDArray[Any]) -> None:
            values = widen(rows)
            if half:
                check_fp16(name, values)
            region.write_columns(start, values.T.astype(dtype))

        stream(weight, write)
        if half:
            name = self.graph.node("Cast", [name], f"{name}.float", to=TensorProto.FLOAT)
        return self._with_bias(self.graph.node("MatMul", [x, name], self._before_bias(weight, output)), weight, output)

    def _int8(self, x: str, weight: Weight, output: str) -> str:
        """Integer products: one scale an output channel, and one a row of x, found as it comes.

        A row's rounding is its own, so that prompts may be cut into chunks and a row of outliers spoils no other.
        """
        rounded, step = self._round(x, weight.columns)
        values = self.graph.reserve(f"{weight.name}.weight", (weight.columns, weight.rows), np.int8)
        scales = self.graph.reserve(f"{weight.name}.scale", (weight.rows,), np.float32)

        grid = self.tally.regrouped(weight, 8, weight.columns, symmetric=True)

        def write(start: int, rows: NDArray[Any]) -> None:
            quantized = quantize_int8(rows) if grid is None else pack_int8(rows, grid.rows(start, start + len(rows)))
            values.write_columns(start, quantized.values.T)
            scales.write(start, quantized.scales)

        stream(weight, write)
        one = self.graph.tensor("one", np.array(1, np.float32))
        inputs = [rounded, f"{weight.name}.weight", one, f"{weight.name}.scale", "middle"]
        product = self.graph.node("MatMulIntegerToFloat", inputs, f"{output}.product", MICROSOFT)
        if weight.bias is None:
            return self.graph.node("Mul", [product, step], output)
        scaled = self.graph.node("Mul", [product, step], f"{output}.scaled")
        return self.graph.node("Add", [scaled, self._bias(weight)], output)

    def _round(self, x: str, columns: int) -> tuple[str, str]:
        """x as uint8 with 128 for zero, and the step of each row (…, 1). A row of zeros gives 0 · anything.

        A row is one block of QuantizeLinear, which takes steps as they come and so needs no division before it.
        """
        if x not in self._rounded:
            graph = self.graph
            axis = graph.tensor("channels", np.array([-1], np.int64))
            unit = graph.tensor("unit", np.array(1 / 127, np.float32))
            middle, endless = graph.tensor("middle", np.array(128, np.uint8)), graph.tensor("endless", _ENDLESS)
            magnitude = graph.node("Abs", [x], f"{x}.abs")
            largest = graph.node("ReduceMax", [magnitude, axis], f"{x}.largest", keepdims=1)
            step = graph.node("Mul", [largest, unit], f"{x}.step")
            self._zero = self._zero or graph.node("QuantizeLinear", [step, endless, middle], f"{x}.zero")
            inputs = [x, step, self._zero]  # 128 in the steps' shape
            rounded = graph.node("QuantizeLinear", inputs, f"{x}.uint8", axis=-1, block_size=columns)
            self._rounded[x] = rounded, step
        return self._rounded[x]

    def emit_head(self, x: str, weight: Weight, output: str) -> str:
        """The layer that gives the logits: 8 bits in groups for int8 and int4 parts, since its errors count most.

        A rule for it gives it another precision, of which int8 is in groups all the same.
        """
        rule = self.precision.rule(self._named(weight))
        if (rule or self.precision).weights not in ("int8", "int4") or (rule is not None and rule.weights == "int4"):
            return self.emit(x, weight, output)
        self.tally.linears[f"int8:g{HEAD_GROUP}"] += 1
        if rule is None and self.precision.weights == "int4":
            self.tally.kept[weight.name] = f"int8:g{HEAD_GROUP}: its errors count most; a rule for it makes it smaller"
        grid = self.tally.regrouped(weight, 8, HEAD_GROUP, symmetric=True)

        def quantized(start: int, rows: NDArray[Any]) -> Int8Groups:
            if grid is None:
                return quantize_int8_groups(rows, HEAD_GROUP)
            return pack_int8_groups(rows, grid.rows(start, start + len(rows)))

        if self._web:
            widened = Widened(self.graph, weight.name, weight.rows, weight.columns, HEAD_GROUP)
            stream(weight, lambda start, rows: widened.write(start, quantized(start, rows)))
            return self._with_bias(widened.emit(x, self._before_bias(weight, output)), weight, output)
        groups = -(-weight.columns // HEAD_GROUP)
        values = self.graph.reserve(f"{weight.name}.weight", (weight.rows, groups, HEAD_GROUP), np.uint8)
        scales = self.graph.reserve(f"{weight.name}.scale", (weight.rows, groups), np.float32)

        def write(start: int, rows: NDArray[Any]) -> None:
            made = quantized(start, rows)
            values.write(start, made.values)
            scales.write(start, made.scales)

        stream(weight, write)
        return self._blockwise(x, weight, output, 8, HEAD_GROUP, "")

    def _int4(self, x: str, weight: Weight, output: str, group: int) -> str:
        grid = self.tally.regrouped(weight, 4, group)

        def quantized(start: int, rows: NDArray[Any]) -> Int4:
            return quantize_int4(rows, group) if grid is None else pack_int4(rows, grid.rows(start, start + len(rows)))

        if self._web:
            products = Products(self.graph, weight.name, weight.rows, weight.columns, group)
            stream(weight, lambda start, rows: products.write(start, quantized(start, rows)), products.width)
            if (x, group) not in self._rounded:
                self._rounded[x, group] = round_groups(self.graph, x, weight.columns, group)
            made = products.emit(*self._rounded[x, group], self._before_bias(weight, output))
            return self._with_bias(made, weight, output)
        groups = -(-weight.columns // group)
        packed = self.graph.reserve(f"{weight.name}.weight", (weight.rows, groups, group // 2), np.uint8)
        scales = self.graph.reserve(f"{weight.name}.scale", (weight.rows, groups), np.float32)
        zeros = self.graph.reserve(f"{weight.name}.zero", (weight.rows, (groups + 1) // 2), np.uint8)

        def write(start: int, rows: NDArray[Any]) -> None:
            made = quantized(start, rows)
            packed.write(start, made.packed)
            scales.write(start, made.scales)
            zeros.write(start, made.zero_points)

        stream(weight, write)
        return self._blockwise(x, weight, output, 4, group, f"{weight.name}.zero")

    def _blockwise(self, x: str, weight: Weight, output: str, bits: int, group: int, zeros: str) -> str:
        """accuracy_level 4: x is rounded to int8 in groups as well, and the products are integers."""
        return self.graph.node(
            "MatMulNBits",
            [x, f"{weight.name}.weight", f"{weight.name}.scale", zeros, "", self._bias(weight)],
            output,
            MICROSOFT,
            K=weight.columns,
            N=weight.rows,
            bits=bits,
            block_size=group,
            accuracy_level=4,
        )

    def _named(self, weight: Weight) -> str:
        """What rules call the layer; `layers` are all that were asked for."""
        self.layers.append(weight.layer or weight.name)
        return self.layers[-1]

    def _before_bias(self, weight: Weight, output: str) -> str:
        return output if weight.bias is None else f"{output}.product"

    def _with_bias(self, product: str, weight: Weight, output: str) -> str:
        return product if weight.bias is None else self.graph.node("Add", [product, self._bias(weight)], output)

    def _bias(self, weight: Weight) -> str:
        return "" if weight.bias is None else self.graph.tensor(f"{weight.name}.bias", weight.bias)


def stream(weight: Weight, write: Callable[[int, NDArray[Any]], None], chunk: int = 0) -> None:
    """Give `write` every row range of the weight, on all cores: numpy works outside the interpreter lock."""

    def work(start: int, stop: int) -> None:
        write(start, weight.read(start, stop))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for task in [pool.submit(work, *span) for span in _spans(weight.rows, chunk or CHUNK)]:
            task.result()


def _spans(rows: int, chunk: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + chunk, rows)) for start in range(0, rows, chunk))


def check_fp16(name: str, values: NDArray[np.float32]) -> None:
    """Raise RecipeError naming the tensor where fp16 cannot hold it."""
    largest = float(max(values.max(initial=0), -values.min(initial=0)))
    if largest > _FP16_MAX:
        raise RecipeError(f"{name} reaches {largest:.3g}, beyond fp16: choose fp32 or int8 for its part")
