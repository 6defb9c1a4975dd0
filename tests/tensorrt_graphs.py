"""Small ONNX graphs that TensorRT's builder is given: one linear layer of every precision, operators it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOATS: dict[str, tuple[int, Any]] = {
    "fp32": (TensorProto.FLOAT, np.float32),
    "fp16": (TensorProto.FLOAT16, np.float16),
    "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}


def linear(kind: str, columns: int = 128, rows: int = 256, layers: int = 1) -> onnx.ModelProto:
    """x (16, columns) through linear layers whose weights are fp32, fp16, bf16, int8, int4, w8a8 or fp8."""
    code, dtype = FLOATS.get(kind, FLOATS["fp16"])
    random, nodes, held, x = np.random.default_rng(0), [], [], "x"

    def constant(name: str, array: Any) -> str:
        held.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    for n in range(layers):
        shape = (columns, rows) if n == 0 else (rows, rows)
        weights = random.normal(0, 0.02, shape)
        if kind in FLOATS:
            w = constant(f"w{n}", weights.astype(dtype))
        else:
            stored = {"int4": ml_dtypes.int4, "fp8": ml_dtypes.float8_e4m3fn}.get(kind, np.int8)
            steps = np.clip(np.round(weights * 100), -7, 7).astype(np.int8).astype(stored)
            blocks = {"axis": 0, "block_size": 32} if kind == "int4" else {"axis": 1}
            scales = np.full((shape[0] // 32, shape[1]) if kind == "int4" else shape[1], 0.01, dtype)
            inputs = [constant(f"q{n}", steps), constant(f"s{n}", scales)]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [f"w{n}"], **blocks))
            w = f"w{n}"
            if kind in ("w8a8", "fp8"):
                inputs = [x, constant(f"xs{n}", np.array(0.05, dtype)), constant(f"xz{n}", np.zeros((), stored))]
                nodes.append(helper.make_node("QuantizeLinear", inputs, [f"xq{n}"]))
                nodes.append(helper.make_node("DequantizeLinear", [f"xq{n}", *inputs[1:]], [f"xd{n}"]))
                x = f"xd{n}"
        nodes.append(helper.make_node("MatMul", [x, w], [f"y{n}"], name=f"layer.{n}"))
        x = f"y{n}"
    ends = [helper.make_tensor_value_info(name, code, [16, size]) for name, size in (("x", columns), (x, rows))]
    return _model(helper.make_graph(nodes, "g", ends[:1], ends[1:], held))


def refused() -> onnx.ModelProto:
    """A graph with an operator that TensorRT does not know."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 8]) for name in ("image_features", "y")]
    node = helper.make_node("Celu6", ["image_features"], ["y"], name="projector.odd", domain="com.example")
    return _model(helper.make_graph([node], "g", ends[:1], ends[1:]), helper.make_opsetid("com.example", 1))


def save(model: onnx.ModelProto, path: Path) -> Path:
    """Write it, weights inside."""
    path.write_bytes(model.SerializeToString())
    return path


def _model(graph: onnx.GraphProto, *more: onnx.OperatorSetIdProto) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), *more], ir_version=11)
