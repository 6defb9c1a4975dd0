"""Scales and integers decided layer by layer, each on inputs that the layers before it, already rounded, give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_export.overlay import Float, Overlay
from vlm_export.streaming import Rows
from vlm_models.errors import CheckpointError
from vlm_models.grid import Grid
from vlm_models.language import Linear
from vlm_models.language import Rows as Range
from vlm_models.spec import LanguageSpec
from vlm_quant.awq import Scaling, search_scales
from vlm_quant.gptq import quantize_gptq
from vlm_quant.grouped import Form, Grouped, dequantize_grouped
from vlm_quant.smoothquant import search_smoothing

_KEPT = 1 << 30  # bytes of a layer's inputs that are kept rather than computed twice
_SAMPLED = 512  # rows on which scales are tried and errors measured
_TOGETHER = 4096  # rows multiplied at once


@dataclass(frozen=True)
class Seen:
    """What some linear layers are given: sum of xᵀx, mean and largest |x|, some rows; and x itself, to go on with."""

    hessian: Float
    magnitude: Float
    largest: Float
    sampled: Float
    rows: Rows


def see(x: Rows, count: int, columns: int, *, products: bool) -> Seen:
    """All inputs of `count` sequences, one after the other; the sum of xᵀx is left empty without `products`."""
    hessian = np.zeros((columns, columns) if products else (0, 0), np.float32)
    magnitude, largest, total = torch.zeros(columns, dtype=torch.float64), torch.zeros(columns), 0
    sampled: list[Tensor] = []
    kept: list[Tensor] = []
    waiting: list[Tensor] = []
    for i in range(count):
        rows = x(i)
        size = rows.abs()
        magnitude += size.sum(0)
        largest = torch.maximum(largest, size.amax(0))
        sampled.append(rows[:: max(1, -(-len(rows) * count // _SAMPLED))].clone())
        total += len(rows)
        if total * columns * 4 <= _KEPT:
            kept.append(rows)
        waiting.append(rows)
        if sum(map(len, waiting)) >= _TOGETHER or i == count - 1:
            together = torch.cat(waiting).numpy()
            waiting.clear()
            if products:
                hessian += together.T @ together
    mean = (magnitude / total).float().numpy()
    go_on = Rows(lambda i: kept[i] if i < len(kept) else x(i))
    return Seen(hessian, mean, largest.numpy(), torch.cat(sampled).numpy(), go_on)


class Rounding:
    """Decides the linear layers of a walk as they come; `inputs` is what `stream` calls.

    `steps` are of "awq", "gptq" (int4 and int8 layers) and "smoothquant" (layers whose inputs are rounded). `record`
    holds numbers by layer: the squared output error that is left, of 1 for outputs all zero, and of scales the power.
    """

    def __init__(
        self,
        overlay: Overlay,
        spec: LanguageSpec,
        form: Callable[[Linear], Form | None],
        steps: frozenset[str],
        count: int,
    ) -> None:
        self._overlay, self._spec, self._form, self._steps, self._count = overlay, spec, form, steps, count
        self._before: dict[str, Linear] = {}  # the layer's own: v and up, whose rows can be scaled, among them
        self.record: dict[str, dict[str, Any]] = {}

    def inputs(self, x: Rows, linears: Sequence[Linear]) -> Rows:
        """Decide `linears`; gives the x that they are to read."""
        first = linears[0].name
        if first == "lm_head" or first.endswith("q_proj"):
            self._overlay.flush()
        if first == "lm_head":  # the packer's own
            return x
        self._before.update({linear.name.rsplit(".", 1)[1]: linear for linear in linears})
        forms = [self._form(linear) for linear in linears]
        if not any(forms):
            return x
        gptq = "gptq" in self._steps
        seen = see(x, self._count, linears[0].in_features, products=gptq)
        if not (np.isfinite(seen.largest).all() and np.isfinite(seen.hessian).all()):
            folder = self._overlay.checkpoint.folder
            raise CheckpointError(f"{folder}: calibration gives {first!r} inputs beyond float32: a damaged weight?")
        matrices = [self._overlay.floats(linear.weight) for linear in linears]
        scales = self._scales(linears, forms, matrices, seen)
        rows, sampled = seen.rows, seen.sampled
        if scales is not None:
            rows = _over(rows, scales)
            sampled = sampled / scales
            if gptq:  # in place, since it may take a gigabyte
                seen.hessian[...] /= scales
                seen.hessian[...] /= scales[:, None]
            matrices = [matrix * scales for matrix in matrices]
        self._round(linears, forms, matrices, seen.hessian, sampled, scaled=scales is not None)
        return rows

    def _scales(
        self, linears: Sequence[Linear], forms: Sequence[Form | None], matrices: Sequence[Float], seen: Seen
    ) -> Float | None:
        """What x is divided by (in_features,), the layer before it already divided; None where nothing is better."""
        fours = [(m, f) for m, f in zip(matrices, forms, strict=True) if f is not None and f.bits == 4]
        eights = [(m, f) for m, f in zip(matrices, forms, strict=True) if f is not None and f.inputs]
        source = self._source(linears[0])
        scaling: Scaling | None = None
        if fours and "awq" in self._steps:
            scaling = search_scales(fours, seen.sampled, seen.magnitude, source)
        elif eights and not fours and "smoothquant" in self._steps:
            whole = any(form.inputs == "tensor" for _, form in eights)
            scaling = search_smoothing([m for m, _ in eights], seen.sampled, seen.largest, source, whole=whole)
        if scaling is None or scaling.power == 0:
            return None
        for linear in linears:
            self.record.setdefault(linear.name, {})["power"] = round(scaling.power, 3)
        self._divide(linears[0], scaling.scales)
        return scaling.scales[source]

    def _source(self, linear: Linear) -> NDArray[np.int64]:
        """For each column, the channel of the norm or layer before that it comes from: heads share those of v."""
        columns = np.arange(linear.in_features)
        if not linear.name.endswith(".o_proj"):
            return columns
        size, repeat = self._spec.head_dim, self._spec.heads // self._spec.kv_heads
        return columns // size // repeat * size + columns % size

    def _divide(self, linear: Linear, scales: Float) -> None:
        """Divide what `linear` reads, where it is made: by a norm's weight, or the rows of v or up."""
        block, name = linear.name.rsplit(".", 1)
        if name in ("o_proj", "down_proj"):
            before = self._before["v_proj" if name == "o_proj" else "up_proj"]
            for rows in (before.weight, before.bias):
                if rows is not None:
                    self._overlay.divide(rows, scales)
            return
        layer = block.rsplit(".", 1)[0]
        after = "pre_feedforward_layernorm" if self._spec.post_norms else "post_attention_layernorm"
        norm = f"language_model.{layer}.{'input_layernorm' if name == 'q_proj' else after}.weight"
        offset = np.float32(self._spec.norm_offset)
        weight = self._overlay.floats(Range(norm, 0, len(scales)))
        self._overlay.put(norm, (weight + offset) / scales - offset)

    def _round(
        self,
        linears: Sequence[Linear],
        forms: Sequence[Form | None],
        matrices: Sequence[Float],
        hessian: Float,
        rows: Float,
        *,
        scaled: bool,
    ) -> None:
        """Put what was decided into the overlay, stored tensor by stored tensor: fused ones hold several layers."""
        decided: list[tuple[Float, Grouped | None]] = [(matrix, None) for matrix in matrices]
        for form in dict.fromkeys(forms) if "gptq" in self._steps else ():
            same = [i for i, other in enumerate(forms) if other == form and other is not None]
            if form is not None:  # rows do not touch each other: layers of one form are one matrix
                whole = quantize_gptq(np.concatenate([matrices[i] for i in same]), hessian, form)
                for i, part in zip(same, _split(whole, [len(matrices[i]) for i in same]), strict=True):
                    values = dequantize_grouped(part)
                    error = _error(values - matrices[i], matrices[i], rows)
                    self.record.setdefault(linears[i].name, {})["error"] = error
                    decided[i] = values, part
        for tensor in dict.fromkeys(linear.weight.tensor for linear in linears):
            mine = [d for linear, d in zip(linears, decided, strict=True) if linear.weight.tensor == tensor]
            groups = [grouped for _, grouped in mine if grouped is not None]
            if scaled or groups:
                self._overlay.put(tensor, np.concatenate([values for values, _ in mine]), _grid(groups, len(mine)))


