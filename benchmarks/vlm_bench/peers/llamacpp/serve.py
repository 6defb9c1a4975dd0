"""Runs in the peer's environment: llama.cpp with a GGUF and an mmproj file, as its llama-mtmd-cli goes about it.

libmtmd prepares and encodes the picture, llama.cpp decodes its rows and the text, the sampler takes the best token.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import llama_cpp as llama
import numpy as np
from llama_cpp import mtmd_cpp as mtmd
from PIL import Image

_BATCH = 2048


def serve(
    language: str,
    mmproj: str,
    precision: str,
    threads: int,
    context: int,
    prompts: Mapping[str, Any],
    versions: Mapping[str, str],
) -> tuple[Mapping[str, Any], Callable[[str, str | None, int], Mapping[str, Any]]]:
    """Open both files and say what they are."""
    llama.llama_backend_init()
    asking = Asking(language, mmproj, threads, context, prompts)
    facts = {
        "engines": {"vision_encoder": "llama.cpp", "projector": "llama.cpp", "language_model": "llama.cpp"},
        "precision": precision,
        "max_context": context,
        "packages": dict(versions),
        "notes": ["preprocess includes the tokens of the text, vision the projector; KV cache in fp16"],
    }
    return facts, asking.answer


class Asking:
    """Both files, opened."""

    def __init__(self, language: str, mmproj: str, threads: int, context: int, prompts: Mapping[str, Any]) -> None:
        self._prompts = prompts
        model: Any = llama.llama_model_default_params()
        model.n_gpu_layers = 0
        self._model = _opened(llama.llama_model_load_from_file(os.fsencode(language), model), language)
        params: Any = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, _BATCH, 512
        params.n_threads = params.n_threads_batch = threads
        self._context: Any = _opened(llama.llama_init_from_model(self._model, params), language)
        tower: Any = mtmd.mtmd_context_params_default()
        tower.use_gpu, tower.print_timings, tower.n_threads = False, False, threads
        self._tower: Any = _opened(mtmd.mtmd_init_from_file(os.fsencode(mmproj), self._model, tower), mmproj)
        self._vocab = llama.llama_model_get_vocab(self._model)
        self._sampler: Any = llama.llama_sampler_init_greedy()

    def answer(self, prompt: str, image: str | None, max_new_tokens: int) -> dict[str, Any]:
        """One greedy answer of exactly `max_new_tokens` tokens about the picture file `image`, if there is one."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        start = time.perf_counter()
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            self._tokenize(chunks, prompt, image)
            seconds = {"preprocess": time.perf_counter() - start, "vision": 0.0, "prefill": 0.0}
            tokens, rows = self._prefill(chunks, seconds)
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
        prefilled = time.perf_counter()
        ids, times = self._decode(max_new_tokens)
        text = b"".join(map(self._piece, ids)).decode("utf-8", "replace")
        wall = time.perf_counter() - start
        stages = {**seconds, "first_token": times[0] - prefilled, "decode": times[-1] - times[0]}
        if image is None:
            del stages["preprocess"], stages["vision"]
        return {
            "text": text,
            "wall_ms": wall * 1e3,
            "ttft_ms": (times[0] - start) * 1e3,
            "token_ms": [(b - a) * 1e3 for a, b in itertools.pairwise(times)],
            "stages_ms": {name: value * 1e3 for name, value in stages.items()},
            "prompt_tokens": tokens,
            "image_tokens": rows,
            "new_tokens": len(ids),
        }

    def _tokenize(self, chunks: Any, prompt: str, image: str | None) -> None:
        """The prompt as chunks of text and picture, which is prepared on the way."""
        written = self._prompts["plain" if image is None else "picture"]
        marker = mtmd.mtmd_default_marker()
        before, token, after = written.partition(self._prompts["image_token"])
        content = (
            (before + (marker.decode() if token else "") + after).replace(self._prompts["marker"], prompt).encode()
        )
        bos = self._prompts["bos"]
        text: Any = mtmd.mtmd_input_text()
        text.text, text.text_len, text.parse_special = content, len(content), True
        text.add_special = not (bos and written.startswith(bos))
        bitmaps = []
        if image is not None:
            with Image.open(image) as opened:
                pixels = np.ascontiguousarray(opened.convert("RGB"), np.uint8)
            data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            bitmaps.append(mtmd.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], data))
        try:
            given = (ctypes.c_void_p * len(bitmaps))(*bitmaps)
            if mtmd.mtmd_tokenize(self._tower, chunks, ctypes.byref(text), given, len(bitmaps)):
                raise RuntimeError("llama.cpp cannot prepare the prompt")
        finally:
            for bitmap in bitmaps:
                mtmd.mtmd_bitmap_free(bitmap)

    def _prefill(self, chunks: Any, seconds: dict[str, float]) -> tuple[int, int]:
        """Encode and decode all chunks, adding up `seconds`; how many positions, and how many are the picture's."""
        past, pictured, count = llama.llama_pos(0), 0, mtmd.mtmd_input_chunks_size(chunks)
        total = 0
        for i in range(count):
            chunk: Any = mtmd.mtmd_input_chunks_get(chunks, i)
            size, start = int(mtmd.mtmd_input_chunk_get_n_tokens(chunk)), time.perf_counter()
            total += size
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                failed = mtmd.mtmd_helper_eval_chunk_single(
                    self._tower, self._context, chunk, past, 0, _BATCH, i == count - 1, ctypes.byref(past)
                )
            else:
                pictured += size
                failed = mtmd.mtmd_encode_chunk(self._tower, chunk)
                seconds["vision"] += time.perf_counter() - start
                start = time.perf_counter()
                rows: Any = mtmd.mtmd_get_output_embd(self._tower)
                none: Any = mtmd.mtmd_helper_post_decode_callback(0)
                failed = failed or mtmd.mtmd_helper_decode_image_chunk(
                    self._tower, self._context, chunk, rows, past, 0, _BATCH, ctypes.byref(past), none, None
                )
            seconds["prefill"] += time.perf_counter() - start
            if failed:
                raise RuntimeError(f"llama.cpp cannot take part {i + 1} of the prompt (code {failed})")
        return total, pictured

    def _decode(self, count: int) -> tuple[list[int], list[float]]:
        """`count` tokens and the moment of each; end tokens are decoded as any other."""
        ids: list[int] = []
        times: list[float] = []
        for n in range(count):
            ids.append(int(llama.llama_sampler_sample(self._sampler, self._context, -1)))
            times.append(time.perf_counter())
            if n < count - 1:
                token = (llama.llama_token * 1)(ids[-1])
                if code := llama.llama_decode(self._context, llama.llama_batch_get_one(token, 1)):
                    raise RuntimeError(f"llama.cpp stopped after {n + 1} of {count} tokens (code {code})")
        return ids, times

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        size = llama.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[: max(size, 0)]


def _opened(handle: Any, file: str) -> Any:
    if not handle:
        raise RuntimeError(f"llama.cpp cannot open {file}")
    return handle
