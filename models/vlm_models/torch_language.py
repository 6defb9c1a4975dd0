"""The torch emitter of the walk: the float32 reference, its weights streamed from the checkpoint or kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vlm_models.checkpoint import Checkpoint
from vlm_models.language import Attention, Linear, Norm, Rows, walk
from vlm_models.rope import cos_sin
from vlm_models.spec import LanguageSpec, RopeSpec

_CHUNK = 8192  # rows of a weight converted at a time when weights are not kept

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


class TorchLanguage:
    """A decoder of batch 1 with its own KV cache. Implements `vlm_models.language.Emitter` on float32 tensors.

    With `keep` the weights stay in memory as float32 after the first call; without, each call streams them from the
    memory-mapped checkpoint, so that models larger than the RAM run too.
    """

    def __init__(self, checkpoint: Checkpoint, spec: LanguageSpec, *, keep: bool) -> None:
        self.checkpoint, self.spec, self.keep = checkpoint, spec, keep
        self.position, self._block = 0, False
        self._kept: dict[Rows, Tensor] = {}
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._tables: dict[tuple[RopeSpec, int], tuple[Tensor, Tensor]] = {}

    @torch.inference_mode()
    def forward(self, embeds: Tensor, last_row: bool = True, block: bool = False) -> Tensor:
        """Append embeds (S, hidden) to the cache; logits (1, vocab), or (S, vocab) without `last_row`.

        Rows of a `block` see one another both ways, as `spec.both_ways` says.
        """
        self._block = block
        logits = walk(self.spec, self, embeds.float(), last_row=last_row)
        self.position += embeds.shape[0]
        return logits

    def rewind(self, position: int) -> None:
        """Forget everything after the first `position` rows."""
        self._cache = {layer: (k[:, :position], v[:, :position]) for layer, (k, v) in self._cache.items()}
        self.position = position

    def linears(self, x: Tensor, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
        return tuple(self._linear(x, linear) for linear in linears)

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        weight = self._tensor(Rows(norm.tensor, 0, norm.size)) + norm.offset
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * weight

    def head_norm(self, x: Tensor, norm: Norm, heads: int) -> Tensor:
        return self.rms_norm(x.view(-1, heads, norm.size), norm).flatten(1)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        rows, start, a = q.shape[0], self.position, attention
        cos, sin = (t[start : start + rows] for t in self._rope(a.rope, start + rows))
        queries = rotate(q.view(rows, a.heads, a.head_dim).transpose(0, 1), cos, sin)
        keys = rotate(k.view(rows, a.kv_heads, a.head_dim).transpose(0, 1), cos, sin)
        values = v.view(rows, a.kv_heads, a.head_dim).transpose(0, 1)
        if a.layer in self._cache:
            old_keys, old_values = self._cache[a.layer]
            keys, values = torch.cat([old_keys, keys], 1), torch.cat([old_values, values], 1)
        self._cache[a.layer] = keys, values
        distance = torch.arange(start, start + rows)[:, None] - torch.arange(start + rows)[None]
        if self._block:  # transformers: a picture's rows look ahead within a window, a prompt's wherever they are
            distance = distance.clamp(min=0)
            if self.spec.both_ways == "prompt":
                distance[:, start:] = 0
        return self.attend(queries, keys, values, distance, a)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, distance: Tensor, attention: Attention) -> Tensor:
        """Rotated queries (heads, S, head_dim) to keys and values (kv_heads, T, head_dim) not behind them.

        `distance` (S, T) says how many positions a key lies before the query.
        """
        a, repeat = attention, attention.heads // attention.kv_heads
        scores = queries @ keys.repeat_interleave(repeat, 0).transpose(1, 2) * a.scale
        if a.softcap:
            scores = self.softcap(scores, a.softcap)
        seen = (distance >= 0) & (distance < a.window) if a.window else distance >= 0
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return (weights @ values.repeat_interleave(repeat, 0)).transpose(0, 1).flatten(1)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def gate(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return ACTIVATIONS[activation](gate) * up

    def last_row(self, x: Tensor) -> Tensor:
        return x[-1:]

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return torch.tanh(x / cap) * cap

    def _linear(self, x: Tensor, linear: Linear) -> Tensor:
        bias = None if linear.bias is None else self._tensor(linear.bias)
        if self.keep:
            return functional.linear(x, self._tensor(linear.weight), bias)
        weight, parts = linear.weight, []
        for start in range(weight.start, weight.stop, _CHUNK):
            rows = Rows(weight.tensor, start, min(start + _CHUNK, weight.stop))
            parts.append(x @ self._tensor(rows).T)
        self.checkpoint.release(weight.tensor)
        y = torch.cat(parts, -1)
        return y if bias is None else y + bias

    def _tensor(self, rows: Rows) -> Tensor:
        if rows in self._kept:
            return self._kept[rows]
        tensor = as_float32(self.checkpoint, rows.tensor, rows.start, rows.stop)
        if self.keep:
            self._kept[rows] = tensor
        return tensor

    def _rope(self, rope: RopeSpec, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin (≥ positions, dim/2), made anew when the context outgrows them."""
        for (known, length), tables in self._tables.items():
            if known is rope and length >= positions:
                return tables
        length = max(256, 1 << (positions - 1).bit_length())
        cos, sin = (torch.from_numpy(t) for t in cos_sin(rope, length))
        self._tables = {key: value for key, value in self._tables.items() if key[0] is not rope}
        self._tables[rope, length] = cos, sin
        return cos, sin


def as_float32(checkpoint: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows of a checkpoint tensor as a new float32 tensor."""
    array = checkpoint.rows(name, start, stop)
    if checkpoint.dtype(name) == "BF16":
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16).float()
    return torch.from_numpy(array.astype("float32"))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation of the first 2 · cos.shape[-1] channels of x (heads, S, head_dim)."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
