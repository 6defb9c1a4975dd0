"""The standard-ONNX emitter of the language model's walk, for TensorRT: strongly typed, attention as one operator.

TensorRT has fused attention for fp16 and bf16 and knows no soft cap: elsewhere attention is written out, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from vlm_export.onnx.graph import OPSET, Graph
from vlm_export.onnx.linear import Weight
from vlm_export.rules import kept_note
from vlm_export.target import Progress
from vlm_export.tensorrt.check_graph import write_check_graph
from vlm_export.tensorrt.linear import Linears, Ranges
from vlm_export.tensorrt.operators import rms_norm, rotate
from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.language import Attention, Linear, Norm, Rows, walk
from vlm_models.rope import cos_sin
from vlm_models.spec import LanguageSpec, RopeSpec, VLMSpec
from vlm_quant.affine import widen
from vlm_quant.recipe import Precision
from vlm_runtime.manifest import Part

KV = Literal["concat", "scatter"]
FOLDER, PART, HEAD = "tensorrt", "language_model", "lm_head"
PREFILL_CHUNK = 1024  # rows that one run takes at most: a picture and its question in one
_MASKED = float(np.finfo(np.float32).min)

# Activation → operator and its attributes; silu is written out.
ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "gelu": ("Gelu", {}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
}


def language_model(
    checkpoint: Checkpoint,
    spec: VLMSpec,
    precision: Precision,
    folder: Path,
    *,
    max_context: int,
    kv: KV,
    ranges: Ranges | None,
    progress: Progress,
    opset: Literal[21, 23] = 23,
) -> Part:
    """Write folder/language_model.onnx: embeddings (1, S, hidden) → float32 logits of the last row (1, vocab).

    `position` (1,) is how many rows the cache holds. "concat": past_{key,value}.l (1, kv_heads, P, head_dim) grow into
    present_{key,value}.l; "scatter", opset 24: {key,value}_cache.l and new_{key,value}_cache.l (1, kv_heads,
    max_context, head_dim) are meant to be the same memory, whose rows beyond the position are not seen but must be
    finite. Opset 21, for "concat" alone, has only operators that older TensorRT (JetPack 6) knows; not tried there.
    io["check_graph"] is the graph for ONNX Runtime where that cannot run this one. Raises RecipeError, CheckpointError.
    """
    language = spec.language
    assert kv == "concat" or opset == 23, "TensorScatter is of opset 24"
    with Graph(folder / f"{PART}.onnx", PART, 24 if kv == "scatter" else opset) as graph:
        emitter = TensorRTLanguage(graph, checkpoint, language, precision, max_context, kv, ranges, progress)
        emitter.finish(walk(language, emitter, emitter.begin()))
        graph.save({"vlm.fingerprint": spec.fingerprint, "vlm.part": PART})
    layers = emitter.linear_layers
    files = [f"{FOLDER}/{path.name}" for path in (graph.path, graph.data_path)]
    io: dict[str, Any] = {
        "kv": kv,
        "dtype": layers.compute,
        "layers": language.layers,
        "kv_heads": language.kv_heads,
        "head_dim": language.head_dim,
        "max_context": max_context,
        "prefill_chunk": min(PREFILL_CHUNK, max_context),
    }
    if layers.needs_check_graph:
        io["check_graph"] = f"{FOLDER}/{write_check_graph(graph.path).name}"
        files.append(io["check_graph"])
    details = {**layers.tally.details(), "data_bytes": graph.size, "io": io}
    details["notes"] = kept_note(PART, precision, layers.tally.kept)
    return Part(files[0], tuple(files), str(precision), details)


class TensorRTLanguage:
    """Implements `vlm_models.language.Emitter` on names of graph edges (1, S, channels)."""

    def __init__(
        self,
        graph: Graph,
        checkpoint: Checkpoint,
        spec: LanguageSpec,
        precision: Precision,
        max_context: int,
        kv: KV,
        ranges: Ranges | None,
        progress: Progress,
    ) -> None:
        self.graph, self.checkpoint, self.spec, self.max_context, self.kv = graph, checkpoint, spec, max_context, kv
        self.linear_layers = Linears(graph, precision, ranges)
        self._progress = progress
        self._ropes: list[tuple[RopeSpec, list[str]]] = []
        self._masks: dict[int, str] = {}

    def begin(self) -> str:
        """Declare the inputs; number the rows from `position` on."""
        graph = self.graph
        embeds = graph.input("inputs_embeds", self.linear_layers.onnx, (1, "rows", self.spec.hidden_size))
        graph.input("position", TensorProto.INT64, (1,))
        rows = self._count(embeds, 1, "rows")
        graph.node("Add", ["position", rows], "queries")  # (S,)
        return embeds

    def finish(self, logits: str) -> None:
        """Declare the logits, (1, vocab)."""
        self.graph.node("Reshape", [logits, self._shape(1, self.spec.vocab_size)], "logits")
        self.graph.output("logits", TensorProto.FLOAT, (1, self.spec.vocab_size))

    def linears(self, x: str, linears: Sequence[Linear]) -> tuple[str, ...]:
        return tuple(self._linear(x, linear) for linear in linears)

    def rms_norm(self, x: str, norm: Norm) -> str:
        weight = self._floats(Rows(norm.tensor, 0, norm.size)) + np.float32(norm.offset)
        scale = self.graph.tensor(f"{norm.name}.weight", weight)
        wide = self._wide(x, f"{norm.name}.wide")
        normed = rms_norm(self.graph, wide, scale, f"{norm.name}.normed", norm.eps)
        return self._narrow(normed, f"{norm.name}.out")

    def head_norm(self, x: str, norm: Norm, heads: int) -> str:
        rows = self.graph.node("Reshape", [x, self._shape(1, -1, heads, norm.size)], f"{norm.name}.heads")
        merged = self._shape(1, -1, heads * norm.size)
        return self.graph.node("Reshape", [self.rms_norm(rows, norm), merged], f"{norm.name}.merged")

    def attention(self, q: str, k: str, v: str, attention: Attention) -> str:
        a, layer = attention, f"layers.{attention.layer}.self_attn"
        queries = self._rotate(self._split(q, f"{layer}.q", a.heads, a.head_dim), f"{layer}.q.rotated", a.rope)
        keys = self._rotate(self._split(k, f"{layer}.k", a.kv_heads, a.head_dim), f"{layer}.k.rotated", a.rope)
        values = self._split(v, f"{layer}.v", a.kv_heads, a.head_dim)
        keys, values = (self._cached(rows, kind, a) for kind, rows in (("key", keys), ("value", values)))
        fused = self.graph.opset >= OPSET and self.linear_layers.compute != "fp32" and not a.softcap
        attend = self._fused if fused else self._written_out
        seen = attend(queries, keys, values, a, f"{layer}.seen")  # (1, heads, S, head_dim)
        turned = self.graph.node("Transpose", [seen], f"{layer}.turned", perm=[0, 2, 1, 3])
        self._progress(PART, a.layer + 1, self.spec.layers + 1)
        return self.graph.node("Reshape", [turned, self._shape(1, -1, a.heads * a.head_dim)], f"{layer}.attention")

    def add(self, x: str, y: str) -> str:
        return self.graph.node("Add", [x, y], f"{y}.sum")

    def gate(self, gate: str, up: str, activation: str) -> str:
        if activation == "silu":
            sigmoid = self.graph.node("Sigmoid", [gate], f"{gate}.sigmoid")
            active = self.graph.node("Mul", [gate, sigmoid], f"{gate}.active")
        elif activation in ACTIVATIONS:
            op, attributes = ACTIVATIONS[activation]
            active = self.graph.node(op, [gate], f"{gate}.active", **attributes)
        else:
            known = ", ".join(("silu", *ACTIVATIONS))
            raise CheckpointError(f"activation {activation!r} has no TensorRT form: supported are {known}")
        return self.graph.node("Mul", [active, up], f"{gate}.gated")

    def last_row(self, x: str) -> str:
        bounds = [
            self.graph.tensor(f"last.{key}", np.array([value], np.int64))
            for key, value in (("start", -1), ("end", np.iinfo(np.int64).max), ("axis", 1))
        ]
        return self.graph.node("Slice", [x, *bounds], f"{x}.last")

    def softcap(self, x: str, cap: float) -> str:
        bound = self.graph.tensor(f"{x}.cap", np.array(cap, np.float32))
        tanh = self.graph.node("Tanh", [self.graph.node("Div", [x, bound], f"{x}.ratio")], f"{x}.tanh")
        return self.graph.node("Mul", [tanh, bound], f"{x}.capped")

    def _linear(self, x: str, linear: Linear) -> str:
        rows, bias = linear.weight, None if linear.bias is None else self._floats(linear.bias)

        def read(start: int, stop: int) -> NDArray[Any]:
            return self.checkpoint.rows(rows.tensor, rows.start + start, rows.start + stop)

        grid = self.checkpoint.grid(rows.tensor)
        grid = None if grid is None else grid.rows(rows.start, rows.stop)
        weight = Weight(linear.name, linear.out_features, linear.in_features, read, bias, grid=grid)
        if linear.name == HEAD:
            out = self._wide(self.linear_layers.emit_head(x, weight, f"{linear.name}.out"), f"{linear.name}.wide")
        else:
            out = self.linear_layers.emit(x, weight, f"{linear.name}.out")
        self.checkpoint.release(rows.tensor)
        return out

    def _cached(self, rows: str, kind: str, a: Attention) -> str:
        """The layer's keys or values so far and the new ones after them: (1, kv_heads, T, head_dim)."""
        graph, dtype = self.graph, self.linear_layers.onnx
        if self.kv == "concat":
            past = graph.input(f"past_{kind}.{a.layer}", dtype, (1, a.kv_heads, "past", a.head_dim))
            graph.output(f"present_{kind}.{a.layer}", dtype, (1, a.kv_heads, "total", a.head_dim))
            return graph.node("Concat", [past, rows], f"present_{kind}.{a.layer}", axis=2)
        shape = (1, a.kv_heads, self.max_context, a.head_dim)
        cache = graph.input(f"{kind}_cache.{a.layer}", dtype, shape)
        graph.output(f"new_{kind}_cache.{a.layer}", dtype, shape)
        inputs = [cache, rows, "position"]
        return graph.node("TensorScatter", inputs, f"new_{kind}_cache.{a.layer}", axis=2, mode="linear")

    def _fused(self, q: str, k: str, v: str, a: Attention, out: str) -> str:
        return self.graph.node("Attention", [q, k, v, self._mask(k, a.window)], out, scale=float(a.scale))

    def _written_out(self, q: str, k: str, v: str, a: Attention, out: str) -> str:
        """Heads that share keys in a dimension of their own: (1, kv_heads, group, S, head_dim)."""
        graph, group = self.graph, a.heads // a.kv_heads
        axis = graph.tensor("axis.2", np.array([2], np.int64))
        scale = self.linear_layers.constant(f"{out}.scale", np.array(a.scale, np.float32))
        scaled = graph.node("Mul", [q, scale], f"{out}.scaled")
        q = graph.node("Reshape", [scaled, self._shape(1, a.kv_heads, group, -1, a.head_dim)], f"{out}.q")
        k5, v5 = (graph.node("Unsqueeze", [x, axis], f"{out}.{n}") for n, x in (("k", k), ("v", v)))
        turned = graph.node("Transpose", [k5], f"{out}.k.turned", perm=[0, 1, 2, 4, 3])
        scores = self._wide(graph.node("MatMul", [q, turned], f"{out}.products"), f"{out}.scores")
        if a.softcap:
            scores = self.softcap(scores, a.softcap)
        nothing = graph.tensor("masked", np.array(_MASKED, np.float32))
        masked = graph.node("Where", [self._mask(k, a.window), scores, nothing], f"{out}.masked")
        weights = self._narrow(graph.node("Softmax", [masked], f"{out}.softmax", axis=-1), f"{out}.weights")
        rows = graph.node("MatMul", [weights, v5], f"{out}.rows")
        return graph.node("Reshape", [rows, self._shape(1, a.heads, -1, a.head_dim)], out)

    def _mask(self, keys: str, window: int) -> str:
        """What each row sees, (1, 1, S, T): its own position and those before it in the window."""
        if window in self._masks:
            return self._masks[window]
        graph, name = self.graph, f"mask.{window}"
        if not self._masks:
            if self.kv == "concat":
                places = graph.node("Reshape", [self._count(keys, 2, "keys"), self._shape(1, 1, 1, -1)], "places")
            else:
                places = graph.tensor("places", np.arange(self.max_context, dtype=np.int64).reshape(1, 1, 1, -1))
            column = graph.node("Reshape", ["queries", self._shape(1, 1, -1, 1)], "queries.column")
            graph.node("Sub", [column, places], "distance")  # (1, 1, S, T)
        seen = graph.node("GreaterOrEqual", ["distance", self._number("zero", 0)], f"{name}.causal")
        if window:
            near = graph.node("Less", ["distance", self._number(f"window.{window}", window)], f"{name}.near")
            seen = graph.node("And", [seen, near], f"{name}.seen")
        self._masks[window] = seen
        return self._masks[window]

    def _rotate(self, x: str, out: str, rope: RopeSpec) -> str:
        cos, sin = self._rope(rope)
        return rotate(self.graph, x, cos, sin, out, rope.dim, self.spec.head_dim)

    def _rope(self, rope: RopeSpec) -> list[str]:
        """cos and sin of the rows' positions, (1, S, dim / 2), looked up once for all layers of this rope."""
        for known, names in self._ropes:
            if known == rope:
                return names
        names = [f"rope.{len(self._ropes)}.{kind}" for kind in ("cos", "sin")]
        axis = self.graph.tensor("axis.0", np.array([0], np.int64))
        for name, table in zip(names, cos_sin(rope, self.max_context), strict=True):
            tables = self.linear_layers.constant(f"{name}.table", table)
            rows = self.graph.node("Gather", [tables, "queries"], f"{name}.rows")
            self.graph.node("Unsqueeze", [rows, axis], name)
        self._ropes.append((rope, names))
        return names

    def _split(self, x: str, name: str, heads: int, head_dim: int) -> str:
        """(1, S, heads · head_dim) → (1, heads, S, head_dim)."""
        rows = self.graph.node("Reshape", [x, self._shape(1, -1, heads, head_dim)], f"{name}.heads")
        return self.graph.node("Transpose", [rows], f"{name}.split", perm=[0, 2, 1, 3])

    def _count(self, x: str, axis: int, name: str) -> str:
        """0, 1, 2, … as many as x is long along the axis."""
        size = self.graph.node("Shape", [x], f"{name}.size", start=axis, end=axis + 1)
        length = self.graph.node("Squeeze", [size], f"{name}.length")
        return self.graph.node("Range", [self._number("zero", 0), length, self._number("one", 1)], name)

    def _wide(self, x: str, out: str) -> str:
        """x in float32."""
        return x if self.linear_layers.compute == "fp32" else self.graph.node("Cast", [x], out, to=TensorProto.FLOAT)

    def _narrow(self, x: str, out: str) -> str:
        """float32 back to the type of the graph."""
        layers = self.linear_layers
        return x if layers.compute == "fp32" else self.graph.node("Cast", [x], out, to=layers.onnx)

    def _shape(self, *sizes: int) -> str:
        return self.graph.tensor(f"shape.{'.'.join(map(str, sizes))}", np.array(sizes, np.int64))

    def _number(self, name: str, value: int) -> str:
        return self.graph.tensor(name, np.array(value, np.int64))

    def _floats(self, rows: Rows) -> NDArray[np.float32]:
        return widen(self.checkpoint.rows(rows.tensor, rows.start, rows.stop))
