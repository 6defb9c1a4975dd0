"""The decoder of the Llama line, walked once; each emitter turns the same walk into torch, ONNX Runtime, … .

Llama, Mistral, Qwen2/3, Phi-3 and Gemma 1/2/3 differ by the options of `LanguageSpec` alone. An emitter implements the
few operations below on a value type of its own (a tensor, the name of a graph edge) and receives weights as row ranges
of checkpoint tensors, so that it can stream them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from vlm_models.spec import LanguageSpec, RopeSpec

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """Rows `start:stop` of the checkpoint tensor `tensor` (canonical name)."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True)
class Linear:
    """y = x Wᵀ + b with W (out_features, in_features) as stored by the checkpoint."""

    name: str
    out_features: int
    in_features: int
    weight: Rows
    bias: Rows | None = None


@dataclass(frozen=True)
class Norm:
    """RMSNorm: x / sqrt(mean(x²) + eps) · (weight + offset), over the last `size` channels."""

    name: str
    tensor: str
    size: int
    eps: float
    offset: float


@dataclass(frozen=True)
class Attention:
    """Causal grouped-query attention of one layer, with rotary embedding and KV cache.

    `window` is how many positions a row sees including its own (0: all before it); scores are multiplied by `scale`
    and, where `softcap` > 0, passed through softcap · tanh(score / softcap).
    """

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    window: int
    rope: RopeSpec


class Emitter(Protocol[T]):
    """The operations of the walk. Values are rows (S, channels) of one sequence."""

    def linears(self, x: T, linears: Sequence[Linear]) -> tuple[T, ...]:
        """Several linear layers that read the same x; an emitter may run them as one."""

    def rms_norm(self, x: T, norm: Norm) -> T:
        """RMSNorm over all channels."""

    def head_norm(self, x: T, norm: Norm, heads: int) -> T:
        """RMSNorm over the channels of each head: x is (S, heads · size)."""

    def attention(self, q: T, k: T, v: T, attention: Attention) -> T:
        """Rotate q and k, append k and v to the layer's cache, attend: (S, heads · head_dim)."""

    def add(self, x: T, y: T) -> T:
        """x + y."""

    def gate(self, gate: T, up: T, activation: str) -> T:
        """activation(gate) · up."""

    def last_row(self, x: T) -> T:
        """The last row alone."""

    def softcap(self, x: T, cap: float) -> T:
        """cap · tanh(x / cap)."""


def walk(spec: LanguageSpec, emitter: Emitter[T], inputs_embeds: T, *, last_row: bool = True) -> T:
    """Emit the whole decoder; returns the logits, of the last row alone unless `last_row` is false."""
    x = inputs_embeds
    for layer in range(spec.layers):
        x = _layer(spec, emitter, x, layer, last_row=last_row and layer == spec.layers - 1)
    x = emitter.rms_norm(x, _norm(spec, "norm"))
    (logits,) = emitter.linears(x, [head(spec)])
    return emitter.softcap(logits, spec.logit_softcap) if spec.logit_softcap else logits


def head(spec: LanguageSpec) -> Linear:
    """The linear layer that gives the logits; tied checkpoints use the embedding table."""
    tensor = "language_model.embed_tokens.weight" if spec.tied else "lm_head.weight"
    return Linear("lm_head", spec.vocab_size, spec.hidden_size, Rows(tensor, 0, spec.vocab_size))


