"""The Core AI emitter of the language model's walk: a module that torch.export takes with any number of rows.

The form is that of Apple's own Core AI language models: inputs_embeds (1, S, H), position_ids (1, end) of everything
seen so far with these S rows, and the caches k_cache and v_cache (layers, 1, kv_heads, C, head_dim), written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.language import Attention, Linear, Norm, Rows, walk
from vlm_models.rope import cos_sin
from vlm_models.spec import LanguageSpec
from vlm_models.torch_language import ACTIVATIONS, as_float32

MASKED = -1e4  # added to a score that must not count; float16 holds sums of two of them
_CHUNK = 8192  # rows of a weight converted at a time


class CoreAILanguage(nn.Module):
    """The decoder with its head, weights in `dtype`: logits (1, 1, vocab) of the last row.

    Raises CheckpointError for weights that float16 cannot hold, and for an activation that has no torch form.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: LanguageSpec,
        dtype: torch.dtype,
        context: int,
        reached: Callable[[int], None] = lambda layer: None,
    ) -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype
        self.weights = nn.ParameterDict()
        for kind, rope in {"full": spec.rope, "local": spec.rope_local or spec.rope}.items():
            for name, table in zip(("cos", "sin"), cos_sin(rope, context), strict=True):
                self.weights[f"rope_{kind}_{name}"] = _parameter(torch.from_numpy(table).to(dtype))
        walk(spec, _Loader(self, checkpoint, reached), None)

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Write the rows' keys and values behind those of the rows before, and give the last row's logits."""
        return walk(self.spec, _Call(self, inputs_embeds, position_ids, k_cache, v_cache), inputs_embeds)

    def load(self, key: str, checkpoint: Checkpoint, rows: Rows, offset: float = 0.0) -> None:
        """Rows of a checkpoint tensor, plus `offset`, as the weight `key`."""
        parts = []
        for start in range(rows.start, rows.stop, _CHUNK):
            wide = as_float32(checkpoint, rows.tensor, start, min(start + _CHUNK, rows.stop)) + offset
            if self.dtype == torch.float16 and wide.abs().max() > np.finfo(np.float16).max:
                raise CheckpointError(f"tensor {rows.tensor!r} has weights beyond float16's 65504: export it at fp32")
            parts.append(wide.to(self.dtype))
        checkpoint.release(rows.tensor)
        self.weights[key] = _parameter(torch.cat(parts))


class _Call:
    """One call of the decoder. Implements `vlm_models.language.Emitter` on tensors (1, S, channels)."""

    def __init__(
        self, model: CoreAILanguage, x: Tensor, position_ids: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> None:
        self.model, self.weights, self.caches = model, model.weights, (k_cache, v_cache)
        self.end = position_ids.shape[1]
        self.start = self.end - x.shape[1]
        self.positions = position_ids[0, self.start :]
        self.distance = self.positions[:, None] - position_ids[0][None]
        self.masks: dict[tuple[int, int], Tensor] = {}
        self.ropes: dict[str, tuple[Tensor, Tensor]] = {}

    def linears(self, x: Tensor, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
        return tuple(
            functional.linear(
                x, self.weights[_key(linear.name)], self.weights[_key(linear.name, "bias")] if linear.bias else None
            )
            for linear in linears
        )

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        wide = x.float()  # squares of large channels are beyond float16
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
        scaled: Tensor = normed * self.weights[_key(norm.name)].float()
        return scaled.to(x.dtype)

    def head_norm(self, x: Tensor, norm: Norm, heads: int) -> Tensor:
        return self.rms_norm(x.view(1, x.shape[1], heads, norm.size), norm).flatten(2)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        a, rows = attention, q.shape[1]
        queries = self._rotate(q.view(1, rows, a.heads, a.head_dim).transpose(1, 2), a)
        keys = self._rotate(k.view(1, rows, a.kv_heads, a.head_dim).transpose(1, 2), a)
        values = v.view(1, rows, a.kv_heads, a.head_dim).transpose(1, 2)
        for cache, new in zip(self.caches, (keys, values), strict=True):
            cache[a.layer, :, :, self.start : self.end] = new
        keys, values = (cache[a.layer, :, :, : self.end] for cache in self.caches)
        group = a.heads // a.kv_heads  # queries that share a key are folded into rows, so that no key is repeated
        folded = queries.reshape(1, a.kv_heads, group * rows, a.head_dim)
        mask = self._mask(a.window, group)
        if a.softcap:
            scores = self.softcap((folded * a.scale) @ keys.transpose(-1, -2), a.softcap) + mask
            out = scores.softmax(-1) @ values
        else:
            out = functional.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=a.scale)
        return out.reshape(1, a.heads, rows, a.head_dim).transpose(1, 2).flatten(2)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def gate(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return ACTIVATIONS[activation](gate) * up

    def last_row(self, x: Tensor) -> Tensor:
        return x[:, -1:]

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return torch.tanh(x / cap) * cap

    def _rotate(self, x: Tensor, attention: Attention) -> Tensor:
        """Half-split rotation of the rope's channels of (1, heads, S, head_dim)."""
        kind = "full" if attention.rope == self.model.spec.rope else "local"
        if kind not in self.ropes:
            tables = (self.weights[f"rope_{kind}_{name}"][self.positions] for name in ("cos", "sin"))
            cos, sin = tables
            self.ropes[kind] = cos, sin
        cos, sin = self.ropes[kind]
        half = cos.shape[-1]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        turned = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat(turned if 2 * half == attention.head_dim else [*turned, rest], -1)

    def _mask(self, window: int, group: int) -> Tensor:
        """(1, 1, group · S, end) to add to scores."""
        if (window, group) not in self.masks:
            seen = self.distance >= 0
            if window:
                seen = seen & (self.distance < window)
            mask = torch.where(seen, 0.0, MASKED).to(self.model.dtype)
            rows, end = mask.shape
            self.masks[window, group] = mask[None].expand(group, rows, end).reshape(1, 1, group * rows, end)
        return self.masks[window, group]


class _Loader:
    """An emitter that gives the decoder each weight the walk asks for."""

    def __init__(self, model: CoreAILanguage, checkpoint: Checkpoint, reached: Callable[[int], None]) -> None:
        self.model, self.checkpoint, self.reached = model, checkpoint, reached

    def linears(self, x: None, linears: Sequence[Linear]) -> tuple[None, ...]:
        for linear in linears:
            self.model.load(_key(linear.name), self.checkpoint, linear.weight)
            if linear.bias is not None:
                self.model.load(_key(linear.name, "bias"), self.checkpoint, linear.bias)
        return (None,) * len(linears)

    def rms_norm(self, x: None, norm: Norm) -> None:
        self.model.load(_key(norm.name), self.checkpoint, Rows(norm.tensor, 0, norm.size), norm.offset)

    def head_norm(self, x: None, norm: Norm, heads: int) -> None:
        self.rms_norm(x, norm)

    def attention(self, q: None, k: None, v: None, attention: Attention) -> None:
        self.reached(attention.layer + 1)

    def add(self, x: None, y: None) -> None:
        return None

    def gate(self, gate: None, up: None, activation: str) -> None:
        if activation not in ACTIVATIONS:
            raise CheckpointError(
                f"activation {activation!r} has no Core AI form: supported are {', '.join(ACTIVATIONS)}"
            )

    def last_row(self, x: None) -> None:
        return None

    def softcap(self, x: None, cap: float) -> None:
        return None


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _key(name: str, kind: str = "weight") -> str:
    return f"{name}.{kind}".replace(".", "_")
