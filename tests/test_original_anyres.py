"""LLaVA 1.6 and LLaVA-NeXT's later code in the original layout: tiles that are whole, and tiles that are shrunk."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

import vlm_runtime
from exporting import exported
from originals import TOWER_NAMES, _original, _write_sentencepiece
from tiled import EDGE, hf_tiled, noise, tiny_tiled
from vlm_export.reference import compute_reference
from vlm_export.reference_prompt import question_text
from vlm_models.model import load_model
from vlm_runtime.manifest import read_manifest

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
QUESTION = "What colour is the large circle?"
SIZES = ((41, 57), (127, 31), (168, 168))
CASES: dict[str, dict[str, Any]] = {
    "clip, whole": {"family": "llava_next", "aspect": "anyres"},
    "siglip, whole": {"family": "llava_next", "tower": "siglip", "aspect": "anyres"},
    "clip, shrunk": {"family": "llava_onevision", "max_grid": 2, "aspect": "anyres_max_2"},
    "siglip, shrunk": {"family": "llava_onevision", "tower": "siglip", "max_grid": 2, "aspect": "anyres_max_2"},
}


@dataclass(frozen=True)
class Made:
    """`folder` in the original layout, `twin` the same as transformers has it."""

    folder: Path
    twin: Path


def original(root: Path, aspect: str, **options: Any) -> Made:
    """The files that LLaVA's `save_pretrained` writes; grids are (width, height) there."""
    twin = tiny_tiled(root / "twin", **options)
    folder = root / "llava-v1.6-vicuna-tiny"
    folder.mkdir()
    tensors = load_file(twin / "model.safetensors")
    named = {_original(name, TOWER_NAMES[0]): tensor.clone() for name, tensor in tensors.items()}
    named = {f"model.{n}" if n == "image_newline" else n: tensor for n, tensor in named.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    whole = json.loads((twin / "config.json").read_text())
    pinpoints = [[width, height] for height, width in whole["image_grid_pinpoints"]]
    config = {
        **whole["text_config"],
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "tie_word_embeddings": whole["tie_word_embeddings"],
        "mm_vision_tower": "../tower",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": whole["vision_config"]["hidden_size"],
        "mm_vision_select_layer": whole["vision_feature_layer"],
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": aspect,
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": pinpoints,
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_sentencepiece(folder)
    (root / "tower").mkdir()
    (root / "tower/config.json").write_text(json.dumps(whole["vision_config"]))
    (root / "tower/preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return Made(folder, twin)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """The folders of a case, written once. Read only."""
    return functools.cache(lambda case: original(tmp_path_factory.mktemp("original"), **CASES[case]))


def tile_processor(made: Made, family: str) -> Any:
    """transformers' own, with the numbers that the tower's folder has."""
    pinpoints = json.loads((made.twin / "config.json").read_text())["image_grid_pinpoints"]
    common: dict[str, Any] = {"image_mean": MEAN, "image_std": STD, "image_grid_pinpoints": pinpoints}
    square = {"height": EDGE, "width": EDGE}
    if family == "llava_next":
        return LlavaNextImageProcessorPil(size={"shortest_edge": EDGE}, crop_size=square, **common)
    return LlavaOnevisionImageProcessorPil(size=square, **common)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_tiles_and_rows_are_those_of_the_twin(
    make: Callable[[str], Made], tmp_path: Path, case: str, size: tuple[int, int]
) -> None:
    made, picture = make(case), tmp_path / "picture.png"
    noise(size).save(picture)
    model = load_model(made.folder)
    reference = compute_reference(model, picture, question_text(model, QUESTION), tokens=4)
    own = tile_processor(made, CASES[case]["family"])(images=noise(size), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(reference.pixel_values, own, rtol=0, atol=1e-5)
    twin = hf_tiled(made.twin)
    with torch.inference_mode():
        sizes = torch.tensor([size])
        found = twin.model.get_image_features(torch.from_numpy(reference.pixel_values)[None], image_sizes=sizes)
    (rows,) = found.pooler_output
    ids = np.array(reference.prompt_ids)
    image = ids == model.spec.prompt.image_token_id
    assert image.sum() == len(rows)
    np.testing.assert_allclose(reference.inputs_embeds[image], rows.numpy(), rtol=0, atol=1e-5)
    assert np.ptp(np.flatnonzero(image)) == len(rows) - 1


@pytest.mark.parametrize("case", ["clip, whole", pytest.param("siglip, shrunk", marks=pytest.mark.slow)])
def test_the_bundle_passes_its_check_and_answers(
    make: Callable[[str], Made], tmp_path_factory: pytest.TempPathFactory, case: str
) -> None:
    bundle = exported(make(case).folder, tmp_path_factory)
    record = read_manifest(bundle).parity["onnx"]
    assert record["passed"]
    assert record["greedy"]["equal"] == record["greedy"]["of"]
    answer = vlm_runtime.load(bundle, threads=1).answer(QUESTION, [noise((41, 57))], max_new_tokens=4)
    assert answer.image_tokens > 16


def test_tiles_that_are_shrunk_are_not_taken_for_whole_ones(make: Callable[[str], Made]) -> None:
    """One word of image_aspect_ratio tells them apart, whatever the tower is."""
    found = {case: load_model(make(case).folder).spec.tiling for case in CASES}
    assert {case: tiling.max_grid for case, tiling in found.items() if tiling} == {
        case: 2 if "shrunk" in case else 0 for case in CASES
    }
