"""Vision encoder and projector for TensorRT: the traced module in one float type, its linear layers at a precision."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from onnx import NodeProto, TensorProto, helper

from vlm_export.onnx.graph import Graph
from vlm_export.onnx.trace import Constants, dims, emit, traced_graph
from vlm_export.rules import check_rules, kept_note
from vlm_export.target import Progress, silent
from vlm_export.tensorrt.check_graph import write_check_graph
from vlm_export.tensorrt.linear import Linears, Ranges
from vlm_models.model import Model
from vlm_quant.recipe import Precision
from vlm_runtime.manifest import Part

EncoderPart = Literal["vision_encoder", "projector"]

NAMES = {"vision_encoder": ("pixel_values", "image_features"), "projector": ("image_features", "image_embeds")}
OPSET: Literal[23] = 23
_FLOAT = TensorProto.FLOAT


def vision_part(
    model: Model,
    part: EncoderPart,
    precision: Precision,
    folder: Path,
    *,
    ranges: Ranges | None = None,
    opset: Literal[21, 23] = OPSET,
    progress: Progress = silent,
) -> Part:
    """Write folder/<part>.onnx, and say what was written.

    vision_encoder: pixel_values (N, 3, s, s) → image_features (N, T, F); projector: image_features → image_embeds
    (N, T, H). Float32 in and out; between them everything has the type in which the part computes. `ranges` of its
    layers' inputs for precisions that round them. Opset 21 is for TensorRT before 10.14, which has no Attention
    operator (release notes of its parser). Raises RecipeError for weights beyond fp16, or without a range.
    """
    vision, features = model.spec.vision, (model.spec.vision.image_tokens, model.spec.projector.in_features)
    shape = (3, vision.image_size, vision.image_size) if part == "vision_encoder" else features
    progress(part, 0, 2)
    traced = traced_graph(model.vision_encoder() if part == "vision_encoder" else model.projector(), shape)
    progress(part, 1, 2)
    (source,), (result,) = traced.inputs, traced.outputs
    names = NAMES[part]
    with Graph(folder / f"{part}.onnx", part, opset) as graph:
        linears = Linears(graph, precision, ranges)
        graph.input(names[0], _FLOAT, dims(source))
        source.name, result.name = f"{names[0]}.{linears.compute}", f"{names[1]}.{linears.compute}"
        graph.node("Cast", [names[0]], source.name, to=linears.onnx)
        emit(traced, linears.emit, lambda node, constants: _copy(node, constants, graph, linears))
        graph.node("Cast", [result.name], names[1], to=_FLOAT)
        graph.output(names[1], _FLOAT, dims(result))
        check_rules(precision, linears.layers, part)
        graph.save({"vlm.fingerprint": model.spec.fingerprint, "vlm.part": part})
    files, io = [graph.path, graph.data_path], {"dtype": str(linears.compute)}
    if linears.needs_check_graph:
        files.append(write_check_graph(graph.path))
        io["check_graph"] = f"{folder.name}/{files[-1].name}"
    progress(part, 2, 2)
    details = {**linears.tally.details(), "data_bytes": graph.size, "io": io}
    details["notes"] = kept_note(part, precision, linears.tally.kept)
    paths = tuple(f"{folder.name}/{file.name}" for file in files)
    return Part(paths[0], paths, str(precision), details)


def _copy(node: NodeProto, constants: Constants, graph: Graph, linears: Linears) -> None:
    """The node as it is, float32 replaced by the type in which the part computes."""
    for position, array in constants.items():
        name = node.input[position]
        if array.dtype != "float32":
            graph.tensor(name, array)
            continue
        linears.constant(name, array)
        if array.ndim > 1 and array.size >= 1024 and linears.precision.weights in ("int8", "int4"):
            what = f"{array.size} weights of {node.op_type}"
            linears.tally.kept[name] = f"{linears.compute}: {what}, which has no integer form here"
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == _FLOAT:
            attribute.i = linears.onnx
    if node.op_type == "Attention" and (linears.compute == "fp32" or graph.opset < OPSET):
        _write_out(node, graph, linears)
    else:
        graph.nodes.append(node)


def _write_out(node: NodeProto, graph: Graph, linears: Linears) -> None:
    """Attention over all rows in single operations: TensorRT has fused kernels for fp16 and bf16 alone."""
    (q, k, v), out = node.input, node.output[0]  # (N, heads, T, head_dim)
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert not attributes.get("is_causal")
    scale = linears.constant(f"{out}.scale", np.array(attributes["scale"], np.float32))
    scaled = graph.node("Mul", [q, scale], f"{out}.scaled")
    turned = graph.node("Transpose", [k], f"{out}.turned", perm=[0, 1, 3, 2])
    weights = graph.node(
        "Softmax", [graph.node("MatMul", [scaled, turned], f"{out}.scores")], f"{out}.weights", axis=-1
    )
    graph.node("MatMul", [weights, v], out)
