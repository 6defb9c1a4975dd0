"""Many short sequences through a decoder at once: their rows in one matrix, the first rows of a picture shared.

A matrix product over all rows is many times as fast as one for each sequence. The decoder can begin at a later layer,
from the states that another run has left, so that a change in the last layers costs the last layers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_export.simulate import RoundedLanguage
from vlm_models.checkpoint import Checkpoint
from vlm_models.language import Attention, Linear, Norm, walk
from vlm_models.spec import LanguageSpec
from vlm_models.torch_language import rotate
from vlm_quant.recipe import Precision


@dataclass(frozen=True)
class Span:
    """Rows start:stop of the matrix, which come after the rows context:context + start of their sequence."""

    start: int
    stop: int
    context: tuple[int, int]


@dataclass(frozen=True)
class Packed:
    """Rows (R, H) with their positions (R,); `read` (N,) are those whose logits are wanted."""

    embeds: Tensor
    positions: Tensor
    spans: tuple[Span, ...]
    read: Tensor


def pack(sequences: Sequence[Tensor], reads: Sequence[range], groups: Sequence[int]) -> Packed:
    """Sequences (S, H) of which rows `reads` are read; those of one group, in a row, share the rows that are equal.

    Rows after the last that is read are left out.
    """
    rows, positions, spans, read, at = list[Tensor](), list[Tensor](), list[Span](), list[int](), 0

    def put(sequence: Tensor, start: int, stop: int, context: tuple[int, int]) -> int:
        nonlocal at
        rows.append(sequence[start:stop])
        positions.append(torch.arange(start, stop))
        spans.append(Span(at, at + stop - start, context))
        at += stop - start
        return at - (stop - start)

    first = 0
    while first < len(sequences):
        last = next((i for i in range(first, len(groups)) if groups[i] != groups[first]), len(groups))
        common = _common(sequences[first:last], reads[first:last])
        shared = put(sequences[first], 0, common, (0, 0)) if common else at
        for i in range(first, last):
            begin = put(sequences[i], common, reads[i].stop, (shared, shared + common))
            read += [begin + row - common for row in reads[i]]
        first = last
    return Packed(torch.cat(rows), torch.cat(positions), tuple(spans), torch.tensor(read))


def _common(sequences: Sequence[Tensor], reads: Sequence[range]) -> int:
    """How many first rows all have, none of which is read."""
    common = min(read.start for read in reads) if len(sequences) > 1 else 0
    for other in sequences[1:]:
        same = (sequences[0][:common] == other[:common]).all(-1)
        common = int(same.cumprod(0).sum())
    return common


class PackedLanguage(RoundedLanguage):
    """The decoder over packed rows, without a cache. Weights are kept, or streamed once."""

    def __init__(
        self, checkpoint: Checkpoint, spec: LanguageSpec, packed: Packed, precision: Precision, *, keep: bool
    ) -> None:
        super().__init__(checkpoint, spec, precision, keep=keep)
        self.packed = packed
        self.states: dict[int, Tensor] = {}  # what enters each layer
        self._begun = True

    @torch.inference_mode()
    def logits(self, states: Tensor | None = None, layer: int = 0) -> Tensor:
        """(N, V) of the rows that are read; from `states`, which enter `layer`, where they are known."""
        self._begun, self._from = layer == 0, f"layers.{layer}.input_layernorm"
        if layer == self.spec.layers:
            self._from = "norm"
        return walk(self.spec, self, self.packed.embeds if states is None else states, last_row=False)

    def linears(self, x: Tensor, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
        if not self._begun:
            return (x,) * len(linears)
        return super().linears(x[self.packed.read] if linears[0].name == "lm_head" else x, linears)

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        self._begun = self._begun or norm.name == self._from
        if self._begun and (norm.name == "norm" or norm.name.endswith(".input_layernorm")):
            self.states[self.spec.layers if norm.name == "norm" else int(norm.name.split(".")[1])] = x
        return super().rms_norm(x, norm) if self._begun else x

    def head_norm(self, x: Tensor, norm: Norm, heads: int) -> Tensor:
        return super().rms_norm(x.view(-1, heads, norm.size), norm).flatten(1) if self._begun else x

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self._begun else x

    def gate(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return super().gate(gate, up, activation) if self._begun else gate

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        if not self._begun:
            return q
        a, positions = attention, self.packed.positions
        cos, sin = (table[positions] for table in self._rope(a.rope, int(positions.max()) + 1))
        queries = rotate(q.view(-1, a.heads, a.head_dim).transpose(0, 1), cos, sin)
        keys = rotate(k.view(-1, a.kv_heads, a.head_dim).transpose(0, 1), cos, sin)
        values = v.view(-1, a.kv_heads, a.head_dim).transpose(0, 1)
        out = torch.empty_like(q)
        for span in self.packed.spans:
            rows = torch.cat([torch.arange(*span.context), torch.arange(span.start, span.stop)])
            own = slice(span.start, span.stop)
            distance = positions[own, None] - positions[rows][None]
            out[own] = self.attend(queries[:, own], keys[:, rows], values[:, rows], distance, a)
        return out
