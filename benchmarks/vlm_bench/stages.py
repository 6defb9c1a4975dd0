"""A bundle as a contestant: whole answers of the runtime, with the time of each stage."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_bench.serving import Answer, Facts
from vlm_models.errors import InputError
from vlm_runtime import vlm
from vlm_runtime.answer import Picture, Request
from vlm_runtime.bundle import Bundle, open_bundle
from vlm_runtime.engine import Options, choose_engines
from vlm_runtime.prompt import render, user_message

QUESTION = "What is in this picture?"


def open_endless(folder: str | Path, engine: str | None, threads: int, *, verify: bool = False) -> vlm.VLM:
    """A VLM whose answers no end token cuts short, so that every repeat decodes as many tokens."""
    bundle = open_bundle(folder, verify=verify)
    prompt = dataclasses.replace(bundle.spec.prompt, eos_token_ids=())
    spec = dataclasses.replace(bundle.spec, prompt=prompt)
    bundle = Bundle(bundle.folder, dataclasses.replace(bundle.manifest, spec=spec))
    return vlm.VLM(bundle, choose_engines(bundle, engine), Options(threads=threads))


def serve_bundle(folder: str, engine: str | None, threads: int) -> tuple[Facts, Answer]:
    """What `serving` needs of a bundle. Raises what opening raises."""
    model = open_endless(folder, engine, threads)
    clock = Clock(model)
    facts = {"engines": model.engines, "precision": precision(model.bundle, model.engines)}
    return {**facts, "max_context": model.max_context}, clock.answer


class Clock:
    """Stands between a model and its decoder: when prefill began and ended, and when each token's logits were there.

    `remove` leaves the model as it was.
    """

    def __init__(self, model: vlm.VLM) -> None:
        self._model, self._prefill, self._ends, self._tiles = model, [0.0, 0.0], list[float](), list[int]()
        self._fitting = set[tuple[str, int]]()
        self._decoder: Any = model.decoder
        self._watch("prefill", self._prefilled)
        self._watch("decode", lambda _, end: self._ends.append(end))
        self._started = 0.0
        picture, request = model.picture, model.request

        def asked(*arguments: Any, started: float, **options: Any) -> Request:
            self._started = started
            return request(*arguments, started=started, **options)

        def watched(image: Any, pictures: int = 1) -> Picture:
            made = picture(image, pictures)
            self._tiles.append(made.layout.tiles)
            return made

        model.picture, model.request = watched, asked  # type: ignore[method-assign]

    def answer(self, prompt: str, image: str | None, max_new_tokens: int) -> Mapping[str, Any]:
        """One answer and its times. Raises InputError when the context would end it before `max_new_tokens`."""
        self.fit(prompt, image, max_new_tokens)
        self._prefill[:] = 0.0, 0.0
        self._ends.clear()
        self._tiles.clear()
        start = time.perf_counter()
        said = self._model.answer(prompt, [image] if image else [], max_new_tokens=max_new_tokens)
        wall = (time.perf_counter() - start) * 1e3
        times, (seconds, end) = said.timings_ms, self._prefill
        picked = self._started + times["ttft"] / 1e3
        tokens = np.diff(np.array([picked, *self._ends]))
        return {
            "text": said.text,
            "wall_ms": wall,
            "ttft_ms": times["ttft"],
            "token_ms": (tokens * 1e3).round(4).tolist(),
            "stages_ms": {
                **{name: times[name] for name in ("preprocess", "vision", "projector") if image},
                "splice": times["prefill"] - seconds * 1e3,
                "prefill": seconds * 1e3,
                "first_token": (picked - end) * 1e3,
                "decode": times["decode"],
            },
            "prompt_tokens": said.prompt_tokens,
            "image_tokens": said.image_tokens,
            "new_tokens": len(said.token_ids),
            "tiles": sum(self._tiles) if image else None,
        }

    def fit(self, prompt: str, image: str | None, max_new_tokens: int) -> None:
        """Raises InputError when such an answer does not fit; looks once for each, in the first one, which warms up."""
        if (prompt, max_new_tokens) in self._fitting:
            return
        pictures, spec = [image] if image else [], self._model.spec.prompt
        text = render([user_message(prompt, len(pictures), spec)], spec)
        request = self._model.request(text, pictures, {"max_new_tokens": max_new_tokens}, started=0.0)
        if request.room < max_new_tokens:
            raise InputError(
                f"{max_new_tokens} tokens after a prompt of {len(request.ids)} do not fit the context of "
                f"{self._model.max_context}: give --max-new-tokens {max(request.room, 1)}, or export with a larger "
                "--max-context"
            )
        self._fitting.add((prompt, max_new_tokens))

    def _prefilled(self, start: float, end: float) -> None:
        self._prefill[:] = self._prefill[0] + end - start, end

    def remove(self) -> None:
        """Stand between them no longer."""
        del self._decoder.prefill, self._decoder.decode, self._model.picture, self._model.request

    def _watch(self, method: str, note: Callable[[float, float], None]) -> None:
        """Let `note` know when each call of the decoder's `method` began and ended."""
        call = getattr(self._decoder, method)

        def watched(rows: Any) -> Any:
            start = time.perf_counter()
            logits = call(rows)
            note(start, time.perf_counter())
            return logits

        setattr(self._decoder, method, watched)


def precision(bundle: Bundle, engines: Mapping[str, str]) -> str:
    """As the manifest has it for these engines: one word where all parts share it, else part by part."""
    words = {part: bundle.part(part, engine).precision for part, engine in engines.items()}
    short = {"vision_encoder": "vision", "language_model": "language"}
    if len(set(words.values())) == 1:
        return words["language_model"]
    return ",".join(f"{short.get(part, part)}={word}" for part, word in words.items())


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
    """The picture with a small square of another grey for each repeat, so that no cache knows it.

    In the middle, where no crop takes it away.
    """
    copy = picture.convert("RGB")
    side, (x, y) = max(1, min(copy.size) // 16), (copy.width // 2, copy.height // 2)
    copy.paste((number * 37 % 256,) * 3, (x - side // 2, y - side // 2, x - side // 2 + side, y - side // 2 + side))
    return copy
