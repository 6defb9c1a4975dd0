"""Engine "gguf": llama.cpp runs the language model; every row, of text or of a picture, goes in as an embedding."""

from __future__ import annotations

import copy
import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_models.errors import BundleError, InputError, PromptError
from vlm_models.spec import VLMSpec
from vlm_runtime import llama
from vlm_runtime.engine import Encoder, Floats, KVCache, Options, thread_count
from vlm_runtime.gguf_header import check_language_model, read_header

if TYPE_CHECKING:
    from vlm_runtime.bundle import Bundle
    from vlm_runtime.manifest import Part

NAME = "gguf"
GGML_TYPES: Mapping[KVCache, int] = {"f32": 0, "f16": 1, "q8_0": 8}


def available() -> None:
    """Raises DependencyError where llama-cpp-python is missing or not the release whose structs are known."""
    llama.check_installed()


def encoder(bundle: Bundle, part: str, options: Options) -> Encoder:
    """Raises BundleError: vision encoder and projector are run by another engine, whatever llama.cpp has of them."""
    raise BundleError(f"engine 'gguf' runs the language model only: choose another one for the {part}")


def decoder(bundle: Bundle, options: Options) -> GgufDecoder:
    """The language model of a bundle, with room for min(asked, bundle's) positions."""
    language, part = bundle.spec.language, bundle.part("language_model", NAME)
    path, (kv_cache, flash_attention) = bundle.path(part.graph), attention_choice(part.precision, options)
    check_language_model(read_header(path), path, bundle.spec)
    return GgufDecoder(
        path,
        hidden_size=language.hidden_size,
        vocab_size=language.vocab_size,
        max_context=min(options.max_context or bundle.manifest.max_context, bundle.manifest.max_context),
        prefill_chunk=max(options.prefill_chunk, _block(bundle.spec)),
        threads=thread_count(options),
        kv_cache=kv_cache,
        flash_attention=flash_attention,
        embed_scale=_embed_scale(part),
        gpu=options.device == "cuda",
    )


def _block(spec: VLMSpec) -> int:
    """Rows that must go in at once because they see one another; as many as the context has where it is all of them."""
    language = spec.language
    return {"none": 0, "pictures": spec.tile_tokens, "prompt": language.max_positions}[language.both_ways]


def attention_choice(precision: str, options: Options) -> tuple[KVCache, bool | None]:
    """KV cache type and flash attention as asked; else f32 without for fp32 weights, f16 as llama.cpp likes for others.

    llama.cpp's fused attention computes in f16 whatever the cache is, so an f32 cache alone would gain nothing.
    """
    kv_cache: KVCache = options.kv_cache or ("f32" if precision in ("fp32", "f32") else "f16")
    flash = options.flash_attention
    return kv_cache, False if flash is None and kv_cache == "f32" else flash


def _embed_scale(part: Part) -> float:
    scale = part.details.get("embed_scale", 1.0)
    if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise BundleError(f"language_model of engine 'gguf': embed_scale is {scale!r:.40}: export the model again")
    return float(scale)


