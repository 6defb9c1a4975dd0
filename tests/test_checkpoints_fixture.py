"""The tiny checkpoints are what the other tests take them for: transformers loads them whatever the spelling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from checkpoints import SPELLINGS, TEXTS, copy, hf_model, respell
from conftest import MakeTiny


@pytest.mark.parametrize("text", TEXTS)
def test_a_tiny_checkpoint_answers_to_its_picture(make_tiny: MakeTiny, picture: Image.Image, text: str) -> None:
    folder = make_tiny(text=text)
    model, processor = hf_model(folder), transformers.AutoProcessor.from_pretrained(folder)
    white = Image.new("RGB", picture.size, "white")
    logits = [
        model(**processor(images=p, text="USER: <image>\nWhat?", return_tensors="pt")).logits[0, -1].detach()
        for p in (picture, white)
    ]
    assert torch.isfinite(logits[0]).all()
    assert logits[0].std() > 0.2
    assert (logits[0] - logits[1]).norm() / logits[0].norm() > 0.05


@pytest.mark.parametrize("style", SPELLINGS)
def test_every_spelling_holds_the_same_weights(tiny: Path, tmp_path: Path, style: str) -> None:
    plain = hf_model(tiny).state_dict()
    other = hf_model(respell(copy(tiny, tmp_path / "c"), style)).state_dict()
    assert plain.keys() == other.keys()
    assert all(np.array_equal(plain[name], other[name]) for name in plain)
