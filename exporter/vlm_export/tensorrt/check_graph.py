"""A second small graph over the same weights, for ONNX Runtime's CPU where that cannot run what TensorRT is given.

It has no bfloat16 arithmetic: all values are float32 there that went through bfloat16, so that every result is rounded
as TensorRT rounds it. And it takes fp8 for int8 where it moves QuantizeLinear about: rounding is a Cast there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

_MOVED = {"Concat", "Expand", "Gather", "Reshape", "Slice", "Squeeze", "TensorScatter", "Transpose", "Unsqueeze"}
"""Operators that only move numbers: what they are given is rounded already."""


def write_check_graph(path: Path) -> Path:
    """Write <part>.check.onnx beside <part>.onnx; inputs and outputs that are bfloat16 become float32.

    Both read the same data file. Inputs that are only moved (a KV cache) must hold numbers of bfloat16.
    """
    model, out = onnx.load(path, load_external_data=False), path.with_name(f"{path.stem}.check.onnx")
    _without_fp8(model.graph)
    _without_bf16(model)
    onnx.save(model, out)
    onnx.checker.check_model(out)
    return out


def _without_fp8(graph: GraphProto) -> None:
    """QuantizeLinear and DequantizeLinear of fp8 as divisions, Casts and products."""
    fp8 = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT8E4M3FN}
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        out = node.output[0]
        if node.op_type == "QuantizeLinear" and node.input[2] in fp8:
            fp8.add(out)
            wide = [
                _cast(name, f"{out}.{kind}", TensorProto.FLOAT) for kind, name in zip("xs", node.input, strict=False)
            ]
            ratio = helper.make_node("Div", [f"{out}.x", f"{out}.s"], [f"{out}.ratio"], f"{out}.Div")
            nodes += [*wide, ratio, _cast(f"{out}.ratio", out, TensorProto.FLOAT8E4M3FN)]
        elif node.op_type == "DequantizeLinear" and node.input[0] in fp8:
            scale = node.input[1]
            product = helper.make_node("Mul", [f"{out}.x", scale], [out], f"{out}.Mul")
            nodes += [_cast(node.input[0], f"{out}.x", kinds[scale]), product]
        else:
            nodes.append(node)
    _replace(graph, nodes)


def _without_bf16(model: ModelProto) -> None:
    graph, typed = model.graph, onnx.shape_inference.infer_shapes(model).graph
    rounded = {value.name for value in (*typed.value_info, *graph.input, *graph.output) if _is_bf16(value)}
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.BFLOAT16}
    computed = {name for node in graph.node if node.op_type not in _MOVED for name in node.input}
    given = [value.name for value in graph.input if value.name in rounded & computed]
    renamed = {name: f"{name}.float" for name in (*weights, *given)}
    nodes = [_cast(name, f"{name}.float", TensorProto.FLOAT) for name in sorted(weights)]
    nodes += [cast for name in given for cast in _round(name, f"{name}.float")]
    for node in graph.node:
        nodes += _rewritten(node, rounded, renamed)
    _replace(graph, nodes)
    for value in (*graph.input, *graph.output):
        if _is_bf16(value):
            value.type.tensor_type.elem_type = TensorProto.FLOAT


def _rewritten(node: NodeProto, rounded: set[str], renamed: dict[str, str]) -> Iterator[NodeProto]:
    """The node on float32, and after it the rounding of what it computes."""
    new = NodeProto()
    new.CopyFrom(node)
    new.input[:] = [renamed.get(name, name) for name in node.input]
    if node.op_type == "Cast" and node.output[0] in rounded:
        yield from _round(new.input[0], node.output[0])
        return
    exact = [name for name in node.output if name in rounded and node.op_type not in _MOVED]
    new.output[:] = [f"{name}.exact" if name in exact else name for name in node.output]
    yield new
    for name in exact:
        yield from _round(f"{name}.exact", name)


def _round(name: str, out: str) -> tuple[NodeProto, NodeProto]:
    return _cast(name, f"{out}.bf16", TensorProto.BFLOAT16), _cast(f"{out}.bf16", out, TensorProto.FLOAT)


def _cast(name: str, out: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [name], [out], f"{out}.Cast", to=to)


def _replace(graph: GraphProto, nodes: list[NodeProto]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]


def _is_bf16(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.elem_type == TensorProto.BFLOAT16)
