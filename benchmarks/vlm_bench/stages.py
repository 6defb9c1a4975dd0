"""One repeat of a bundle: vision, projector, prefill, decode, and a whole answer to its first token."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_bench.measure import Rep
from vlm_models.errors import InputError
from vlm_runtime import vlm
from vlm_runtime.bundle import Bundle, open_bundle
from vlm_runtime.engine import Options, choose_engines
from vlm_runtime.image import open_image

QUESTION = "What is in this picture?"


def open_endless(folder: str | Path, engine: str | None, threads: int, *, verify: bool = False) -> vlm.VLM:
    """A VLM whose answers no end token cuts short, so that every repeat decodes as many tokens."""
    bundle = open_bundle(folder, verify=verify)
    prompt = dataclasses.replace(bundle.spec.prompt, eos_token_ids=())
    spec = dataclasses.replace(bundle.spec, prompt=prompt)
    bundle = Bundle(bundle.folder, dataclasses.replace(bundle.manifest, spec=spec))
    return vlm.VLM(bundle, choose_engines(bundle, engine), Options(threads=threads))


def make(
    folder: str, image: str | None, engine: str | None, threads: int, prefill_tokens: int, decode_tokens: int
) -> Rep:
    """A repeat on the bundle in `folder`; `image` None takes a picture of noise. Raises what opening raises."""
    model = open_endless(folder, engine, threads)
    picture = open_image(image) if image else None
    check_room(model, prefill_tokens, decode_tokens)

    def rep(number: int) -> Mapping[str, float]:
        shown = noise(number) if picture is None else marked(picture, number)
        values = encode(model, shown)
        values |= decode(model, prefill_tokens, decode_tokens)
        answer = model.answer(QUESTION, [shown], max_new_tokens=2)
        return {**values, "ttft_ms": answer.timings_ms["ttft"]}

    return rep


def encode(model: vlm.VLM, image: Image.Image) -> dict[str, float]:
    """Milliseconds of preprocessing, vision encoder and projector for one picture."""
    times = [time.perf_counter()]
    pixels = model.picture(image).pixels
    times.append(time.perf_counter())
    features = model.vision_encoder.run(pixels)
    times.append(time.perf_counter())
    model.projector.run(features)
    times.append(time.perf_counter())
    names = ("preprocess_ms", "vision_ms", "projector_ms")
    return {name: (b - a) * 1e3 for name, a, b in zip(names, times, times[1:], strict=False)}


def decode(model: vlm.VLM, prefill_tokens: int, decode_tokens: int) -> dict[str, float]:
    """Prefill of `prefill_tokens` looked-up rows, then greedy decoding from there."""
    rng = np.random.default_rng(prefill_tokens)
    rows = model.embedding.rows(rng.integers(0, model.embedding.rows_count, prefill_tokens))
    model.decoder.rewind(0)
    start = time.perf_counter()
    logits = model.decoder.prefill(rows)
    prefilled = time.perf_counter()
    row = np.empty(rows.shape[1], np.float32)
    for _ in range(decode_tokens):
        model.embedding.row_into(int(logits.argmax()), row)
        logits = model.decoder.decode(row)
    seconds = time.perf_counter() - prefilled
    return {"prefill_ms": (prefilled - start) * 1e3, "decode_tokens_per_s": decode_tokens / seconds}


def check_room(model: vlm.VLM, prefill_tokens: int, decode_tokens: int) -> None:
    """Raises InputError when the bundle's context is too short."""
    if prefill_tokens < 1 or decode_tokens < 1:
        raise InputError("prefill and decode tokens must be 1 or more each")
    if prefill_tokens + decode_tokens > model.max_context:
        raise InputError(
            f"{prefill_tokens} prefill and {decode_tokens} decode tokens do not fit the context of "
            f"{model.max_context}: give fewer, or export with a larger --max-context"
        )


def noise(number: int, size: int = 336) -> Image.Image:
    """A picture that no cache has seen."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8))


def marked(picture: Image.Image, number: int) -> Image.Image:
    """The picture with one corner of a different grey for each repeat, so that no cache knows it."""
    copy = picture.convert("RGB")
    side = max(1, min(copy.size) // 16)
    copy.paste((number * 37 % 256,) * 3, (0, 0, side, side))
    return copy
