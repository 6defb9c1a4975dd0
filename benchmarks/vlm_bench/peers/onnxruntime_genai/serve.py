"""Runs in the peer's environment: transformers prepares, ONNX Runtime sees, GenAI splices and generates."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import onnxruntime_genai as og
from PIL import Image
from transformers import AutoProcessor


def serve(
    folder: str,
    checkpoint: str,
    precision: str,
    threads: int,
    prompts: Mapping[str, Any],
    versions: Mapping[str, str],
) -> tuple[Mapping[str, Any], Callable[[str, str | None, int], Mapping[str, Any]]]:
    """Open what the converter wrote and say what it is."""
    facts = {
        "engines": {
            "vision_encoder": "onnxruntime",
            "projector": "onnxruntime",
            "language_model": "onnxruntime-genai",
        },
        "precision": precision,
        "packages": dict(versions),
        "notes": [
            "no LLaVA of its own: rows of plain ONNX Runtime (vision with projector, fp32) given to its picture "
            "pipeline, whose lookup and splice are in prefill; pictures and text are prepared by transformers"
        ],
    }
    return facts, Asking(Path(folder), checkpoint, threads, prompts).answer


class Asking:
    """The opened graphs and the checkpoint's processor."""

    def __init__(self, folder: Path, checkpoint: str, threads: int, prompts: Mapping[str, Any]) -> None:
        self._prompts = prompts
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._vision = ort.InferenceSession(str(folder / "vision.onnx"), options, providers=["CPUExecutionProvider"])
        config = og.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = og.Model(config)
        prepare: Any = AutoProcessor
        self._processor = prepare.from_pretrained(checkpoint)

    def answer(self, prompt: str, image: str | None, max_new_tokens: int) -> dict[str, Any]:
        """One greedy answer of exactly `max_new_tokens` tokens about the picture file `image`, if there is one."""
        start = time.perf_counter()
        stages: dict[str, float] = {}
        rows, ids = None, self._ids(prompt, image is not None)
        if image is not None:
            begun = time.perf_counter()
            with Image.open(image) as opened:
                pixels = self._processor.image_processor(opened.convert("RGB"), return_tensors="np")["pixel_values"]
            seen = time.perf_counter()
            (rows,) = self._vision.run(None, {"pixel_values": np.asarray(pixels, np.float32)})
            stages |= {"preprocess": seen - begun, "vision": time.perf_counter() - seen}
            ids = self._expanded(ids, len(rows))
        generator = self._generator(len(ids) + max_new_tokens)
        begun = time.perf_counter()
        self._prefill(generator, ids, rows)
        prefilled = time.perf_counter()
        times = []
        for _ in range(max_new_tokens):
            generator.generate_next_token()
            times.append(time.perf_counter())
        made = generator.get_sequence(0)[len(ids) :]
        text = self._processor.tokenizer.decode(made, skip_special_tokens=True)
        wall = time.perf_counter() - start
        stages |= {"prefill": prefilled - begun, "first_token": times[0] - prefilled, "decode": times[-1] - times[0]}
        if len(made) != max_new_tokens:
            raise RuntimeError(f"onnxruntime-genai stopped after {len(made)} of {max_new_tokens} tokens")
        return {
            "text": text,
            "wall_ms": wall * 1e3,
            "ttft_ms": (times[0] - start) * 1e3,
            "token_ms": [(b - a) * 1e3 for a, b in itertools.pairwise(times)],
            "stages_ms": {name: seconds * 1e3 for name, seconds in stages.items()},
            "prompt_tokens": len(ids),
            "image_tokens": 0 if rows is None else len(rows),
            "new_tokens": len(made),
            "tiles": None if rows is None else 1,
        }

    def _ids(self, prompt: str, pictured: bool) -> list[int]:
        text = self._prompts["picture" if pictured else "plain"].replace(self._prompts["marker"], prompt)
        bos = self._prompts["bos"]
        special = not (bos and text.startswith(bos))
        ids: list[int] = self._processor.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def _expanded(self, ids: list[int], rows: int) -> list[int]:
        """The image token as often as the picture has rows."""
        image = self._processor.tokenizer.convert_tokens_to_ids(self._prompts["image_token"])
        return [token for one in ids for token in ([one] * rows if one == image else [one])]

    def _generator(self, length: int) -> Any:
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length, min_length=0, do_sample=False, num_beams=1)
        return og.Generator(self._model, parameters)

    def _prefill(self, generator: Any, ids: list[int], rows: Any) -> None:
        given = og.NamedTensors()
        given["num_image_tokens"] = np.array([0 if rows is None else len(rows)], np.int64)
        if rows is not None:
            given["pixel_values"] = np.ascontiguousarray(rows, np.float32)
        generator.set_inputs(given)
        generator.append_tokens(np.array([ids], np.int32))