def _layer(spec: LanguageSpec, emitter: Emitter[T], x: T, layer: int, *, last_row: bool) -> T:
    """One decoder layer; with `last_row` all rows enter the KV cache, but only the last one goes on."""
    name = f"layers.{layer}"
    a = _attention(spec, emitter, emitter.rms_norm(x, _norm(spec, f"{name}.input_layernorm")), layer, last_row)
    if last_row:
        x = emitter.last_row(x)
    if spec.post_norms:
        a = emitter.rms_norm(a, _norm(spec, f"{name}.post_attention_layernorm"))
    x = emitter.add(x, a)
    before = "pre_feedforward_layernorm" if spec.post_norms else "post_attention_layernorm"
    m = _mlp(spec, emitter, emitter.rms_norm(x, _norm(spec, f"{name}.{before}")), layer)
    if spec.post_norms:
        m = emitter.rms_norm(m, _norm(spec, f"{name}.post_feedforward_layernorm"))
    return emitter.add(x, m)


def _attention(spec: LanguageSpec, emitter: Emitter[T], x: T, layer: int, last_row: bool) -> T:
    name, hidden, head_dim = f"layers.{layer}.self_attn", spec.hidden_size, spec.head_dim
    sizes = (spec.heads * head_dim, spec.kv_heads * head_dim, spec.kv_heads * head_dim)
    if spec.fused:
        qkv = _split(f"{name}.qkv_proj", ("q", "k", "v"), sizes, hidden, spec.qkv_bias)
    else:
        qkv = [_linear(f"{name}.{p}_proj", n, hidden, spec.qkv_bias) for p, n in zip("qkv", sizes, strict=True)]
    q, k, v = emitter.linears(x, qkv)
    if spec.qk_norm:
        q = emitter.head_norm(q, _norm(spec, f"{name}.q_norm", head_dim), spec.heads)
        k = emitter.head_norm(k, _norm(spec, f"{name}.k_norm", head_dim), spec.kv_heads)
    window = spec.windows[layer]
    rope = spec.rope_local if spec.rope_local is not None and window else spec.rope
    scale = spec.attention_scale or head_dim**-0.5
    attention = Attention(layer, spec.heads, spec.kv_heads, head_dim, scale, spec.attention_softcap, window, rope)
    a = emitter.attention(q, k, v, attention)
    if last_row:
        a = emitter.last_row(a)
    (out,) = emitter.linears(a, [_linear(f"{name}.o_proj", hidden, sizes[0], spec.o_bias)])
    return out


def _mlp(spec: LanguageSpec, emitter: Emitter[T], x: T, layer: int) -> T:
    name, hidden, inner = f"layers.{layer}.mlp", spec.hidden_size, spec.intermediate_size
    if spec.fused:
        pair = _split(f"{name}.gate_up_proj", ("gate", "up"), (inner, inner), hidden, spec.mlp_bias)
    else:
        pair = [_linear(f"{name}.{p}_proj", inner, hidden, spec.mlp_bias) for p in ("gate", "up")]
    gate, up = emitter.linears(x, pair)
    (out,) = emitter.linears(
        emitter.gate(gate, up, spec.activation), [_linear(f"{name}.down_proj", hidden, inner, spec.mlp_bias)]
    )
    return out


def _linear(name: str, out_features: int, in_features: int, bias: bool) -> Linear:
    tensor = f"language_model.{name}"
    rows = Rows(f"{tensor}.bias", 0, out_features) if bias else None
    return Linear(name, out_features, in_features, Rows(f"{tensor}.weight", 0, out_features), rows)


def _split(fused: str, parts: Sequence[str], sizes: Sequence[int], in_features: int, bias: bool) -> list[Linear]:
    """Row ranges of one stored matrix as separate linear layers."""
    base, out, start = fused.rsplit(".", 1)[0], [], 0
    for part, size in zip(parts, sizes, strict=True):
        weight = Rows(f"language_model.{fused}.weight", start, start + size)
        rows = Rows(f"language_model.{fused}.bias", start, start + size) if bias else None
        out.append(Linear(f"{base}.{part}_proj", size, in_features, weight, rows))
        start += size
    return out


def _norm(spec: LanguageSpec, name: str, size: int = 0) -> Norm:
    return Norm(name, f"language_model.{name}.weight", size or spec.hidden_size, spec.norm_eps, spec.norm_offset)