def _split(whole: Grouped, rows: Sequence[int]) -> Iterator[Grouped]:
    """The row ranges of some layers."""
    start = 0
    for count in rows:
        part = slice(start, start := start + count)
        zeros = None if whole.zeros is None else whole.zeros[part]
        yield replace(whole, integers=whole.integers[part], scales=whole.scales[part], zeros=zeros)


def _grid(groups: Sequence[Grouped], layers: int) -> Grid | None:
    """That of a stored tensor, where all layers in it stand on grids of one form."""
    if len(groups) != layers or len({(g.group_size, g.integers.dtype, g.zeros is None, g.bits) for g in groups}) != 1:
        return None
    scales = np.concatenate([g.scales for g in groups])
    zeros = None if groups[0].zeros is None else np.concatenate([g.zeros for g in groups if g.zeros is not None])
    return Grid(groups[0].bits, groups[0].group_size, scales, zeros)


def _over(x: Rows, scales: Float) -> Rows:
    divisor = torch.from_numpy(scales)
    return Rows(lambda i: x(i) / divisor)


def _error(change: Float, matrix: Float, rows: Float) -> float:
    """Squared change of the outputs on some rows, relative to the outputs."""
    lost, whole = (float(np.square(rows @ m.T, dtype=np.float64).sum()) for m in (change, matrix))
    return lost / (whole or 1.0)
