"""A second small graph over the same weights, for bfloat16: ONNX Runtime's CPU has no bfloat16 arithmetic.

All values are float32 that went through bfloat16, so that every result is rounded as TensorRT rounds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper

_MOVED = {"Concat", "Expand", "Gather", "Reshape", "Slice", "Squeeze", "TensorScatter", "Transpose", "Unsqueeze"}
"""Operators that only move numbers: what they are given is rounded already."""


def write_check_graph(path: Path) -> Path:
    """Write <part>.check.onnx beside <part>.onnx, a bfloat16 graph; its inputs and outputs are float32 in their place.

    Both read the same data file. Inputs that are only moved (a KV cache) must hold numbers of bfloat16.
    """
    model = onnx.load(path, load_external_data=False)
    graph, out = model.graph, path.with_name(f"{path.stem}.check.onnx")
    typed = onnx.shape_inference.infer_shapes(model).graph
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
    onnx.save(model, out)
    onnx.checker.check_model(out)
    return out


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