class GgufDecoder:
    """A GGUF language model, its llama.cpp context and one batch of `prefill_chunk` rows that all calls use.

    `kv_cache` is the type of keys and values; `flash_attention` None leaves the choice to llama.cpp. `embed_scale` is
    what llama.cpp's graph multiplies embeddings by: rows are divided by it here. Sliding layers keep all positions,
    so that `rewind` works for them too.
    """

    def __init__(
        self,
        path: Path,
        *,
        hidden_size: int,
        vocab_size: int,
        max_context: int,
        prefill_chunk: int = 512,
        threads: int = 1,
        kv_cache: KVCache = "f16",
        flash_attention: bool | None = None,
        embed_scale: float = 1.0,
        gpu: bool = False,
    ) -> None:
        """Raises BundleError for a file of another model, InputError for a cache that llama.cpp cannot make."""
        if kv_cache == "q8_0" and flash_attention is False:
            raise InputError("a q8_0 KV cache needs flash attention: leave out --no-flash-attention")
        self.max_context, self.position = max_context, 0
        self._lib, self._scale = llama.library(), np.float32(embed_scale) if embed_scale != 1 else None
        chunk = min(prefill_chunk, max_context)
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_outputs_max = max_context, chunk, chunk, 1
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = GGML_TYPES[kv_cache]
        params.flash_attn_type = -1 if flash_attention is None else int(flash_attention)
        params.swa_full, params.offload_kqv, params.op_offload = True, gpu, gpu
        self._params, self._cache = params, f"{max_context} positions of {kv_cache} KV cache"
        self._vocab_size, self._hidden_size = vocab_size, hidden_size
        self._weights = _Weights(self._lib, llama.load_model(path, gpu=gpu))
        self._check(path)
        self._open()

    def another(self) -> GgufDecoder:
        """An empty llama.cpp context of its own over the same weights. Raises InputError where memory ends."""
        made = copy.copy(self)
        made.position = 0
        made._open()
        return made

    def _open(self) -> None:
        chunk, hidden_size = self._params.n_batch, self._hidden_size
        self._native = _Native(self._weights)
        self._native.open(self._params, chunk, hidden_size, self._cache)
        self._ctx, self._batch = self._native.ctx, self._native.batch
        self._memory = self._lib.llama_get_memory(self._ctx)
        self._rows: Floats = np.ctypeslib.as_array(self._batch.embd, (chunk, hidden_size))
        self._first: Floats = self._rows[0]
        self._positions = np.ctypeslib.as_array(self._batch.pos, (chunk,))
        self._wanted = np.ctypeslib.as_array(self._batch.logits, (chunk,))
        self._steps = np.arange(chunk, dtype=np.int32)
        self._address = 0
        self._logits: Floats = np.empty(0, np.float32)

    def prefill(self, embeds: Floats) -> Floats:
        """Append rows (S, H) in chunks; the logits (V,) after the last one."""
        chunk, hidden = self._rows.shape
        if embeds.ndim != 2 or embeds.shape[0] == 0 or embeds.shape[1] != hidden:
            raise ValueError(f"prefill takes (S, {hidden}) with S > 0, got {embeds.shape}")
        self._check_room(embeds.shape[0])
        for start in range(0, embeds.shape[0], chunk):
            rows = embeds[start : start + chunk]
            count = rows.shape[0]
            self._put(rows, self._rows[:count])
            np.add(self._steps[:count], self.position, out=self._positions[:count])
            self._wanted[:count] = 0
            self._wanted[count - 1] = start + count == embeds.shape[0]
            self._run(count)
        return self._last()

    def prefill_block(self, embeds: Floats) -> Floats:
        """Append rows (S, H) which see each other, at once; the logits (V,) after the last one."""
        if len(embeds) > len(self._rows):
            raise PromptError(
                f"{len(embeds)} rows that see one another are more than fit, {len(self._rows)}: shorten the prompt"
            )
        self._lib.llama_set_causal_attn(self._ctx, False)
        try:
            return self.prefill(embeds)
        finally:
            self._lib.llama_set_causal_attn(self._ctx, True)

    def decode(self, embed: Floats) -> Floats:
        """Append one row (H,); its logits (V,)."""
        if self.position >= self.max_context:
            self._check_room(1)
        self._put(embed, self._first)
        self._positions[0], self._wanted[0] = self.position, 1
        self._run(1)
        return self._last()

    def rewind(self, position: int) -> None:
        """Forget all rows from `position` on."""
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot rewind to {position}: {self.position} rows are in the cache")
        if not self._lib.llama_memory_seq_rm(self._memory, 0, position, -1):
            raise RuntimeError(f"llama.cpp cannot forget rows from {position} on")  # recurrent models only
        self.position = position

    def _put(self, rows: Floats, out: Floats) -> None:
        if self._scale is None:
            out[...] = rows
        else:
            np.divide(rows, self._scale, out=out)

    def _run(self, rows: int) -> None:
        self._batch.n_tokens = rows
        if code := self._lib.llama_decode(self._ctx, self._batch):
            self._lib.llama_memory_seq_rm(self._memory, 0, self.position, -1)
            raise InputError(
                f"llama.cpp could not run {rows} rows at position {self.position} (code {code}; {llama.last_error()})"
            )
        self.position += rows

    def _last(self) -> Floats:
        """The logits of the one wanted row; llama.cpp keeps them in one place as long as it does not grow."""
        address = llama.address(self._lib.llama_get_logits_ith(self._ctx, -1))
        if address != self._address:
            buffer: Any = (ctypes.c_float * self._vocab_size).from_address(address)
            buffer.owner = self._native  # who holds the logits holds the context
            self._address, self._logits = address, np.frombuffer(buffer, np.float32)
        return self._logits

    def _check(self, path: Path) -> None:
        model = self._weights.model
        vocab = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(model))
        found, wanted = (self._lib.llama_model_n_embd_inp(model), vocab), (self._hidden_size, self._vocab_size)
        if found != wanted:
            raise BundleError(
                f"{path.name} takes rows of {found[0]} and has {found[1]} tokens, its bundle says "
                f"{wanted[0]} and {wanted[1]}: it is a part of another model"
            )

    def _check_room(self, rows: int) -> None:
        if self.position + rows > self.max_context:
            raise PromptError(
                f"{self.position} + {rows} tokens do not fit the context of {self.max_context}: "
                "shorten the prompt or export with a larger --max-context"
            )


class _Weights:
    """A model that llama.cpp loaded, freed with the last context over it."""

    def __init__(self, lib: Any, model: int) -> None:
        self.lib, self.model, self._pid = lib, model, os.getpid()

    def __del__(self) -> None:
        if self._pid == os.getpid():  # a forked child has the pointers, but neither threads nor device
            self.lib.llama_model_free(self.model)


class _Native:
    """A llama.cpp context and its batch, freed with the last object that refers to them."""

    def __init__(self, weights: _Weights) -> None:
        self._weights, self._lib, self._pid = weights, weights.lib, os.getpid()
        self.ctx: int | None = None
        self.batch: Any = None

    def open(self, params: Any, chunk: int, hidden_size: int, what: str) -> None:
        """A context and a batch of `chunk` embedding rows, all of sequence 0."""
        llama.forget_messages()
        self.ctx = self._lib.llama_init_from_model(self._weights.model, params)
        if not self.ctx:
            raise InputError(f"llama.cpp cannot make {what} ({llama.last_error()}): ask for less, or --kv-cache f16")
        self.batch = self._lib.llama_batch_init(chunk, hidden_size, 1)
        for row in range(chunk):
            self.batch.n_seq_id[row], self.batch.seq_id[row][0] = 1, 0

    def __del__(self) -> None:
        if self._pid != os.getpid():  # as above
            return
        if self.batch is not None:
            self._lib.llama_batch_free(self.batch)
        if self.ctx:
            self._lib.llama_free(self.ctx)
