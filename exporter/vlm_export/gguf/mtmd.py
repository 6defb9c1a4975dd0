"""What llama.cpp's own image path makes of a picture with our mmproj.gguf, measured against the checkpoint."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_export.gguf.architecture import embed_scale
from vlm_export.parity import distance
from vlm_export.reference import Reference
from vlm_models.errors import BundleError
from vlm_models.spec import PreprocessSpec, VLMSpec
from vlm_runtime import llama
from vlm_runtime.engine import Options, thread_count
from vlm_runtime.engines.gguf import GgufDecoder
from vlm_runtime.image import open_image

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

CLOSE = 0.999
"""Cosine of the projected rows from which on llama.cpp's image path is called equal to the checkpoint's."""

_BICUBIC = 3  # Pillow's number of the one filter that llama.cpp scales with
CLASS_ROW_ISSUE = "ggml-org/llama.cpp#25814 (a fix is open as #25844)"


class Mtmd:
    """An mmproj file opened by llama.cpp's multimodal library for a language model."""

    def __init__(
        self, mmproj: Path, language_gguf: Path, *, threads: int | None = None, flash_attention: bool | None = None
    ) -> None:
        """Raises BundleError with llama.cpp's reason, DependencyError where it is not installed."""
        self._lib = llama.multimodal()
        self._model = llama.load_model(language_gguf)  # without one llama.cpp counts rows by an unset variable
        params = self._lib.mtmd_context_params_default()
        params.use_gpu, params.print_timings = False, False
        params.n_threads = thread_count(Options(threads=threads))
        params.flash_attn_type = -1 if flash_attention is None else int(flash_attention)
        params.warmup = flash_attention is None  # where the choice is llama.cpp's, it tries it out first
        llama.forget_messages()
        self._context = self._lib.mtmd_init_from_file(os.fsencode(mmproj), self._model, params)
        if not self._context:
            llama.library().llama_model_free(self._model)
            raise BundleError(f"{mmproj.name} cannot be opened by llama.cpp ({llama.last_error()}): export again")

    def rows(self, pixels: Pixels, width: int) -> Floats:
        """Projected rows (T, width) of an RGB picture (h, w, 3) of any size, prepared as llama.cpp does.

        Raises BundleError where llama.cpp cannot take the picture.
        """
        with self._chunks(pixels) as chunks:
            found = []
            for i in range(self._lib.mtmd_input_chunks_size(chunks)):
                chunk = self._lib.mtmd_input_chunks_get(chunks, i)
                count = int(self._lib.mtmd_input_chunk_get_n_tokens(chunk))
                if self._lib.mtmd_encode_chunk(self._context, chunk):
                    raise BundleError(f"llama.cpp cannot encode the picture: {llama.last_error()}")
                values = self._lib.mtmd_get_output_embd(self._context)
                found.append(np.ctypeslib.as_array(values, (count, width)).copy())
        return np.concatenate(found)

    @contextmanager
    def _chunks(self, pixels: Pixels) -> Iterator[Any]:
        """The picture alone, as one marker."""
        lib, (height, width, _) = self._lib, pixels.shape
        marker = lib.mtmd_default_marker()
        text = lib.mtmd_input_text()
        text.text, text.text_len, text.add_special, text.parse_special = marker, len(marker), False, True
        data = np.ascontiguousarray(pixels)
        bitmap = lib.mtmd_bitmap_init(width, height, data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        chunks = lib.mtmd_input_chunks_init()
        try:
            pictures = (ctypes.c_void_p * 1)(bitmap)
            if lib.mtmd_tokenize(self._context, chunks, ctypes.byref(text), pictures, 1):
                raise BundleError(f"llama.cpp cannot prepare a picture of {width} × {height}: {llama.last_error()}")
            yield chunks
        finally:
            lib.mtmd_input_chunks_free(chunks)
            lib.mtmd_bitmap_free(bitmap)

    def close(self) -> None:
        """Free tower and model."""
        self._lib.mtmd_free(self._context)
        llama.library().llama_model_free(self._model)


def measure_mmproj(
    mmproj: Path, language_gguf: Path, picture: Path, reference: Reference, spec: VLMSpec, *, threads: int | None = None
) -> dict[str, Any]:
    """The manifest's record of an mmproj file: how far llama.cpp's rows and logits are from the reference.

    "prepared" is the picture as the checkpoint's preprocessing makes it, handed over at its final size; "as_it_is" the
    file, scaled and padded by llama.cpp. Each has {"rows": n, "image_embeds": cosine, max_abs, relative_l2 (None where
    the number of rows differs), "logits": the same of the last row of the golden prompt}. "exact" has the logits of the
    same GGUF with the reference's own rows: what the language model's precision costs. "note" is a sentence for people.
    """
    scale = np.float32(embed_scale(spec.language))
    tower = Mtmd(mmproj, language_gguf, threads=threads)
    pictures = {"prepared": bitmap(reference.pixel_values[0], spec.preprocess)}
    pictures["as_it_is"] = np.asarray(open_image(picture), np.uint8)
    width = spec.projector.out_features
    rows = {name: tower.rows(pixels, width) * scale for name, pixels in pictures.items()}
    tower.close()
    decoder = GgufDecoder(
        language_gguf,
        hidden_size=spec.language.hidden_size,
        vocab_size=spec.language.vocab_size,
        max_context=len(reference.prompt_ids) + spec.prompt.image_tokens,
        threads=thread_count(Options(threads=threads)),
        kv_cache="f32",
        flash_attention=False,
        embed_scale=float(scale),
    )
    exact = reference.image_embeds[0]
    found: dict[str, Any] = {"exact": {"logits": _logits(decoder, reference, exact, spec)}}
    for name, given in rows.items():
        same = given.shape == exact.shape
        found[name] = {
            "rows": len(given),
            "image_embeds": distance(exact, given) if same else None,
            "logits": _logits(decoder, reference, given, spec),
        }
    return {**found, "note": note(found, spec)}


def bitmap(pixel_values: Floats, spec: PreprocessSpec) -> Pixels:
    """The 8-bit RGB picture (s, s, 3) that normalises to pixel values (3, s, s)."""
    mean, std = (np.array(values, np.float64)[:, None, None] for values in (spec.mean, spec.std))
    levels = np.rint((pixel_values * std + mean) / spec.rescale)
    return np.ascontiguousarray(np.clip(levels, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def note(found: dict[str, Any], spec: VLMSpec) -> str:
    """One sentence: whether llama.cpp's image path sees what the checkpoint sees, and what to do where it does not."""
    prepared, as_it_is = (_cosine(found[name]) for name in ("prepared", "as_it_is"))
    clip = spec.vision.model_type.startswith("clip")
    if prepared < CLOSE:
        cause = f"known upstream: {CLASS_ROW_ISSUE}" if clip else "not known why"
        return (
            f"llama.cpp's own image path deviates from the checkpoint (cosine {prepared:.3f}; {cause}): mmproj.gguf is "
            "for trying out, answer with vlm-run, which does not use it"
        )
    order = f"; mmproj.gguf is for llama.cpp as it is before the fix of {CLASS_ROW_ISSUE}" if clip else ""
    if as_it_is < CLOSE:
        p, size = spec.preprocess, spec.vision.image_size
        square = (p.resize, p.crop, p.pad, p.resample) == ("shortest_edge", p.size, "none", _BICUBIC)
        which = (
            "square pictures; others it pads" if square else f"pictures of {size} × {size}; others it pads and scales"
        )
        return (
            f"llama.cpp's own image path equals the checkpoint (cosine {prepared:.6f}) on {which} where the checkpoint "
            f"does not (cosine {as_it_is:.3f} on the golden picture): prepare them first, or use vlm-run{order}"
        )
    return f"llama.cpp's own image path equals the checkpoint (cosine {as_it_is:.6f}){order}"


def _cosine(of: dict[str, Any]) -> float:
    return float(of["image_embeds"]["cosine"]) if of["image_embeds"] is not None else 0.0


def _logits(decoder: GgufDecoder, reference: Reference, rows: Floats, spec: VLMSpec) -> dict[str, float]:
    """Distance of the logits after the golden prompt with `rows` at its picture's place; one picture per prompt."""
    at = np.flatnonzero(np.array(reference.prompt_ids) == spec.prompt.image_token_id)
    embeds = np.concatenate([reference.inputs_embeds[: at[0]], rows, reference.inputs_embeds[at[-1] + 1 :]])
    decoder.rewind(0)
    return distance(reference.logits[0], decoder.prefill(embeds))
