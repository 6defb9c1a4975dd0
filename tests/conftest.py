"""Shared fixtures: tiny checkpoints made once per session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from PIL import Image

from checkpoints import tiny_llava
from no_skips import pytest_runtest_makereport  # noqa: F401

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A busy machine is not a fault.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

MakeTiny = Callable[..., Path]


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeTiny:
    """`make_tiny(text=…, tower=…, …)`: the folder of a tiny checkpoint, written once per set of options. Read only."""
    made: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            name = f"{options.get('text', 'llama')}-{options.get('tower', 'clip')}"
            made[key] = tiny_llava(tmp_path_factory.mktemp(name) / "checkpoint", **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny(make_tiny: MakeTiny) -> Path:
    """Llama + CLIP, float32. Read only: copy it before damaging it."""
    return make_tiny()


@pytest.fixture(scope="session")
def tiny_siglip(make_tiny: MakeTiny) -> Path:
    """Qwen2 + SigLIP, bfloat16, every patch kept. Read only."""
    return make_tiny(text="qwen2", tower="siglip", strategy="full", feature_layer=-1, dtype="bfloat16")


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """A 57 × 41 RGB picture with structure at every scale."""
    rng = np.random.default_rng(7)
    coarse = np.kron(rng.integers(0, 255, (6, 8, 3)), np.ones((7, 8, 1)))[:41, :57]
    return Image.fromarray(np.clip(coarse + rng.normal(0, 20, coarse.shape), 0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def picture_file(picture: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same picture as a PNG file."""
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    picture.save(path)
    return path
