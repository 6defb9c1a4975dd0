"""Attention of traced towers as ONNX Runtime's fused operator, which reads heads where the projections wrote them."""

from __future__ import annotations

import onnx_ir as ir

from vlm_export.onnx.graph import MICROSOFT

_APART = [0, 2, 1, 3]  # (N, T, heads, D) → (N, heads, T, D) and back


def fuse_attention(graph: ir.Graph) -> None:
    """Put MultiHeadAttention in place of each Attention without mask between plain splits and a plain merge of heads.

    On the CPU it takes rows in tiles that stay in the cache, where Attention writes out all scores.
    """
    for node in list(graph):
        if node.op_type != "Attention" or len(node.inputs) != 3 or len(node.outputs) != 1 or not _is_plain(node):
            continue
        split, end = [_split(value) for value in node.inputs], _merged(node.outputs[0])
        sources = [source for source, _ in filter(None, split)]
        heads = {count for _, count in filter(None, split)}
        if len(sources) < 3 or len(heads) > 1 or end is None:
            continue
        attributes: dict[str, int | float] = {"num_heads": heads.pop()}
        if "scale" in node.attributes:
            attributes["scale"] = node.attributes["scale"].as_float()
        fused = ir.node("MultiHeadAttention", sources, attributes, domain=MICROSOFT)
        result = end.outputs[0]
        fused.outputs[0].name, fused.outputs[0].shape, fused.outputs[0].type = result.name, result.shape, result.type
        graph.insert_before(end, fused)
        result.replace_all_uses_with(fused.outputs[0])
        _remove(graph, end)


def _is_plain(node: ir.Node) -> bool:
    """Whether every row sees all rows, and nothing but softmax happens to the scores."""
    odd = ("is_causal", "softcap", "qk_matmul_output_mode", "softmax_precision")
    return not any(name in node.attributes and node.attributes[name].value for name in odd)


def _split(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """The rows (N, T, heads · D) that `value` (N, heads, T, D) was made from, and how many heads they hold."""
    apart = _shape_of(_transposed(value))
    rows = None if apart is None else apart.inputs[0]
    shape = None if apart is None else apart.outputs[0].shape
    if rows is None or rows.shape is None or shape is None or len(rows.shape) != 3 or len(shape) != 4:
        return None
    heads, size = shape[2], shape[3]
    if not isinstance(heads, int) or not isinstance(size, int) or rows.shape[2] != heads * size:
        return None
    return (rows, heads) if rows.shape[1] == shape[1] else None


def _merged(value: ir.Value) -> ir.Node | None:
    """The node that makes (N, T, heads · D) of `value` (N, heads, T, D), where nothing else reads what is between."""
    turned = _only(value)
    if turned is None or turned.op_type != "Transpose" or _permutation(turned) != _APART:
        return None
    end = _only(turned.outputs[0])
    if end is None or end.op_type != "Reshape" or end.outputs[0].is_graph_output():
        return None
    before, after = turned.outputs[0].shape, end.outputs[0].shape
    fits = before is not None and after is not None and len(after) == 3 and before[1] == after[1]
    return end if fits else None


def _transposed(value: ir.Value | None) -> ir.Value | None:
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Transpose" and _permutation(node) == _APART else None


def _shape_of(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "Reshape" else None


def _permutation(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else []


def _only(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _remove(graph: ir.Graph, node: ir.Node) -> None:
    """The node, and those before it whose values nothing reads any more."""
    makers = {value.producer() for value in node.inputs if value is not None}
    graph.remove(node, safe=True)
    for maker in makers - {None}:
        if maker is not None and not any(list(v.uses()) or v.is_graph_output() for v in maker.outputs):
            _remove(graph, maker)
