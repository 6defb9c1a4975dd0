"""The ONNX Runtime emitter of the language model's walk: fused attention, norms and matmuls, few nodes.

Projections stay unwritten until something reads them, so that the reader can choose: three that go into attention
become one packed matmul. A sum and its norm stay apart: SkipSimplifiedLayerNormalization takes twice their time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from vlm_export.onnx.block import block_attention
from vlm_export.onnx.graph import MICROSOFT, Graph
from vlm_export.onnx.linear import Linears, Weight
from vlm_export.target import Progress
from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.grid import Grid
from vlm_models.language import Attention, Linear, Norm, Rows
from vlm_models.rope import cos_sin
from vlm_models.spec import LanguageSpec, RopeSpec
from vlm_quant.affine import widen
from vlm_quant.recipe import Precision

FLOAT = TensorProto.FLOAT
HEAD = "lm_head"


@dataclass
class Edge:
    """A written value: the name of a graph edge (1, S, channels)."""

    name: str


@dataclass
class Projection:
    """A linear layer not yet written; `group` holds all that were asked for together."""

    x: str
    linear: Linear
    group: Sequence[Linear]
    edge: str = ""


Value = Edge | Projection

# Activation → operator, domain, attributes. QuickGelu is x · sigmoid(alpha x), FastGelu the tanh form.
ACTIVATIONS: dict[str, tuple[str, str, dict[str, float]]] = {
    "silu": ("QuickGelu", MICROSOFT, {"alpha": 1.0}),
    "gelu": ("Gelu", MICROSOFT, {}),
    "gelu_pytorch_tanh": ("FastGelu", MICROSOFT, {}),
    "gelu_new": ("FastGelu", MICROSOFT, {}),
    "relu": ("Relu", "", {}),
}


class OnnxLanguage:
    """Implements `vlm_models.language.Emitter`; names are those of the walk's layers."""

    def __init__(
        self,
        graph: Graph,
        checkpoint: Checkpoint,
        spec: LanguageSpec,
        precision: Precision,
        max_context: int,
        progress: Progress,
        *,
        web: bool = False,
    ) -> None:
        self.graph, self.checkpoint, self.spec, self.max_context = graph, checkpoint, spec, max_context
        self.linear_layers = Linears(graph, precision, web=web)
        self._progress = progress
        self._ropes: list[tuple[RopeSpec, tuple[str, str]]] = []

    def linears(self, x: Value, linears: Sequence[Linear]) -> tuple[Value, ...]:
        source = self._read(x)
        return tuple(Projection(source, linear, linears) for linear in linears)

    def rms_norm(self, x: Value, norm: Norm) -> Value:
        inputs = [self._read(x), self._norm_weight(norm)]
        return Edge(self.graph.node("RMSNormalization", inputs, f"{norm.name}.out", axis=-1, epsilon=norm.eps))

    def head_norm(self, x: Value, norm: Norm, heads: int) -> Value:
        out = f"{norm.name}.out"
        split = self.graph.tensor(f"shape.{norm.size}", np.array([1, -1, norm.size], np.int64))
        merge = self.graph.tensor(f"shape.{heads * norm.size}", np.array([1, -1, heads * norm.size], np.int64))
        rows = self.graph.node("Reshape", [self._read(x), split], f"{norm.name}.heads")
        inputs = [rows, self._norm_weight(norm)]
        normed = self.graph.node("RMSNormalization", inputs, f"{norm.name}.normed", axis=-1, epsilon=norm.eps)
        return Edge(self.graph.node("Reshape", [normed, merge], out))

    def attention(self, q: Value, k: Value, v: Value, attention: Attention) -> Value:
        layer, a = f"layers.{attention.layer}.self_attn", attention
        past = [f"past_key_values.{a.layer}.{kind}" for kind in ("key", "value")]
        present = [f"present.{a.layer}.{kind}" for kind in ("key", "value")]
        shape = (1, a.kv_heads, self.max_context, a.head_dim)
        for name in past:
            self.graph.input(name, FLOAT, shape)
        for name in present:
            self.graph.output(name, FLOAT, shape)
        packed = _untouched(q, k, v) if self.spec.both_ways == "none" else None
        if packed is not None and self._alike(packed.group):
            qkv = [self._write(packed.x, packed.group, f"{layer}.qkv_proj"), "", ""]
        else:
            qkv = [self._read(q), self._read(k), self._read(v)]
        both = self.spec.both_ways != "none"
        out = f"{layer}.causal" if both else f"{layer}.attention"
        inputs = [*qkv, *past, "seqlens_k", "total_sequence_length", *self._rope(a.rope)]
        self.graph.node(
            "GroupQueryAttention",
            inputs,
            [out, *present],
            MICROSOFT,
            num_heads=a.heads,
            kv_num_heads=a.kv_heads,
            scale=float(a.scale),
            softcap=float(a.softcap),
            local_window_size=a.window or -1,
            do_rotary=1,
            rotary_interleaved=0,
        )
        if both:
            block_attention(self.graph, qkv[0], out, a, self._rope(a.rope), self.spec.both_ways)
        self._progress("language_model", a.layer + 1, self.spec.layers + 1)
        return Edge(f"{layer}.attention")

    def add(self, x: Value, y: Value) -> Value:
        term = self._read(y)
        return Edge(self.graph.node("Add", [self._read(x), term], f"{term}.sum"))

    def gate(self, gate: Value, up: Value, activation: str) -> Value:
        if activation not in ACTIVATIONS:
            raise CheckpointError(f"activation {activation!r} has no ONNX form: supported are {', '.join(ACTIVATIONS)}")
        op, domain, attributes = ACTIVATIONS[activation]
        name = self._read(gate)
        active = self.graph.node(op, [name], f"{name}.active", domain, **attributes)
        return Edge(self.graph.node("Mul", [active, self._read(up)], f"{name}.gated"))

    def last_row(self, x: Value) -> Value:
        self.linear_layers.rows_change()
        return Edge(self._last(self._read(x)))

    def softcap(self, x: Value, cap: float) -> Value:
        name = self._read(x)
        bound = self.graph.tensor(f"{name}.cap", np.array(cap, np.float32))
        ratio = self.graph.node("Div", [name, bound], f"{name}.ratio")
        tanh = self.graph.node("Tanh", [ratio], f"{name}.tanh")
        return Edge(self.graph.node("Mul", [tanh, bound], f"{name}.capped"))

    def finish(self, logits: Value) -> None:
        """Declare the graph's other inputs and its logits, (1, 1, vocab)."""
        self.graph.node("Identity", [self._read(logits)], "logits")
        self.graph.output("logits", FLOAT, (1, 1, self.spec.vocab_size))

    def _read(self, value: Value) -> str:
        if isinstance(value, Projection):
            if not value.edge:
                value.edge = self._write(value.x, [value.linear], value.linear.name)
            return value.edge
        return value.name

    def _write(self, x: str, linears: Sequence[Linear], name: str) -> str:
        """One linear layer of all the rows."""
        emit = self.linear_layers.emit_head if name == HEAD else self.linear_layers.emit
        out = emit(x, self._weight(linears, name), f"{name}.out")
        for linear in linears:
            self.checkpoint.release(linear.weight.tensor)
        return out

    def _weight(self, linears: Sequence[Linear], name: str) -> Weight:
        biases = [self._floats(linear.bias) for linear in linears if linear.bias is not None]
        bias = np.concatenate(biases) if biases else None
        rows = sum(linear.out_features for linear in linears)

        def read(start: int, stop: int) -> NDArray[np.generic]:
            parts, offset = [], 0
            for linear in linears:
                low, high = max(start - offset, 0), min(stop - offset, linear.out_features)
                if low < high:
                    first = linear.weight.start
                    parts.append(self.checkpoint.rows(linear.weight.tensor, first + low, first + high))
                offset += linear.out_features
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        grids = [self._grid(linear) for linear in linears]
        return Weight(name, rows, linears[0].in_features, read, bias, linears[0].name, _joined(grids))

    def _alike(self, linears: Sequence[Linear]) -> bool:
        """Whether layers can be one matrix: of one precision, and on grids of one form."""
        precisions = {self.linear_layers.precision.at(linear.name) for linear in linears}
        grids = [self._grid(linear) for linear in linears]
        return len(precisions) == 1 and (_joined(grids) is not None or grids == [None] * len(grids))

    def _grid(self, linear: Linear) -> Grid | None:
        grid = self.checkpoint.grid(linear.weight.tensor)
        return None if grid is None else grid.rows(linear.weight.start, linear.weight.stop)

    def _norm_weight(self, norm: Norm) -> str:
        weight = self._floats(Rows(norm.tensor, 0, norm.size)) + np.float32(norm.offset)
        return self.graph.tensor(f"{norm.name}.weight", weight)

    def _floats(self, rows: Rows) -> NDArray[np.float32]:
        return widen(self.checkpoint.rows(rows.tensor, rows.start, rows.stop))

    def _rope(self, rope: RopeSpec) -> tuple[str, str]:
        for known, names in self._ropes:
            if known == rope:
                return names
        names = (f"rope.{len(self._ropes)}.cos", f"rope.{len(self._ropes)}.sin")
        for name, table in zip(names, cos_sin(rope, self.max_context), strict=True):
            self.graph.tensor(name, table)
        self._ropes.append((rope, names))
        return names

    def _last(self, name: str) -> str:
        """The last row of (1, S, channels)."""
        bounds = [
            self.graph.tensor(f"last.{key}", np.array([value], np.int64))
            for key, value in (("start", -1), ("end", np.iinfo(np.int64).max), ("axis", 1))
        ]
        return self.graph.node("Slice", [name, *bounds], f"{name}.last")


def _joined(grids: Sequence[Grid | None]) -> Grid | None:
    """One grid of all rows; None where one is missing or of another form."""
    first, found = grids[0], [grid for grid in grids if grid is not None]
    forms = {(grid.bits, grid.group_size, grid.zeros is None) for grid in found}
    if first is None or len(found) < len(grids) or len(forms) > 1:
        return None
    zeros = None if first.zeros is None else np.concatenate([grid.zeros for grid in found if grid.zeros is not None])
    return replace(first, scales=np.concatenate([grid.scales for grid in found]), zeros=zeros)


def _untouched(*values: Value) -> Projection | None:
    """The group's first projection where `values` are exactly one group, none of it written yet."""
    first = values[0]
    if not isinstance(first, Projection) or len(values) != len(first.group):
        return None
    same = [isinstance(v, Projection) and v.group is first.group and not v.edge for v in values]
    return first if all(same) else None
