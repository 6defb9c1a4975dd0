"""Attention of rows that see one another both ways, beside the fused causal attention: one of the two is taken.

GroupQueryAttention writes rotated keys and values into the cache in either case, and is causal always. Where the
graph's input `block` is true its result is put aside, and the rows' attention is written out over the cache as it is
then.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper

from vlm_export.onnx.graph import MICROSOFT, Graph
from vlm_models.language import Attention

INPUT = "block"


def declare(graph: Graph) -> None:
    """The graph's input: whether the rows of this call are a block."""
    graph.input(INPUT, TensorProto.BOOL, ())


def block_attention(
    graph: Graph, query: str, causal: str, attention: Attention, rope: tuple[str, str], both_ways: str
) -> None:
    """layers.N.self_attn.attention (1, S, heads · head_dim): of `query` (1, S, heads · head_dim) not yet rotated, or
    `causal`, which GroupQueryAttention gave.
    """
    a, layer = attention, f"layers.{attention.layer}.self_attn"
    branch = Branch(f"{layer}.block")
    total = branch.node("Unsqueeze", ["total_sequence_length", branch.ints("axis0", [0])], "total32")
    total = branch.node("Cast", [total], "total", to=TensorProto.INT64)
    rows = branch.node("Shape", [query], "rows", start=1, end=2)
    past = branch.node("Sub", [total, rows], "past")

    split = branch.ints("split", [1, -1, a.heads, a.head_dim])
    heads = branch.node("Reshape", [query, split], "heads")
    turned = branch.node("Transpose", [heads], "turned", perm=[0, 2, 1, 3])
    options = {"num_heads": a.heads, "rotary_embedding_dim": a.rope.dim} if a.rope.dim < a.head_dim else {}
    rotated = branch.node("RotaryEmbedding", [turned, past, *rope], "rotated", MICROSOFT, **options)
    grouped = branch.node("Reshape", [rotated, branch.ints("group", [1, a.kv_heads, -1, a.head_dim])], "grouped")
    bounds = [branch.ints("from", [0]), total, branch.ints("at", [2])]
    keys, values = (branch.node("Slice", [f"present.{a.layer}.{kind}", *bounds], kind) for kind in ("key", "value"))
    scores = branch.node("MatMul", [grouped, branch.node("Transpose", [keys], "keysT", perm=[0, 1, 3, 2])], "products")
    scores = branch.node("Mul", [scores, branch.float("scale", a.scale)], "scores")
    if a.softcap:
        ratio = branch.node("Div", [scores, branch.float("cap", a.softcap)], "ratio")
        scores = branch.node("Mul", [branch.node("Tanh", [ratio], "tanh"), branch.float("cap", a.softcap)], "capped")
    if a.window and both_ways == "pictures":
        scores = _within_window(branch, scores, rows, past, total, a)
    weights = branch.node("Softmax", [scores], "weights", axis=-1)
    mixed = branch.node("MatMul", [weights, values], "mixed")
    apart = branch.node("Reshape", [mixed, branch.ints("ungroup", [1, a.heads, -1, a.head_dim])], "apart")
    back = branch.node("Transpose", [apart], "back", perm=[0, 2, 1, 3])
    result = branch.node("Reshape", [back, branch.ints("merge", [1, -1, a.heads * a.head_dim])], "result")

    plain = Branch(f"{layer}.plain")
    same = plain.node("Identity", [causal], "result")
    then, other = branch.graph(result), plain.graph(same)
    graph.node("If", [INPUT], f"{layer}.attention", then_branch=then, else_branch=other)


def _within_window(branch: Branch, scores: str, rows: str, past: str, total: str, a: Attention) -> str:
    """Scores (1, kv_heads, group · S, T) without keys that lie `window` or more before their query."""
    zero, one = branch.int("zero", 0), branch.int("one", 1)
    queries = branch.node("Range", [zero, branch.node("Squeeze", [rows], "rows0"), one], "counted")
    positions = branch.node("Add", [queries, past], "positions")
    queries = branch.node("Unsqueeze", [positions, branch.ints("axis1", [1])], "q")
    keys = branch.node("Range", [zero, branch.node("Squeeze", [total], "total0"), one], "k")
    distance = branch.node("Sub", [queries, keys], "distance")
    seen = branch.node("Less", [distance, branch.int("window", a.window)], "seen")
    five = branch.ints("five", [1, a.kv_heads, a.heads // a.kv_heads])
    shape = branch.node("Concat", [five, rows, total], "shape", axis=0)
    apart = branch.node("Reshape", [scores, shape], "five_scores")
    masked = branch.node("Where", [seen, apart, branch.float("never", -np.inf)], "masked")
    flat = branch.node("Concat", [branch.ints("flat", [1, a.kv_heads, -1]), total], "flat_shape", axis=0)
    return branch.node("Reshape", [masked, flat], "within")


class Branch:
    """A subgraph of an If: it reads the outer graph's values and has constants of its own."""

    def __init__(self, name: str) -> None:
        self._name, self._nodes, self._known = name, list[NodeProto](), set[str]()

    def node(self, op: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        name = f"{self._name}.{output}"
        self._nodes.append(helper.make_node(op, inputs, [name], name, domain=domain, **attributes))
        return name

    def ints(self, name: str, values: list[int]) -> str:
        """A constant (n,) int64."""
        return self._constant(name, np.array(values, np.int64))

    def int(self, name: str, value: int) -> str:
        """A constant () int64."""
        return self._constant(name, np.array(value, np.int64))

    def float(self, name: str, value: float) -> str:
        """A constant () float32."""
        return self._constant(name, np.array(value, np.float32))

    def graph(self, result: str) -> GraphProto:
        """The subgraph with its one result, of any shape."""
        output = helper.make_tensor_value_info(result, TensorProto.FLOAT, None)
        return helper.make_graph(self._nodes, self._name, [], [output])

    def _constant(self, name: str, array: NDArray[Any]) -> str:
        full = f"{self._name}.{name}"
        if full not in self._known:
            self._known.add(full)
            dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
            value = helper.make_tensor(full, dtype, array.shape, array.reshape(-1))
            self._nodes.append(helper.make_node("Constant", [], [full], full, value=value))
        return full
