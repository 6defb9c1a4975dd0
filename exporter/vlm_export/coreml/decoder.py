"""The Core ML emitter of the language model's walk: MIL operations of fixed shapes, weights read layer by layer.

Values are MIL variables. Layout "plain" holds rows as (1, S, channels) and multiplies by matrices; layout "ane" holds
them as (1, channels, 1, S) and multiplies by 1×1 convolutions, as the Neural Engine likes it. Attention is the same
for both: heads (1, heads, S, head_dim), the queries of one KV head folded into rows, so that no key is repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vlm_export.coreml.sdk import coremltools
from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.grid import Grid
from vlm_models.language import Attention, Linear, Norm, Rows
from vlm_models.rope import cos_sin
from vlm_models.spec import LanguageSpec, RopeSpec
from vlm_quant.affine import widen

Layout = Literal["plain", "ane"]
KV = Literal["state", "io"]
Var = Any  # coremltools has no types

MASKED = -1e4  # added to a score that must not count; float16 holds sums of two of them
ANE_CHANNELS = 16384  # the Neural Engine takes no wider convolution: the head is written in pieces
_CHUNK = 8192  # rows of a weight converted at a time

# Activation → operation and its options.
ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "silu": ("silu", {}),
    "gelu": ("gelu", {"mode": "EXACT"}),
    "gelu_pytorch_tanh": ("gelu", {"mode": "TANH_APPROXIMATION"}),
    "gelu_new": ("gelu", {"mode": "TANH_APPROXIMATION"}),
    "relu": ("relu", {}),
}


@dataclass(frozen=True)
class Shape:
    """What one function is built for: `rows` S at a time in a cache of `context` C positions."""

    rows: int
    context: int
    layout: Layout
    kv: KV
    dtype: type[np.float16] | type[np.float32]


@dataclass(frozen=True)
class Inputs:
    """A function's inputs: position (1,) of the first row, causal_mask (1, 1, S, C), last_row (1,), and the caches.

    Caches are (layers, kv_heads, C, head_dim): states, or tensors with kv "io".
    """

    position: Var
    causal_mask: Var
    last_row: Var
    key_cache: Var
    value_cache: Var


class MilLanguage:
    """Implements `vlm_models.language.Emitter`; weights are named after the walk's layers."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: LanguageSpec,
        shape: Shape,
        inputs: Inputs,
        reached: Callable[[int], None],
    ) -> None:
        self.checkpoint, self.spec, self.shape, self.inputs = checkpoint, spec, shape, inputs
        self._mb = coremltools("converters.mil.mil").Builder
        self._reached = reached
        self._ane = shape.layout == "ane"
        self._caches = {"key": inputs.key_cache, "value": inputs.value_cache}
        if shape.kv == "state":
            self._caches = {kind: self._mb.read_state(input=state) for kind, state in self._caches.items()}
        self._new: dict[str, list[Var]] = {"key": [], "value": []}
        self._ropes: list[tuple[RopeSpec, tuple[Var, Var]]] = []
        self._masks = {0: inputs.causal_mask}
        self._places: dict[int, tuple[Var, Var]] = {}
        self._stop: Var = None
        self.layers: dict[str, tuple[str, Grid | None]] = {}  # constant → its layer and the grid of its rows

    def enter(self, inputs_embeds: Var) -> Var:
        """(1, S, H) as the layout holds it."""
        if not self._ane:
            return inputs_embeds
        return self._mb.expand_dims(x=self._mb.transpose(x=inputs_embeds, perm=[0, 2, 1]), axes=[2])

    def leave(self, logits: Var) -> Var:
        """The logits of one row as (1, vocab)."""
        return self._mb.reshape(x=logits, shape=[1, self.spec.vocab_size], name="logits")

    def new_rows(self) -> tuple[Var, Var]:
        """The keys and values (layers, kv_heads, S, head_dim) that this call adds at `position`."""
        keys, values = (self._mb.concat(values=rows, axis=0, name=f"new_{k}s") for k, rows in self._new.items())
        return keys, values

    def linears(self, x: Var, linears: Sequence[Linear]) -> tuple[Var, ...]:
        return tuple(self._linear(x, linear) for linear in linears)

    def rms_norm(self, x: Var, norm: Norm) -> Var:
        return self._norm(x, norm, axis=1 if self._ane else 2)

    def head_norm(self, x: Var, norm: Norm, heads: int) -> Var:
        rows = self.shape.rows
        split = [1, heads, norm.size, rows] if self._ane else [1, rows, heads, norm.size]
        normed = self._norm(self._mb.reshape(x=x, shape=split), norm, axis=2 if self._ane else 3)
        return self._mb.reshape(x=normed, shape=x.shape)

    def attention(self, q: Var, k: Var, v: Var, attention: Attention) -> Var:
        mb, a, rows, context = self._mb, attention, self.shape.rows, self.shape.context
        queries = self._rotate(self._heads(q, a.heads, a.head_dim), a)
        queries = mb.mul(x=queries, y=self._number(a.scale))  # before the product, which float16 might not hold
        keys = self._cached("key", self._rotate(self._heads(k, a.kv_heads, a.head_dim), a), a.layer)
        values = self._cached("value", self._heads(v, a.kv_heads, a.head_dim), a.layer)
        folded = a.heads // a.kv_heads * rows
        queries = mb.reshape(x=queries, shape=[1, a.kv_heads, folded, a.head_dim])
        scores = mb.matmul(x=queries, y=keys, transpose_y=True)
        if a.softcap:
            scores = self.softcap(scores, a.softcap)
        scores = mb.add(x=mb.reshape(x=scores, shape=[1, a.heads, rows, context]), y=self._mask(a.window))
        weights = mb.reshape(x=mb.softmax(x=scores, axis=-1), shape=[1, a.kv_heads, folded, context])
        out = mb.reshape(x=mb.matmul(x=weights, y=values), shape=[1, a.heads, rows, a.head_dim])
        self._reached(a.layer + 1)
        channels = a.heads * a.head_dim
        if self._ane:
            return mb.reshape(x=mb.transpose(x=out, perm=[0, 1, 3, 2]), shape=[1, channels, 1, rows])
        return mb.reshape(x=mb.transpose(x=out, perm=[0, 2, 1, 3]), shape=[1, rows, channels])

    def add(self, x: Var, y: Var) -> Var:
        return self._mb.add(x=x, y=y)

    def gate(self, gate: Var, up: Var, activation: str) -> Var:
        if activation not in ACTIVATIONS:
            raise CheckpointError(
                f"activation {activation!r} has no Core ML form: supported are {', '.join(ACTIVATIONS)}"
            )
        operation, options = ACTIVATIONS[activation]
        return self._mb.mul(x=getattr(self._mb, operation)(x=gate, **options), y=up)

    def last_row(self, x: Var) -> Var:
        """The row that `last_row` names: rows after it are padding."""
        return self._mb.gather(x=x, indices=self.inputs.last_row, axis=3 if self._ane else 1, validate_indices=False)

    def softcap(self, x: Var, cap: float) -> Var:
        capped = self._mb.tanh(x=self._mb.mul(x=x, y=self._number(1 / cap)))
        return self._mb.mul(x=capped, y=self._number(cap))

    def _linear(self, x: Var, linear: Linear) -> Var:
        if not self._ane:
            return self._mb.linear(x=x, **self._weights(linear, 0, linear.out_features, linear.name))
        pieces = -(-linear.out_features // ANE_CHANNELS)
        bounds = [linear.out_features * i // pieces for i in range(pieces + 1)]
        outs = []
        for i in range(pieces):
            name = linear.name if pieces == 1 else f"{linear.name}_{i}"
            weights = self._weights(linear, bounds[i], bounds[i + 1], name)
            outs.append(self._mb.conv(x=x, **weights))
        return outs[0] if pieces == 1 else self._mb.concat(values=outs, axis=1)

    def _weights(self, linear: Linear, start: int, stop: int, name: str) -> dict[str, Var]:
        """Matrix and bias of the rows start:stop of a linear layer as constants."""
        matrix = np.empty((stop - start, linear.in_features), self.shape.dtype)
        for low in range(start, stop, _CHUNK):
            high = min(low + _CHUNK, stop)
            matrix[low - start : high - start] = self._read(linear.weight, low, high)
        self.checkpoint.release(linear.weight.tensor)
        if self._ane:
            matrix = matrix[:, :, None, None]
        grid, first = self.checkpoint.grid(linear.weight.tensor), linear.weight.start
        rows = None if grid is None else grid.rows(first + start, first + stop)
        self.layers[f"{name}.weight".replace(".", "_")] = linear.name, rows
        constants = {"weight": self._constant(matrix, f"{name}.weight")}
        if linear.bias is not None:
            constants["bias"] = self._constant(self._read(linear.bias, start, stop), f"{name}.bias")
        return constants

    def _read(self, rows: Rows, start: int, stop: int, offset: float = 0.0) -> npt.NDArray[Any]:
        """Rows start:stop of `rows`, plus `offset`, in the function's type; refused where float16 cannot hold them."""
        wide = widen(self.checkpoint.rows(rows.tensor, rows.start + start, rows.start + stop)) + np.float32(offset)
        if self.shape.dtype is np.float16 and np.abs(wide).max() > np.finfo(np.float16).max:
            raise CheckpointError(f"tensor {rows.tensor!r} has weights beyond float16's 65504: export it at fp32")
        return wide.astype(self.shape.dtype)

    def _norm(self, x: Var, norm: Norm, axis: int) -> Var:
        """RMSNorm as the LayerNorm of (x, -x), whose mean is zero: squares of large channels stay inside the kernel."""
        weight = self._read(Rows(norm.tensor, 0, norm.size), 0, norm.size, norm.offset)
        gamma = self._constant(np.concatenate([weight, np.zeros_like(weight)]), f"{norm.name}.weight")
        twice = self._mb.concat(values=[x, self._mb.mul(x=x, y=self._number(-1.0))], axis=axis)
        normed = self._mb.layer_norm(x=twice, axes=[axis], gamma=gamma, epsilon=self._number(norm.eps))
        return self._mb.slice_by_size(x=normed, begin=[0] * len(x.shape), size=list(x.shape))

    def _heads(self, x: Var, heads: int, head_dim: int) -> Var:
        """(1, heads, S, head_dim)."""
        rows = self.shape.rows
        if self._ane:
            return self._mb.transpose(x=self._mb.reshape(x=x, shape=[1, heads, head_dim, rows]), perm=[0, 1, 3, 2])
        return self._mb.transpose(x=self._mb.reshape(x=x, shape=[1, rows, heads, head_dim]), perm=[0, 2, 1, 3])

    def _rotate(self, x: Var, attention: Attention) -> Var:
        """Half-split rotation of the rope's channels of (1, heads, S, head_dim): x · cos + swapped x · sin."""
        mb, (_, heads, rows, head_dim), half = self._mb, x.shape, attention.rope.dim // 2
        cos, sin = self._rope(attention)
        bounds = [(half, half), (0, half), (2 * half, head_dim - 2 * half)]
        parts = [mb.slice_by_size(x=x, begin=[0, 0, 0, at], size=[1, heads, rows, size]) for at, size in bounds if size]
        swapped = mb.concat(values=parts, axis=3)
        return mb.add(x=mb.mul(x=x, y=cos), y=mb.mul(x=swapped, y=sin))

    def _rope(self, attention: Attention) -> tuple[Var, Var]:
        """cos and sin (S, head_dim) of these rows; channels that do not rotate have 1 and 0, the first half's sin -."""
        for known, tables in self._ropes:
            if known == attention.rope:
                return tables
        cos, sin = cos_sin(attention.rope, self.shape.context)
        rest = np.ones((len(cos), attention.head_dim - 2 * cos.shape[1]), np.float32)
        baked = np.concatenate([cos, cos, rest], 1), np.concatenate([-sin, sin, 0 * rest], 1)
        begin = self._mb.concat(values=[self.inputs.position, _integers(0)], axis=0)
        size = [self.shape.rows, attention.head_dim]
        found: list[Var] = []
        for kind, table in zip(("cos", "sin"), baked, strict=True):
            constant = self._constant(table.astype(self.shape.dtype), f"rope.{len(self._ropes)}.{kind}")
            found.append(self._mb.slice_by_size(x=constant, begin=begin, size=size))
        self._ropes.append((attention.rope, (found[0], found[1])))
        return found[0], found[1]

    def _mask(self, window: int) -> Var:
        """(1, 1, S, C) to add to scores: the causal mask, and the positions that a window has left behind."""
        if window not in self._masks:
            mb, rows, context = self._mb, self.shape.rows, self.shape.context
            at = mb.add(x=np.arange(rows, dtype=np.int32).reshape(1, 1, rows, 1) - window, y=self.inputs.position)
            near = mb.greater(x=np.arange(context, dtype=np.int32).reshape(1, 1, 1, context), y=at)
            seen = mb.cast(x=near, dtype="fp16" if self.shape.dtype is np.float16 else "fp32")
            far = mb.mul(x=mb.sub(x=seen, y=self._number(1.0)), y=self._number(-MASKED))
            self._masks[window] = mb.minimum(x=self.inputs.causal_mask, y=far)
        return self._masks[window]

    def _cached(self, kind: str, rows: Var, layer: int) -> Var:
        """Write (1, kv_heads, S, head_dim) at `position` of a layer; all of the layer's positions, in the same type."""
        mb, kv_heads, head_dim = self._mb, self.spec.kv_heads, self.spec.head_dim
        whole = {"begin": [layer, 0, 0, 0], "size": [1, kv_heads, self.shape.context, head_dim]}
        begin, end = self._place(layer if self.shape.kv == "state" else 0)
        if self.shape.kv == "io":
            self._new[kind].append(rows)
            cache = mb.slice_by_size(x=self._caches[kind], **whole)
            return mb.slice_update(x=cache, update=rows, begin=begin, end=end)
        half = self.shape.dtype is np.float16  # states are float16 whatever the function computes in
        update = rows if half else mb.cast(x=rows, dtype="fp16")
        updated = mb.slice_update(x=self._caches[kind], update=update, begin=begin, end=end)
        source = self.inputs.key_cache if kind == "key" else self.inputs.value_cache
        self._caches[kind] = mb.coreml_update_state(state=source, value=updated)
        cached = mb.slice_by_size(x=self._caches[kind], **whole)
        return cached if half else mb.cast(x=cached, dtype="fp32")

    def _place(self, layer: int) -> tuple[Var, Var]:
        """First and last corner of these rows in a cache, which its keys and values share."""
        if layer not in self._places:
            mb, kv_heads, head_dim = self._mb, self.spec.kv_heads, self.spec.head_dim
            if self._stop is None:
                self._stop = mb.add(x=self.inputs.position, y=_integers(self.shape.rows))
            first = [_integers(layer, 0), self.inputs.position, _integers(0)]
            last = [_integers(layer + 1, kv_heads), self._stop, _integers(head_dim)]
            self._places[layer] = mb.concat(values=first, axis=0), mb.concat(values=last, axis=0)
        return self._places[layer]

    def _constant(self, value: npt.NDArray[Any], name: str) -> Var:
        return self._mb.const(val=value, name=name.replace(".", "_"))

    def _number(self, value: float) -> Any:
        return self.shape.dtype(value)


def _integers(*values: int) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)
