"""Vision encoder and projector: the module traced by torch.onnx.export, its weight matmuls rewritten to a precision."""

from __future__ import annotations

import ast
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from vlm_export.onnx.attention import fuse_attention
from vlm_export.onnx.graph import OPSET, Graph
from vlm_export.onnx.linear import Linears, Weight
from vlm_models.errors import CheckpointError

FLOAT = TensorProto.FLOAT
Constants = Mapping[int, NDArray[Any]]
"""Which inputs of a node are constants, and what they hold."""

_TRACED_FROM = ("class_hierarchy", "name_scopes")


def trace(
    module: torch.nn.Module, shape: tuple[int, ...], graph: Graph, linears: Linears, names: tuple[str, str]
) -> None:
    """Trace `module`, which takes one float32 tensor (N, *shape) with N dynamic, into `graph`.

    `names` are those of its input and output. Matrix products with a weight go through `linears`; all else is copied.
    """
    traced = traced_graph(module, shape)
    fuse_attention(traced)
    (source,), (result,) = traced.inputs, traced.outputs
    source.name, result.name = names
    graph.input(names[0], FLOAT, dims(source))

    def linear(x: str, weight: Weight, output: str) -> None:
        linears.rows_change()
        linears.emit(x, weight, output)

    emit(traced, linear, lambda node, constants: _copy(node, constants, graph, linears))
    graph.output(names[1], FLOAT, dims(result))


def emit(
    traced: ir.Graph, linear: Callable[[str, Weight, str], object], copy: Callable[[NodeProto, Constants], None]
) -> None:
    """Give every linear layer of the graph to `linear`, as (x, weight, output), and all other nodes to `copy`."""
    folded: set[ir.Node] = set()
    for node in traced:
        if node in folded:
            continue
        found = _linear(node)
        if found is None:
            copy(*_plain(node))
            continue
        weight, end = found
        folded.add(end)
        linear(_name(node.inputs[0]), weight, _name(end.outputs[0]))


def traced_graph(module: torch.nn.Module, shape: tuple[int, ...]) -> ir.Graph:
    """The module as an ONNX graph with constants folded and dead layers removed, made without any noise.

    It takes one float32 tensor (N, *shape) with N dynamic. Raises CheckpointError for a module beyond standard ONNX.
    """
    example = torch.zeros(2, *shape)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            opset_version=OPSET,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    model = program.model
    if model.functions or set(model.opset_imports) != {""} or model.opset_imports[""] != OPSET:
        raise CheckpointError(
            f"{type(module).__name__} needs operators beyond ONNX opset {OPSET}: {model.opset_imports}"
        )
    return model.graph


@contextmanager
def _quiet() -> Iterator[None]:
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _linear(node: ir.Node) -> tuple[Weight, ir.Node] | None:
    """The linear layer that begins at this node, and the node that ends it: the Add of its bias, or itself."""
    if node.op_type not in ("MatMul", "Gemm") or _constant(node.inputs[0]) is not None:
        return None
    matrix = _constant(node.inputs[1])
    if matrix is None or matrix.ndim != 2:
        return None
    name = _module_name(node) or _name(node.inputs[1])
    if node.op_type == "Gemm":
        plain = all(node.attributes.get_float(key, 1.0) == 1.0 for key in ("alpha", "beta"))
        rows = matrix if "transB" in node.attributes and node.attributes["transB"].as_int() else matrix.T
        bias = _constant(node.inputs[2]) if len(node.inputs) > 2 else None
        fits = len(node.inputs) == 2 or (bias is not None and bias.shape == rows.shape[:1])
        turned = "transA" in node.attributes and node.attributes["transA"].as_int()
        return (_weight(name, rows, bias), node) if plain and fits and not turned else None
    product = node.outputs[0]
    uses = list(product.uses())
    if len(uses) == 1 and not product.is_graph_output():
        end = uses[0].node
        others = [value for value in end.inputs if value is not product]
        bias = _constant(others[0]) if end.op_type == "Add" and len(others) == 1 else None
        if bias is not None and bias.shape == (matrix.shape[1],):
            return _weight(_module_name(node) or _layer_name(name, others[0]), matrix.T, bias), end
    return _weight(name, matrix.T, None), node


def _weight(name: str, rows: NDArray[Any], bias: NDArray[Any] | None) -> Weight:
    return Weight(name, rows.shape[0], rows.shape[1], lambda start, stop: rows[start:stop], bias)


def _layer_name(matrix: str, bias: ir.Value | None) -> str:
    """The module's own name, which its bias still has where the folded weight has lost it."""
    return _name(bias).removesuffix(".bias") if _name(bias).endswith(".bias") else matrix


def _module_name(node: ir.Node) -> str:
    """The path of the nn.Linear that the node was traced from, "" where it was none."""
    kinds, paths = (ast.literal_eval(node.metadata_props.get(f"pkg.torch.onnx.{key}", "[]")) for key in _TRACED_FROM)
    linears = [path for kind, path in zip(kinds, paths, strict=False) if kind == "torch.nn.modules.linear.Linear"]
    return linears[-1] if linears else ""


def _plain(node: ir.Node) -> tuple[NodeProto, Constants]:
    """The node as ONNX stores it, and those of its inputs that are constants."""
    proto: NodeProto = ir.serde.serialize_node(node)
    del proto.metadata_props[:]
    proto.doc_string = ""
    constants = {position: _constant(value) for position, value in enumerate(node.inputs)}
    return proto, {position: array for position, array in constants.items() if array is not None}


def _copy(node: NodeProto, constants: Constants, graph: Graph, linears: Linears) -> None:
    """The node as it is, with its constants written to the data file."""
    for position, array in constants.items():
        node.input[position] = _store(node.input[position], array, node.op_type, graph, linears)
    graph.nodes.append(node)


def _store(name: str, array: NDArray[Any], op: str, graph: Graph, linears: Linears) -> str:
    """A constant that is not a linear layer's: matrices at fp16 unless the part is fp32, the rest as they are."""
    if array.dtype != np.float32 or array.ndim < 2 or array.size < 1024:
        return graph.tensor(name, array)
    half = linears.precision.weights != "fp32"
    if linears.precision.weights in ("int8", "int4"):
        linears.tally.kept[name] = f"fp16: {math.prod(array.shape)} weights of {op}, which has no integer form here"
    if not half:
        return graph.tensor(name, array)
    return linears.half(name, array)


def _constant(value: ir.Value | None) -> NDArray[Any] | None:
    tensor = None if value is None else value.const_value
    return None if tensor is None else tensor.numpy()


def _name(value: ir.Value | None) -> str:
    return "" if value is None or value.name is None else value.name


def dims(value: ir.Value) -> list[int | str]:
    """The shape with its first dimension called N."""
    assert value.shape is not None
    return ["N", *(cast(int, size) for size in value.shape[1:])]
