"""A bfloat16 graph for a runtime that has no bfloat16 arithmetic: float32 inside, every result rounded to bfloat16.

ONNX Runtime's CPU multiplies no bfloat16 numbers, so parity runs this graph. It reads the weights of the other from the
same data file, and has its inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

_BF16, _FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT
# These move numbers that are rounded already.
_MOVES = frozenset({"Concat", "Expand", "Gather", "Reshape", "Slice", "TensorScatter", "Transpose", "Unsqueeze"})


def write_check_graph(path: Path) -> Path:
    """Write <name>.check.onnx beside the graph `path`, over the same data file, and return its path."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    types = _types(model)
    sources = [name for name in (*(t.name for t in graph.initializer), *(i.name for i in graph.input)) if name in types]
    inside = {name: f"{name}.float" for name in (*sources, *(o.name for o in graph.output)) if name in types}
    outputs = {output.name for output in graph.output}
    nodes = [helper.make_node("Cast", [name], [inside[name]], f"{name}.widen", to=_FLOAT) for name in sources]
    for node in graph.node:
        nodes += _rounded(node, types, inside, outputs)
    del graph.node[:]
    del graph.value_info[:]
    graph.node.extend(nodes)
    beside = path.with_name(f"{path.stem}.check.onnx")
    onnx.save(model, beside)
    onnx.checker.check_model(beside)
    return beside


def _types(model: onnx.ModelProto) -> frozenset[str]:
    """The values that are bfloat16."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    named = {value.name for value in values if value.type.tensor_type.elem_type == _BF16}
    return frozenset(named | {tensor.name for tensor in graph.initializer if tensor.data_type == _BF16})


def _rounded(
    node: NodeProto, types: frozenset[str], inside: Mapping[str, str], outputs: set[str]
) -> Iterator[NodeProto]:
    """The node on float32 values, and what rounds its results."""
    wide = NodeProto()
    wide.CopyFrom(node)
    for position, name in enumerate(node.input):
        wide.input[position] = inside.get(name, name)
    for attribute in wide.attribute:
        _widen(attribute)
    casts = []
    for position, name in enumerate(node.output):
        if name not in types:
            continue
        value = inside.get(name, name)  # float32, for the nodes after this one
        narrow = name if name in outputs else f"{name}.narrow"
        exact = value if node.op_type in _MOVES and name not in outputs else f"{name}.exact"
        wide.output[position] = exact
        if exact != value:
            casts.append(helper.make_node("Cast", [exact], [narrow], f"{name}.round", to=_BF16))
            casts.append(helper.make_node("Cast", [narrow], [value], f"{name}.widen", to=_FLOAT))
    yield wide
    yield from casts


def _widen(attribute: AttributeProto) -> None:
    if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == _BF16:
        attribute.i = _FLOAT
    if attribute.type == AttributeProto.TENSOR and attribute.t.data_type == _BF16:
        attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype("float32")))
