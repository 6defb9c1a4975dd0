"""InternVL through the whole line, against transformers' own model, image processor and tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

import vlm_runtime
from checkpoints import copy
from exporting import Command, command, copy_parts, exported, rewrite
from shuffled import SIZES, check_answer, check_pictures, check_reference, noise, tiny_internvl
from vlm_export import export
from vlm_models import shuffle
from vlm_models.checkpoint import open_checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.family import read_spec
from vlm_models.model import load_model
from vlm_runtime.manifest import read_manifest
from vlm_runtime.tiling import Layout
from vlm_runtime.tilings import ratio
from vlm_runtime.vlm import VLM

run = pytest.fixture(command)
ONE = "<|im_start|>user\n<IMG_CONTEXT>\nWhat colour is the circle?<|im_end|>\n<|im_start|>assistant\n"
TWO = "<|im_start|>user\nFirst <IMG_CONTEXT>, then <IMG_CONTEXT>\nHow many squares?<|im_end|>\n<|im_start|>assistant\n"
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "queries and keys normalised, RMSNorm, biases": {
        "text": "qwen3",
        "tower": {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": True},
    },
    "a norm at the end, an earlier layer": {
        "text": "llama",
        "tower": {"use_mean_pooling": False},
        "vision_feature_layer": -2,
    },
    "a norm at the end": {"tower": {"use_mean_pooling": False}, "projector_hidden_act": "gelu_pytorch_tanh"},
    "one tile": {"processor": {"max_patches": 1}},
    "two to four tiles": {"processor": {"min_patches": 2, "max_patches": 4}},
}
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(case)`: the folder of a tiny checkpoint, written once. Read only."""
    return functools.cache(lambda case: tiny_internvl(tmp_path_factory.mktemp("internvl") / "it", **CASES[case]))


@pytest.fixture
def vlm(make: Make, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return vlm_runtime.load(exported(make("plain"), tmp_path_factory), threads=1)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_equals_transformers(make: Make, case: str) -> None:
    check_reference(make(case), ONE, [noise((101, 77))])
    check_reference(make(case), TWO, [noise((33, 90)), noise((40, 40))])


def test_the_export_passes_its_check(make: Make, tmp_path_factory: pytest.TempPathFactory) -> None:
    manifest = read_manifest(exported(make("plain"), tmp_path_factory))
    record = manifest.parity["onnx"]
    assert record["passed"]
    assert record["stages"]["pixel_values"]["max_abs"] <= 1e-6
    assert record["greedy"]["equal"] == 32
    assert manifest.spec.tile_tokens == 4


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_and_prompt_equal_transformers_whatever_the_size(vlm: VLM, make: Make, size: tuple[int, int]) -> None:
    check_pictures(vlm, make("plain"), ONE, [noise(size)])


def test_answers_about_one_and_several_pictures_equal_transformers(vlm: VLM, make: Make) -> None:
    check_answer(vlm, make("plain"), ONE, [noise((57, 41))])
    check_answer(vlm, make("plain"), TWO, [noise((57, 41)), noise((31, 127))])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["queries and keys normalised, RMSNorm, biases", "a norm at the end, an earlier layer"]
)
def test_other_towers_answer_as_transformers(make: Make, tmp_path_factory: pytest.TempPathFactory, case: str) -> None:
    vlm = vlm_runtime.load(exported(make(case), tmp_path_factory), threads=1)
    for size in ((57, 41), (1, 1), (31, 127)):
        check_answer(vlm, make(case), ONE, [noise(size)])
    check_answer(vlm, make(case), TWO, [noise((57, 41)), noise((31, 127))])


@pytest.mark.slow
def test_every_target_passes_its_check_and_answers(make: Make, tmp_path: Path) -> None:
    export(make("plain"), ["gguf", "tensorrt"], tmp_path / "bundle", precision="fp32")
    manifest = read_manifest(tmp_path / "bundle")
    assert all(manifest.parity[target]["passed"] for target in ("gguf", "tensorrt"))
    notes = manifest.parts["language_model"]["gguf"].details["notes"]
    assert [note for note in notes if "no mmproj" in note]
    vlm = vlm_runtime.load(tmp_path / "bundle", engine="gguf", threads=1)
    check_answer(vlm, make("plain"), ONE, [noise((57, 41))])


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 3), st.integers(3, 12))
def test_every_grid_is_that_of_transformers(height: int, width: int, least: int, most: int) -> None:
    columns, rows = get_optimal_tiled_canvas((height, width), (448, 448), least, most)
    assert ratio.grid((height, width), 448, least, most) == (rows, columns)


def test_of_grids_that_are_equally_close_the_larger_is_for_large_pictures() -> None:
    assert ratio.grid((20, 20), 28, 1, 6) == (1, 1)
    assert ratio.grid((400, 400), 28, 1, 6) == (2, 2)
    assert ratio.grid((400, 800), 28, 1, 6) == (1, 2)


def test_the_shared_pixel_shuffle_puts_neighbours_together(make: Make) -> None:
    """InternVL 2's definition: row i, column j of the rows has patches 2i and 2i + 1 of columns 2j and 2j + 1."""
    model = load_model(make("plain"))
    seen: list[np.ndarray] = []
    projector: Any = model.projector()
    projector.layer_norm.register_forward_pre_hook(lambda module, given: seen.append(given[0].numpy()))
    features = torch.arange(16 * 48, dtype=torch.float32).reshape(1, 16, 48)
    with torch.inference_mode():
        projector(features)
    patches = features.numpy().reshape(4, 4, 48)
    first = np.concatenate([patches[0, 0], patches[0, 1], patches[1, 0], patches[1, 1]])
    second = np.concatenate([patches[0, 2], patches[0, 3], patches[1, 2], patches[1, 3]])
    np.testing.assert_array_equal(seen[0][0, 0], first)
    np.testing.assert_array_equal(seen[0][0, 1], second)


