"""Many sequences through the decoder, one layer at a time: an emitter whose values stand for all sequences.

A layer's weights are read, every sequence passes, the next layer's are read: memory holds the hidden states of the
sequences and one layer of weights, however large the model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlm_models.checkpoint import Checkpoint
from vlm_models.language import Attention, Linear, Norm, walk
from vlm_models.spec import LanguageSpec
from vlm_models.torch_language import TorchLanguage

_TOGETHER = 512  # rows of short sequences that pass a linear layer at once


class Rows:
    """A value of every sequence, rows(i) of shape (S, channels): computed when asked for, kept for one sequence."""

    def __init__(self, compute: Callable[[int], Tensor]) -> None:
        self._compute = functools.lru_cache(maxsize=1)(compute)

    def __call__(self, i: int) -> Tensor:
        return self._compute(i)

    def settle(self, store: list[Tensor], reached: Callable[[], None]) -> None:
        """Compute it for every sequence into `store`, and let go of all that it came from."""
        for i in range(len(store)):
            store[i] = self(i)
            reached()
        self._compute = functools.lru_cache(maxsize=1)(store.__getitem__)


Inputs = Callable[[Rows, Sequence[Linear]], Rows]
"""inputs(x, linears): called once before some linear layers read x; they read what it returns."""


def stream(
    checkpoint: Checkpoint, spec: LanguageSpec, states: list[Tensor], inputs: Inputs, reached: Callable[[], None]
) -> None:
    """Run the sequences `states`, embeddings (S, H) each, through all layers, up to what the head reads; no logits.

    `inputs` sees every group of linear layers, and may change their weights in `checkpoint` before they are read.
    `states` is used up; `reached` is called `len(states)` times a layer, and as often for what leads to the head.
    """
    with torch.inference_mode():
        walk(spec, _Streaming(checkpoint, spec, states, inputs, reached), Rows(states.__getitem__), last_row=False)


class _Streaming:
    """Implements `vlm_models.language.Emitter` on Rows."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: LanguageSpec,
        states: list[Tensor],
        inputs: Inputs,
        reached: Callable[[], None],
    ) -> None:
        self._checkpoint, self._spec, self._states = checkpoint, spec, states  # entering the current layer
        self._inputs, self._reached = inputs, reached
        self._batches = batches([len(state) for state in states])
        self._read: set[str] = set()  # tensors of the current layer
        self._language = TorchLanguage(checkpoint, spec, keep=True)

    def linears(self, x: Rows, linears: Sequence[Linear]) -> tuple[Rows, ...]:
        rows = self._inputs(x, linears)
        if linears[0].name == "lm_head":  # nobody needs the logits
            for i in range(len(self._states)):
                rows(i)
            return (rows,) * len(linears)
        self._read.update(linear.weight.tensor for linear in linears)

        @functools.lru_cache(maxsize=1)
        def outputs(batch: range) -> list[tuple[Tensor, ...]]:
            given = [rows(i) for i in batch]
            made = self._language.linears(torch.cat(given), linears)
            return [torch.split(y, [len(x) for x in given]) for y in made]

        def output(k: int, i: int) -> Tensor:
            batch = self._batches[i]
            return outputs(batch)[k][i - batch.start]

        return tuple(Rows(functools.partial(output, k)) for k in range(len(linears)))

    def rms_norm(self, x: Rows, norm: Norm) -> Rows:
        if norm.name == "norm" or norm.name.endswith(".input_layernorm"):
            x.settle(self._states, self._reached)
            self._forget()
        elif norm.name.endswith(self._before_mlp):
            x.settle(self._states, lambda: None)
        return Rows(lambda i: self._language.rms_norm(x(i), norm))

    @property
    def _before_mlp(self) -> str:
        return ".pre_feedforward_layernorm" if self._spec.post_norms else ".post_attention_layernorm"

    def _forget(self) -> None:
        """Drop the weights of the layer that has ended."""
        for name in self._read:
            self._checkpoint.release(name)
        self._read.clear()
        self._language = TorchLanguage(self._checkpoint, self._spec, keep=True)

    def head_norm(self, x: Rows, norm: Norm, heads: int) -> Rows:
        return Rows(lambda i: self._language.head_norm(x(i), norm, heads))

    def attention(self, q: Rows, k: Rows, v: Rows, attention: Attention) -> Rows:
        def attended(i: int) -> Tensor:
            rows = self._language.attention(q(i), k(i), v(i), attention)
            self._language.rewind(0)
            return rows

        return Rows(attended)

    def add(self, x: Rows, y: Rows) -> Rows:
        return Rows(lambda i: x(i) + y(i))

    def gate(self, gate: Rows, up: Rows, activation: str) -> Rows:
        return Rows(lambda i: self._language.gate(gate(i), up(i), activation))

    def last_row(self, x: Rows) -> Rows:
        return Rows(lambda i: x(i)[-1:])

    def softcap(self, x: Rows, cap: float) -> Rows:
        return Rows(lambda i: self._language.softcap(x(i), cap))


def batches(lengths: Sequence[int]) -> list[range]:
    """For each sequence, neighbours that pass linear layers with it: few rows beside the first's."""
    found: list[range] = []
    for _, same in itertools.groupby(itertools.accumulate(lengths), lambda end: (end - 1) // _TOGETHER):
        batch = range(len(found), len(found) + len(list(same)))
        found += [batch] * len(batch)
    return found
