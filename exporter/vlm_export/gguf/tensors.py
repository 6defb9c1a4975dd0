"""The language model's tensors under GGUF's names, as llama.cpp's graph wants them, read in row ranges."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_export.gguf.architecture import graph_of, query_scale, rope_factors
from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.grid import Grid
from vlm_models.model import language_tensors
from vlm_models.spec import LanguageSpec, VLMSpec
from vlm_quant.affine import widen

Read = Callable[[int, int], NDArray[Any]]

TOKEN_EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_TOP = {
    "language_model.embed_tokens.weight": TOKEN_EMBEDDING,
    "language_model.norm.weight": "output_norm.weight",
    "lm_head.weight": HEAD,
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_POST_NORMS = {
    **_LAYER,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file. `shape` is (rows, columns) or (size,); `dtype` that of what `read(start, stop)` gives.

    `source` is the checkpoint's canonical name, empty for a computed tensor; `matrix` says that it may be quantized.
    `release()` drops the checkpoint's pages. `grid` are the values on which the rows have been put already.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    matrix: bool
    source: str
    read: Read
    release: Callable[[], None]
    grid: Grid | None = None


def tensors(checkpoint: Checkpoint, spec: VLMSpec) -> list[Tensor]:
    """All tensors of the language model, in the order in which they are used. Nothing is read yet.

    Raises CheckpointError for a language model that llama.cpp has no graph for.
    """
    language = spec.language
    found = [_stored(checkpoint, language, source, shape) for source, shape in dict(language_tensors(spec)).items()]
    computed = [_computed(name, values) for name, values in rope_factors(language).items()]
    return found[:1] + computed + found[1:]


def gguf_name(source: str, language: LanguageSpec) -> str:
    """The GGUF name of a canonical checkpoint name, as `language_model.layers.3.mlp.up_proj.weight`."""
    if source in _TOP:
        return _TOP[source]
    layer = _LAYER_POST_NORMS if language.post_norms else _LAYER
    match = re.fullmatch(r"language_model\.layers\.(\d+)\.(.+)\.(weight|bias)", source)
    if match is None or match[2] not in layer:
        raise CheckpointError(f"target 'gguf' has no place for the tensor {source!r}; choose another target")
    return f"blk.{match[1]}.{layer[match[2]]}.{match[3]}"


def exact_type(tensors: list[Tensor]) -> str:
    """The smallest of "f16", "bf16" and "f32" that holds every matrix without rounding."""
    stored = {tensor.dtype for tensor in tensors if tensor.matrix}
    return stored.pop().lower() if len(stored) == 1 else "f32"


def _stored(checkpoint: Checkpoint, language: LanguageSpec, source: str, shape: tuple[int, ...]) -> Tensor:
    matrix, dtype = len(shape) > 1, checkpoint.dtype(source)
    read, scale, grid = _rows(checkpoint, source), query_scale(language), checkpoint.grid(source)
    kind = source.rsplit(".", 2)[-2]
    if graph_of(language).interleaved and kind in ("q_proj", "k_proj"):
        read = _interleaved(checkpoint, source, language.head_dim)
        if grid is not None and matrix:
            grid = _ordered(grid, _neighbours(np.arange(shape[0]), language.head_dim))
    if "norm" in kind and language.norm_offset:
        read = _mapped(read, lambda rows: rows + np.float32(language.norm_offset))
    if scale != 1.0:
        if kind == ("q_norm" if language.qk_norm else "q_proj"):
            read, dtype = _mapped(read, lambda rows: rows * np.float32(scale)), "F32"
            grid = None if grid is None else replace(grid, scales=grid.scales * np.float32(scale))
        elif kind == "qkv_proj":
            read, dtype, grid = _scaled_queries(read, language.heads * language.head_dim, scale), "F32", None
    if not matrix:
        read, dtype = _mapped(read, lambda rows: rows), "F32"
    name = gguf_name(source, language)
    return Tensor(name, shape, dtype, matrix, source, read, lambda: checkpoint.release(source), grid)


def _computed(name: str, values: NDArray[np.float32]) -> Tensor:
    return Tensor(name, values.shape, "F32", False, "", lambda start, stop: values[start:stop], lambda: None)


def _rows(checkpoint: Checkpoint, source: str) -> Read:
    return lambda start, stop: checkpoint.rows(source, start, stop)


def _mapped(read: Read, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Read:
    """float32 rows, changed."""
    return lambda start, stop: change(widen(read(start, stop)))


def _interleaved(checkpoint: Checkpoint, source: str, head_dim: int) -> Read:
    """Rows of each head reordered from halves 0 1 2 … | 0' 1' 2' … to neighbours 0 0' 1 1' 2 2' …"""

    def read(start: int, stop: int) -> NDArray[Any]:
        wanted = _neighbours(np.arange(start, stop), head_dim)
        first = int(wanted.min())
        rows: NDArray[Any] = checkpoint.rows(source, first, int(wanted.max()) + 1)[wanted - first]
        return rows

    return read


def _neighbours(row: NDArray[np.intp], head_dim: int) -> NDArray[np.intp]:
    """The checkpoint's row that becomes `row`."""
    head, channel = np.divmod(row, head_dim)
    found: NDArray[np.intp] = head * head_dim + channel % 2 * (head_dim // 2) + channel // 2
    return found


def _ordered(grid: Grid, rows: NDArray[np.intp]) -> Grid:
    return replace(grid, scales=grid.scales[rows], zeros=None if grid.zeros is None else grid.zeros[rows])


def _scaled_queries(read: Read, queries: int, scale: float) -> Read:
    """The first `queries` rows of a fused matrix multiplied by `scale`."""

    def scaled(start: int, stop: int) -> NDArray[Any]:
        rows = widen(read(start, stop))
        rows[: max(queries - start, 0)] *= np.float32(scale)
        return rows

    return scaled