_LAYOUT, _TILES, _GRID = ratio.layout, ratio.tiles, ratio.grid


def _without_overview(size: Any, spec: Any, pictures: int) -> Layout:
    return _LAYOUT(size, dataclasses.replace(spec, tiling=dataclasses.replace(spec.tiling, overview="none")), pictures)


def _nearest(image: Any, spec: Any, layout: Layout) -> Any:
    return _TILES(image, dataclasses.replace(spec, preprocess=dataclasses.replace(spec.preprocess, resample=0)), layout)


MISTAKES: dict[str, tuple[str, Any, str]] = {
    "shifted tiles": ("tiles", lambda *a: np.roll(_TILES(*a), 1, 0), "pixel_values max_abs"),
    "nearest pixels": ("tiles", _nearest, "pixel_values max_abs"),
    "no overview": ("layout", _without_overview, "the bundle's prompt has"),
    "a grid of other tiles": ("grid", lambda *a: (1, 2), "the bundle's prompt has"),
    "rows and columns exchanged": ("grid", lambda *a: _GRID(*a)[::-1], "pixel_values max_abs"),
    "no text around the rows": (
        "layout",
        lambda *a: dataclasses.replace(_LAYOUT(*a), text="<IMG_CONTEXT>"),
        "the bundle's prompt has",
    ),
    "tiles packed in another order": ("pack", lambda rows, *a: rows[::-1].reshape(-1, 64), "inputs_embeds relative_l2"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_cutting_or_packing_fails_the_export(
    make: Make,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    run: Command,
    monkeypatch: pytest.MonkeyPatch,
    mistake: str,
) -> None:
    function, wrong, told = MISTAKES[mistake]
    folder = make("plain")
    copy_parts(exported(folder, tmp_path_factory), monkeypatch)
    options = ("--target", "onnx", "--precision", "fp32", "--greedy-tokens", "2")
    monkeypatch.setattr(ratio, function, wrong)
    ran = run(folder, *options, "-o", tmp_path / "wrong")
    assert ran.code == 1
    assert "parity failed" in ran.err
    assert told in ran.err


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "patches that do not fill the tile": (
        "vision_config",
        {"image_size": [30, 30]},
        r"takes 30 × 30 pixels in patches of 7 × 7; tiles must be square and of whole patches",
    ),
    "patches of nothing": ("vision_config", {"patch_size": [0, 0]}, r"must be height and width, of 1 or more"),
    "three edges": ("vision_config", {"image_size": [28, 28, 28]}, r"must be height and width, of 1 or more"),
    "tiles that are not square": ("vision_config", {"image_size": [28, 35]}, r"28 × 35 pixels"),
    "a layer beyond the tower": ("", {"vision_feature_layer": 4}, r"vision_feature_layer 4 .* 4 hidden states"),
    "the class token kept": ("", {"vision_feature_select_strategy": "full"}, r"'full' leaves the class token"),
    "a ratio that does not fit": ("", {"downsample_ratio": 0.3}, r"downsample_ratio 0\.3 does not fit .* 4 × 4"),
    "another tower": ("vision_config", {"model_type": "clip_vision_model"}, r"'clip_vision_model' is not that of int"),
    "another language model": ("text_config", {"model_type": "mamba"}, r"text_config.model_type 'mamba'"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_config_that_contradicts_itself_is_refused_in_one_line(make: Make, tmp_path: Path, what: str) -> None:
    part, values, told = CONTRADICTIONS[what]
    folder = copy(make("plain"), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config).update(values)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=told) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


PROCESSORS: dict[str, tuple[dict[str, Any], str]] = {
    "another size": ({"size": {"height": 35, "width": 35}}, "28 × 28"),
    "tiles without end": ({"max_patches": 10**9}, "1 to 1000000000 tiles .* cannot be; they go from 1 to 1000"),
    "more tiles than there may be": ({"min_patches": 7}, "7 to 6 tiles"),
}


@pytest.mark.parametrize("what", PROCESSORS)
def test_an_image_processor_that_does_not_fit_is_refused(make: Make, tmp_path: Path, what: str) -> None:
    values, told = PROCESSORS[what]
    folder = copy(make("plain"), tmp_path / "copy")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(CheckpointError, match=told):
        load_model(folder)


def test_a_tower_without_a_weight_is_refused_by_its_name(make: Make, tmp_path: Path) -> None:
    def damage(tensors: dict[str, Any]) -> None:
        del tensors[next(name for name in tensors if name.endswith("layer.1.lambda_1"))]

    folder = rewrite(copy(make("plain"), tmp_path / "copy"), damage)
    with pytest.raises(CheckpointError, match=r"'vision_tower\.encoder\.layer\.1\.lambda_1' is missing"):
        load_model(folder)


def test_position_embeddings_are_not_resized_while_tracing(make: Make) -> None:
    """torch.jit.trace, by which Core ML converts, would else put a bicubic resize into the graph."""
    encoder = load_model(make("plain")).vision_encoder()
    assert isinstance(encoder, shuffle.InternViT)
    trace: Any = torch.jit.trace
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and still Core ML's way
        graph = str(trace(encoder, torch.zeros(1, 3, 28, 28), check_trace=False).inlined_graph)
    assert "upsample" not in graph


def test_the_spec_says_what_stands_around_a_picture(make: Make) -> None:
    tiling = read_spec(open_checkpoint(make("two to four tiles"))).tiling
    assert tiling is not None
    assert (tiling.before, tiling.after, tiling.min_tiles, tiling.max_tiles) == ("<img>", "</img>", 2, 4)
