"""Ranges of what linear layers are given: equal to what hooks in transformers' own model see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from checkpoints import hf_model
from conftest import MakeTiny
from vlm_export import activation_ranges
from vlm_export.activation_ranges import language_ranges, vision_ranges
from vlm_export.importance import Example
from vlm_models.errors import CheckpointError, ImageError
from vlm_models.model import load_model
from vlm_quant.calibration import Calibration, Pair, read_pairs
from vlm_quant.ranges import Method

TOWERS: dict[str, dict[str, Any]] = {
    "clip": {"feature_layer": [-2, -1], "projector_bias": False},
    "siglip": {"tower": "siglip", "strategy": "full", "feature_layer": -1},
}
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
FUSED["up_proj"] = "gate_up_proj"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """Three questions with answers about two pictures."""
    folder = tmp_path_factory.mktemp("pairs")
    rng, lines = np.random.default_rng(0), []
    for i in range(2):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    for i, prompt in enumerate(("What colour is it?", "How many squares are there?", "Which?")):
        lines.append(json.dumps({"image": f"{i % 2}.png", "prompt": prompt, "answer": "It is red."}))
    (folder / "calibration.jsonl").write_text("\n".join(lines))
    return read_pairs(folder)


def seen_by_hooks(folder: Path, pairs: Calibration) -> dict[str, tuple[float, float]]:
    """Least and largest input of every Linear of transformers' model, fed by transformers' processor."""
    model = hf_model(folder)
    processor: Any = transformers.AutoProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]
    ranges: dict[str, tuple[float, float]] = {}
    first_read = 0
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear):

            def hook(module: Any, given: Any, name: str = name) -> None:
                x = given[0][0, first_read:] if name == "lm_head" else given[0]
                low, high = ranges.get(name, (0.0, 0.0))
                ranges[name] = min(low, float(x.min())), max(high, float(x.max()))

            part.register_forward_pre_hook(hook)
    for pair in pairs.pairs:
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": pair.prompt}]}
        asked = processor.apply_chat_template([user], add_generation_prompt=True)
        said = processor.apply_chat_template([user, {"role": "assistant", "content": pair.answer}])
        picture = Image.open(pair.image).convert("RGB")
        first_read = processor(images=picture, text=asked, return_tensors="pt")["input_ids"].shape[1] - 1
        with torch.inference_mode():
            model(**processor(images=picture, text=said, return_tensors="pt"))
    return {name.removeprefix("model."): found for name, found in ranges.items()}


def agree(got: tuple[float, float], want: tuple[float, float]) -> bool:
    return got == pytest.approx(want, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("tower", TOWERS)
def test_vision_ranges_are_those_of_transformers(make_tiny: MakeTiny, pairs: Calibration, tower: str) -> None:
    folder = make_tiny(**TOWERS[tower])
    got = vision_ranges(load_model(folder), pairs)
    want = {}
    for name, found in seen_by_hooks(folder, pairs).items():
        if name.startswith(("vision_tower.", "multi_modal_projector.")):
            want[name.replace("vision_tower.", "tower.").removeprefix("multi_modal_projector.")] = found
    live = {name for name in want if not name.startswith("tower.head.")}  # SigLIP's pooling, which LLaVA never reads
    assert {name for name in got if not name.startswith("tower.head.")} == live
    assert len(live) == 3 * 6 + 2
    assert all(agree(got[name], want[name]) for name in live)


@pytest.mark.parametrize("text", ["llama", "phi3", "gemma2"])
def test_language_ranges_are_those_of_transformers(make_tiny: MakeTiny, pairs: Calibration, text: str) -> None:
    """Under the names that the walk gives to layers, whose matrices may be stored together."""
    folder = make_tiny(text=text)
    model = load_model(folder)
    got, seen = language_ranges(model, pairs), seen_by_hooks(folder, pairs)
    assert len(got) == 3 * 7 + 1
    for layer, found in got.items():
        *path, last = layer.split(".")
        fused = ".".join(["language_model", *path, FUSED.get(last, last)])
        want = seen["lm_head"] if layer == "lm_head" else seen.get(f"language_model.{layer}") or seen[fused]
        assert agree(found, want), layer


def test_methods_reach_the_histograms(tiny: Path, pairs: Calibration) -> None:
    model = load_model(tiny)
    measures: tuple[Callable[..., Any], ...] = (vision_ranges, language_ranges)
    for measure in measures:
        widths: dict[str, float] = {}
        methods: tuple[Method, ...] = ("minmax", "p99.99", "p99.9")
        for method in methods:
            found = measure(model, pairs, method=method)
            widths[method] = sum(high - low for low, high in found.values())
        assert widths["p99.9"] < widths["p99.99"] <= widths["minmax"]
        assert measure(model, pairs, samples=1) != measure(model, pairs)


def test_hooks_do_not_outlive_the_measurement(tiny: Path, pairs: Calibration, tmp_path: Path) -> None:
    """Also when a picture cannot be read."""
    model = load_model(tiny)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"bad\.png is not a picture"):
        vision_ranges(model, Calibration((Pair(tmp_path / "bad.png", "What?"),)))
    vision_ranges(model, pairs)
    assert not any(layer._forward_pre_hooks for layer in model.vision_encoder().modules())


def test_progress_counts_each_picture_once(tiny: Path, pairs: Calibration) -> None:
    steps: list[tuple[str, int, int]] = []
    vision_ranges(load_model(tiny), pairs, progress=lambda *step: steps.append(step))
    assert steps == [("calibration", 1, 2), ("calibration", 2, 2)]
    steps.clear()
    language_ranges(load_model(tiny), pairs, progress=lambda *step: steps.append(step))
    assert steps[-1] == ("ranges", 12, 12)  # 3 layers and what leads to the head, of 3 sequences


def test_numbers_beyond_float32_are_one_line(tiny: Path, pairs: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny)
    with torch.no_grad():
        next(model.vision_encoder().parameters())[0] = torch.nan
    with pytest.raises(CheckpointError, match=r"^[^\n]*calibration gives 'tower.*' inputs beyond float32[^\n]*$"):
        vision_ranges(model, pairs)
    broken = Example(torch.full((5, model.spec.language.hidden_size), torch.inf), 0)
    monkeypatch.setattr(activation_ranges, "examples", lambda *args, **keywords: [broken])
    with pytest.raises(CheckpointError, match=r"^[^\n]*calibration gives 'layers.0.*' inputs beyond float32[^\n]*$"):
        language_ranges(model, pairs)
