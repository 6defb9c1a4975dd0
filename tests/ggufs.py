"""Tiny GGUF language models of random weights, written with the gguf package alone."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from running import HEAD, HEADS, HIDDEN, KV, LAYERS
from vlm_models.spec import VLMSpec

INNER, EPS = 16, 1e-5
Heads = tuple[int, int, int]  # queries, keys and values, channels of each
_HEADS: Heads = (HEADS, KV, HEAD)


def weights(vocab: int, arch: str = "llama", heads: Heads = _HEADS) -> dict[str, np.ndarray]:
    """GGUF tensor name → float32 array; matrices are (out, in)."""
    random, (queries, keys, channels) = np.random.default_rng(0), heads

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * 0.3).astype(np.float32)

    def norm(size: int) -> np.ndarray:
        return (1 + 0.1 * random.standard_normal(size)).astype(np.float32)

    made = {"token_embd.weight": matrix(vocab, HIDDEN), "output_norm.weight": norm(HIDDEN)}
    if arch == "llama":
        made["output.weight"] = matrix(vocab, HIDDEN)
    for n in range(LAYERS):
        layer = {
            "attn_norm.weight": norm(HIDDEN),
            "attn_q.weight": matrix(queries * channels, HIDDEN),
            "attn_k.weight": matrix(keys * channels, HIDDEN),
            "attn_v.weight": matrix(keys * channels, HIDDEN),
            "attn_output.weight": matrix(HIDDEN, queries * channels),
            "ffn_norm.weight": norm(HIDDEN),
            "ffn_gate.weight": matrix(INNER, HIDDEN),
            "ffn_up.weight": matrix(INNER, HIDDEN),
            "ffn_down.weight": matrix(HIDDEN, INNER),
        }
        if arch == "gemma3":
            layer |= {"attn_q_norm.weight": norm(channels), "attn_k_norm.weight": norm(channels)}
            layer |= {"post_attention_norm.weight": norm(HIDDEN), "post_ffw_norm.weight": norm(HIDDEN)}
        made |= {f"blk.{n}.{name}": value for name, value in layer.items()}
    return made


def language_gguf(
    path: Path,
    spec: VLMSpec,
    *,
    arch: str = "llama",
    dtype: type[np.floating] = np.float32,
    part: str = "language_model",
    heads: Heads = _HEADS,
) -> Path:
    """Write the tiny language model of `spec` without a vocabulary; matrices in `dtype`."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("vlm.fingerprint", spec.fingerprint)
    writer.add_string("vlm.part", part)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(heads[0])
    writer.add_head_count_kv(heads[1])
    writer.add_key_length(heads[2])
    writer.add_value_length(heads[2])
    writer.add_rope_dimension_count(heads[2])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_vocab_size(spec.language.vocab_size)
    writer.add_tokenizer_model("none")
    if arch == "gemma3":
        writer.add_sliding_window(8)
    for name, value in weights(spec.language.vocab_size, arch, heads).items():
        writer.add_tensor(name, value.astype(dtype) if value.ndim > 1 else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def plain_logits(embeds: np.ndarray, vocab: int, heads: Heads = _HEADS) -> np.ndarray:
    """Logits (S, V) of the llama model in float64, without any cache; rope turns neighbouring channels."""
    w = {name: value.astype(np.float64) for name, value in weights(vocab, heads=heads).items()}
    x, count, (queries, keys, channels) = embeds.astype(np.float64), len(embeds), heads
    angles = np.outer(np.arange(count), 1e4 ** -(np.arange(0, channels, 2) / channels))[:, None]

    def norm(y: np.ndarray, name: str) -> np.ndarray:
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + EPS) * w[f"{name}.weight"]

    def rotate(y: np.ndarray) -> np.ndarray:
        a, b = y[..., ::2], y[..., 1::2]
        turned = a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)
        return np.stack(turned, axis=-1).reshape(y.shape)

    for n in range(LAYERS):
        h = norm(x, f"blk.{n}.attn_norm")
        q, k, v = ((h @ w[f"blk.{n}.attn_{c}.weight"].T).reshape(count, -1, channels) for c in "qkv")
        q, k = rotate(q), np.repeat(rotate(k), queries // keys, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(channels)
        scores = np.where(np.tri(count, dtype=bool), scores, -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", share, np.repeat(v, queries // keys, axis=1)).reshape(count, -1)
        x = x + mixed @ w[f"blk.{n}.attn_output.weight"].T
        h = norm(x, f"blk.{n}.ffn_norm")
        gate = h @ w[f"blk.{n}.ffn_gate.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[f"blk.{n}.ffn_up.weight"].T)) @ w[f"blk.{n}.ffn_down.weight"].T
    return np.asarray(norm(x, "output_norm") @ w["output.weight"].T)
