"""What tests of answers and conversations share: pictures, counted engine parts, an answer made the slow way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from running import IMAGE_TOKENS
from vlm_runtime.engines import onnx
from vlm_runtime.splice import splice
from vlm_runtime.vlm import VLM, load


def painted(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 50, 3), np.uint8)
    return Image.fromarray(pixels)


class Counted:
    """An engine part that counts: how often `run`, how many rows `prefill` and `decode` were given."""

    def __init__(self, of: Any) -> None:
        self.of, self.runs, self.rows, self.steps, self.fail_at = of, 0, 0, 0, -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)

    def run(self, x: np.ndarray) -> np.ndarray:
        self.runs += 1
        return self.of.run(x)

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        self.rows += len(embeds)
        return self.of.prefill(embeds)

    def decode(self, embed: np.ndarray) -> np.ndarray:
        self.steps += 1
        if self.steps == self.fail_at:
            raise KeyboardInterrupt
        return self.of.decode(embed)


def load_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[VLM, Counted, Counted]:
    """A fresh VLM, its counted vision encoder and decoder."""
    decoders = []

    def decoder(*args: Any) -> Counted:
        decoders.append(Counted(original(*args)))
        return decoders[0]

    original = onnx.decoder
    monkeypatch.setattr(onnx, "decoder", decoder)
    vlm = load(folder, threads=1)
    vlm.vision_encoder = vision = Counted(vlm.vision_encoder)
    return vlm, vision, decoders[0]


def from_scratch(vlm: VLM, text: str, images: list[Image.Image], count: int) -> list[int]:
    """Greedy tokens, the whole prompt prefilled anew for each."""
    prompt = vlm.spec.prompt
    ids = []
    for token in vlm.tokenizer.encode(text):
        ids += [token] * (IMAGE_TOKENS if token == prompt.image_token_id else 1)
    rows = [vlm.projector.run(vlm.vision_encoder.run(vlm.picture(image).pixels))[0] for image in images]
    made: list[int] = []
    for _ in range(count):
        vlm.decoder.rewind(0)
        embeds = np.concatenate([splice(ids, rows, vlm.embedding), vlm.embedding.rows(made)])
        made.append(int(vlm.decoder.prefill(embeds).argmax()))
    vlm.decoder.rewind(0)
    return made
