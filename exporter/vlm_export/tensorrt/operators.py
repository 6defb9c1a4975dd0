"""Normalization and rotation: one operator each from opset 23 on, written out for TensorRT that is older."""

from __future__ import annotations

import numpy as np

from vlm_export.onnx.graph import OPSET, Graph


def rms_norm(graph: Graph, x: str, scale: str, out: str, eps: float) -> str:
    """x / sqrt(mean(x²) + eps) · scale over the last axis; x and scale are float32."""
    if graph.opset >= OPSET:
        return graph.node("RMSNormalization", [x, scale], out, axis=-1, epsilon=eps)
    last = graph.tensor("axis.last", np.array([-1], np.int64))
    mean = graph.node("ReduceMean", [graph.node("Mul", [x, x], f"{out}.squares"), last], f"{out}.mean", keepdims=1)
    floor = graph.tensor(f"{out}.eps", np.array(eps, np.float32))
    root = graph.node("Sqrt", [graph.node("Add", [mean, floor], f"{out}.floored")], f"{out}.root")
    return graph.node("Mul", [graph.node("Div", [x, root], f"{out}.unit"), scale], out)


def rotate(graph: Graph, x: str, cos: str, sin: str, out: str, dim: int, head_dim: int) -> str:
    """Half-split rotation of the first `dim` channels of x (1, heads, S, head_dim); cos and sin (1, S, dim / 2)."""
    if graph.opset >= OPSET:
        return graph.node("RotaryEmbedding", [x, cos, sin], out, rotary_embedding_dim=dim)
    heads = graph.tensor("axis.1", np.array([1], np.int64))
    cos, sin = (graph.node("Unsqueeze", [table, heads], f"{out}.{n}") for n, table in (("cos", cos), ("sin", sin)))
    last = graph.tensor("axis.last", np.array([-1], np.int64))

    def part(start: int, stop: int, name: str) -> str:
        bounds = [graph.tensor(f"channel.{place}", np.array([place], np.int64)) for place in (start, stop)]
        return graph.node("Slice", [x, *bounds, last], f"{out}.{name}")

    def product(rows: str, table: str, name: str) -> str:
        return graph.node("Mul", [rows, table], f"{out}.{name}")

    first, second = part(0, dim // 2, "first"), part(dim // 2, dim, "second")
    left = graph.node("Sub", [product(first, cos, "a"), product(second, sin, "b")], f"{out}.left")
    right = graph.node("Add", [product(second, cos, "c"), product(first, sin, "d")], f"{out}.right")
    rest = [part(dim, head_dim, "rest")] if dim < head_dim else []
    return graph.node("Concat", [left, right, *rest], out, axis=-1)
