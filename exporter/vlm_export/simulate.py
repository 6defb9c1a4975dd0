"""A recipe tried out without a target: weights rounded and widened again, and what int8 and int4 products are given.

Weights are rounded as target onnx stores them: int8 a row, int4 in groups with zero points, the head at 8 bits in
groups unless a rule says otherwise. With `activations` the inputs of rounded layers are rounded as its kernels do: to
int8, a scale a row for int8 weights, a scale a group for grouped ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlm_models.checkpoint import Checkpoint, Stored
from vlm_models.errors import RecipeError
from vlm_models.grid import Grid
from vlm_models.language import Attention, Linear, Norm, walk
from vlm_models.model import Model
from vlm_models.spec import LanguageSpec
from vlm_models.torch_language import TorchLanguage
from vlm_models.vision import Encoder
from vlm_quant.affine import (
    dequantize_int4,
    dequantize_int8,
    dequantize_int8_groups,
    quantize_int4,
    quantize_int8,
    quantize_int8_groups,
    widen,
)
from vlm_quant.grid import regrouped
from vlm_quant.recipe import WORDS, Precision, Recipe

HEAD, EMBEDDING = "lm_head", "language_model.embed_tokens.weight"
HEAD_GROUP = 128  # columns that share a scale of the 8-bit head
_CHUNK = 4096  # rows rounded at a time

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Rounding:
    """How one matrix is stored: bits of a weight, and the columns that share a scale (0: a whole row)."""

    bits: int
    group: int = 0


def rounding(precision: Precision, layer: str) -> Rounding:
    """What `precision` makes of a layer. Raises RecipeError for a type that only one target knows."""
    rule = precision.rule(layer)
    chosen = rule or precision
    if chosen.format:
        raise RecipeError(
            f"precision {chosen.format!r} cannot be tried without its target: choose of {', '.join(WORDS)}, int4:g64"
        )
    if chosen.weights == "int4":
        grouped = layer == HEAD and rule is None
        return Rounding(8, HEAD_GROUP) if grouped else Rounding(4, chosen.group_size)
    if chosen.weights == "int8":
        return Rounding(8, HEAD_GROUP if layer == HEAD else 0)
    return Rounding({"fp32": 32, "fp16": 16}[chosen.weights])


def simulate(model: Model, recipe: Recipe, *, activations: bool = True, folder: Path | None = None) -> Model:
    """The model that a bundle of `recipe` holds, in float32.

    A tied table is taken apart: its rows are looked up as they are, as head they are rounded. Weights that a quantizer
    has put on a fitting grid stay as they are. With `folder` the rounded weights are memory-mapped files there, which
    must outlive the model; else they are in memory.
    """
    return Simulated(model, recipe, activations, folder)


class Simulated(Model):
    """See `simulate`."""

    def __init__(self, model: Model, recipe: Recipe, activations: bool, folder: Path | None) -> None:
        spec = replace(model.spec, language=replace(model.spec.language, tied=False))
        checkpoint = model.checkpoint
        tensors = {
            **checkpoint.tensors,
            **dict(_decoder(checkpoint, model.spec.language, recipe.language, folder)),
            **dict(_table(checkpoint, recipe.embedding, folder)),
            **dict(_modules(checkpoint, "vision_tower.", model.vision_encoder().tower, recipe.vision, folder)),
            **dict(_modules(checkpoint, "multi_modal_projector.", model.projector(), recipe.projector, folder)),
        }
        super().__init__(replace(checkpoint, tensors=tensors), spec)
        self.recipe, self.activations = recipe, activations

    @functools.cached_property
    def _vision_encoder(self) -> Encoder:
        return self._hooked(super()._vision_encoder, self.recipe.vision)

    @functools.cached_property
    def _projector(self) -> nn.Module:
        return self._hooked(super()._projector, self.recipe.projector)

    def language_model(self, *, keep: bool = True) -> TorchLanguage:
        return RoundedLanguage(self.checkpoint, self.spec.language, activation_precision(self), keep=keep)

    def _hooked(self, module: M, precision: Precision) -> M:
        for name, layer in linear_modules(module) if self.activations else ():
            kind = rounding(precision, name)
            if kind.bits < 16:
                layer.register_forward_pre_hook(lambda _, given, kind=kind: (rounded(given[0], kind), *given[1:]))
        return module


class RoundedLanguage(TorchLanguage):
    """The decoder whose rounded layers are given rounded rows."""

    def __init__(self, checkpoint: Checkpoint, spec: LanguageSpec, precision: Precision, *, keep: bool) -> None:
        super().__init__(checkpoint, spec, keep=keep)
        self._precision = precision

    def linears(self, x: Tensor, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
        kinds = [rounding(self._precision, linear.name) for linear in linears]
        given = {kind: rounded(x, kind) for kind in set(kinds)}
        return tuple(self._linear(given[kind], linear) for kind, linear in zip(kinds, linears, strict=True))


def activation_precision(model: Model) -> Precision:
    """By which the rows that the decoder's layers are given are rounded: fp32 for a checkpoint's own."""
    if isinstance(model, Simulated) and model.activations:
        return model.recipe.language
    return Precision("fp32")


def rounded(x: Tensor, kind: Rounding) -> Tensor:
    """x (…, channels) to int8 and back, by the largest magnitude of each row or group; as it is for float weights."""
    if kind.bits > 8:
        return x
    if not kind.group:
        return _to_int8(x)
    whole = nn.functional.pad(x, (0, -x.shape[-1] % kind.group))
    return _to_int8(whole.reshape(*x.shape[:-1], -1, kind.group)).flatten(-2)[..., : x.shape[-1]]


def decoder_linears(spec: LanguageSpec) -> list[Linear]:
    """Every linear layer of the decoder, in the order of the walk; the head comes last."""
    found = _Linears()
    walk(spec, found, None)
    return found.found


def _to_int8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, (x / scale).round() * scale, x)


def _decoder(
    checkpoint: Checkpoint, spec: LanguageSpec, precision: Precision, folder: Path | None
) -> Iterator[tuple[str, Stored]]:
    """The matrices that change; fused ones whole, though their row ranges may differ in precision."""
    parts: dict[str, list[Linear]] = {}
    for linear in decoder_linears(spec):
        parts.setdefault(linear.weight.tensor, []).append(linear)
    for name, linears in parts.items():
        kinds = [rounding(precision, linear.name) for linear in linears]
        target = "lm_head.weight" if name == EMBEDDING else name
        if all(_exact(kind, checkpoint.dtype(name)) for kind in kinds):
            if target != name:
                yield target, checkpoint.tensors[name]
            continue
        out = _room(checkpoint.shape(name), target, folder)
        for linear, kind in zip(linears, kinds, strict=True):
            start, stop = linear.weight.start, linear.weight.stop
            _round(checkpoint, name, start, stop, kind, out[start:stop])
        checkpoint.release(name)
        yield target, Stored("F32", out)


def _table(checkpoint: Checkpoint, precision: Precision | None, folder: Path | None) -> Iterator[tuple[str, Stored]]:
    """The rows that are looked up, where they are rounded."""
    if precision is not None:
        out = _room(checkpoint.shape(EMBEDDING), EMBEDDING, folder)
        _round(checkpoint, EMBEDDING, 0, len(out), Rounding(8), out)
        checkpoint.release(EMBEDDING)
        yield EMBEDDING, Stored("F32", out)


def _modules(
    checkpoint: Checkpoint, prefix: str, module: nn.Module, precision: Precision, folder: Path | None
) -> Iterator[tuple[str, Stored]]:
    for layer, _ in linear_modules(module):
        name, kind = f"{prefix}{layer}.weight", rounding(precision, layer)
        if name in checkpoint and not _exact(kind, checkpoint.dtype(name)):
            out = _room(checkpoint.shape(name), name, folder)
            _round(checkpoint, name, 0, len(out), kind, out)
            yield name, Stored("F32", out)


def linear_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear))


def _exact(kind: Rounding, dtype: str) -> bool:
    return kind.bits == 32 or (kind.bits == 16 and dtype == "F16")


def _room(shape: tuple[int, ...], name: str, folder: Path | None) -> NDArray[np.float32]:
    if folder is None:
        return np.empty(shape, np.float32)
    return np.memmap(folder / f"{name}.f32", np.float32, "w+", shape=shape)


def _round(checkpoint: Checkpoint, name: str, start: int, stop: int, kind: Rounding, out: NDArray[np.float32]) -> None:
    """Rows start:stop of a tensor, rounded and widened again, into `out`."""
    for first in range(start, stop, _CHUNK):
        last = min(first + _CHUNK, stop)
        rows = checkpoint.rows(name, first, last)
        fits = _fits(checkpoint.grid(name), kind, rows.shape[1])
        out[first - start : last - start] = widen(rows) if fits else _nearest(rows, kind)


def _fits(grid: Grid | None, kind: Rounding, columns: int) -> bool:
    """Whether packing keeps a quantizer's integers."""
    return grid is not None and grid.bits == kind.bits and regrouped(grid, kind.group or columns, columns) is not None


def _nearest(rows: NDArray[Any], kind: Rounding) -> NDArray[np.float32]:
    columns = rows.shape[1]
    if kind.bits == 16:
        return widen(widen(rows).astype(np.float16))
    if kind.bits == 4:
        return dequantize_int4(quantize_int4(rows, kind.group), columns)
    if kind.group:
        return dequantize_int8_groups(quantize_int8_groups(rows, kind.group), columns)
    return dequantize_int8(quantize_int8(rows))


class _Linears:
    """An emitter that writes down the linear layers."""

    def __init__(self) -> None:
        self.found: list[Linear] = []

    def linears(self, x: None, linears: Sequence[Linear]) -> tuple[None, ...]:
        self.found += linears
        return (None,) * len(linears)

    def rms_norm(self, x: None, norm: Norm) -> None:
        return None

    def head_norm(self, x: None, norm: Norm, heads: int) -> None:
        return None

    def attention(self, q: None, k: None, v: None, attention: Attention) -> None:
        return None

    def add(self, x: None, y: None) -> None:
        return None

    def gate(self, gate: None, up: None, activation: str) -> None:
        return None

    def last_row(self, x: None) -> None:
        return None

    def softcap(self, x: None, cap: float) -> None:
        return None
