"""Idefics3 and SmolVLM through the whole line, against transformers' own models, processors and tokenizers."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    Idefics3ImageProcessorPil,
    get_resize_output_image_size,
)

import vlm_runtime
from checkpoints import copy
from exporting import Command, command, copy_parts, exported, rewrite
from shuffled import FAKE, OVERVIEW, SIZES, check_answer, check_pictures, check_reference, noise, theirs, tiny_idefics3
from vlm_export import export
from vlm_models import shuffle
from vlm_models.checkpoint import open_checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.family import read_spec
from vlm_models.model import load_model
from vlm_runtime.manifest import read_manifest
from vlm_runtime.tiling import layout_of, tiles_of
from vlm_runtime.tilings import split
from vlm_runtime.vlm import VLM

run = pytest.fixture(command)
ONE = "<|im_start|>User:<image>What colour is the circle?<end_of_utterance>\nAssistant:"
TWO = "<|im_start|>User:<image> or <image>: how many squares?<end_of_utterance>\nAssistant:"
CASES: dict[str, dict[str, Any]] = {
    "idefics3": {},
    "smolvlm": {"family": "smolvlm", "text": "qwen2"},
    # For 19 patches along an edge, transformers' rounding gives some of them the position of a neighbour.
    "bucketed": {"tower": {"image_size": 38, "patch_size": 2}, "scale_factor": 19},
    "no tiles": {"processor": {"do_image_splitting": False}},
    "not resized": {"processor": {"do_resize": False}, "family": "smolvlm"},
    "small enough for one tile": {"processor": {"size": {"longest_edge": 32}}},
    "shuffled by four": {"scale_factor": 4},
}
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(case)`: the folder of a tiny checkpoint, written once. Read only."""
    return functools.cache(lambda case: tiny_idefics3(tmp_path_factory.mktemp("idefics3") / "it", **CASES[case]))


@pytest.fixture
def vlm(make: Make, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return vlm_runtime.load(exported(make("idefics3"), tmp_path_factory), threads=1)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_equals_transformers(make: Make, case: str) -> None:
    check_reference(make(case), ONE, [noise((101, 77))])
    check_reference(make(case), TWO, [noise((33, 90)), noise((40, 40))])


def test_the_export_passes_its_check(make: Make, tmp_path_factory: pytest.TempPathFactory) -> None:
    manifest = read_manifest(exported(make("idefics3"), tmp_path_factory))
    record = manifest.parity["onnx"]
    assert record["passed"]
    assert record["stages"]["pixel_values"]["max_abs"] <= 1e-6
    assert record["greedy"]["equal"] == 32
    assert manifest.spec.tile_tokens == 4


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_and_prompt_equal_transformers_whatever_the_size(vlm: VLM, make: Make, size: tuple[int, int]) -> None:
    check_pictures(vlm, make("idefics3"), ONE, [noise(size)])


@pytest.mark.parametrize("case", ["no tiles", "not resized", "small enough for one tile"])
def test_other_ways_to_cut_equal_transformers(make: Make, case: str) -> None:
    spec = load_model(make(case)).spec
    for size in ((57, 41), (1, 1), (31, 127), (20, 500)):
        layout = layout_of(size[::-1], spec)
        want = theirs(make(case), ONE, [noise(size)])
        np.testing.assert_allclose(tiles_of(noise(size), spec, layout), want["pixel_values"][0], rtol=0, atol=1e-6)
        assert layout.rows == int((want["input_ids"] == spec.prompt.image_token_id).sum())


def test_answers_about_one_and_several_pictures_equal_transformers(vlm: VLM, make: Make) -> None:
    check_answer(vlm, make("idefics3"), ONE, [noise((57, 41))])
    check_answer(vlm, make("idefics3"), TWO, [noise((57, 41)), noise((31, 127))])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["smolvlm", "bucketed"])
def test_other_towers_answer_as_transformers(make: Make, tmp_path_factory: pytest.TempPathFactory, case: str) -> None:
    vlm = vlm_runtime.load(exported(make(case), tmp_path_factory), threads=1)
    for size in ((57, 41), (1, 1), (31, 127)):
        check_answer(vlm, make(case), ONE, [noise(size)])
    check_answer(vlm, make(case), TWO, [noise((57, 41)), noise((31, 127))])


@pytest.mark.slow
def test_every_target_passes_its_check_and_answers(make: Make, tmp_path: Path) -> None:
    export(make("idefics3"), ["gguf", "tensorrt"], tmp_path / "bundle", precision="fp32")
    manifest = read_manifest(tmp_path / "bundle")
    assert all(manifest.parity[target]["passed"] for target in ("gguf", "tensorrt"))
    notes = manifest.parts["language_model"]["gguf"].details["notes"]
    assert [note for note in notes if "no mmproj" in note]
    vlm = vlm_runtime.load(tmp_path / "bundle", engine="gguf", threads=1)
    check_answer(vlm, make("idefics3"), ONE, [noise((57, 41))])


def test_positions_are_those_that_rounding_gives(make: Make) -> None:
    encoder = load_model(make("bucketed")).vision_encoder()
    assert isinstance(encoder, shuffle.Idefics3Encoder)
    places = encoder.places
    assert isinstance(places, torch.Tensor)
    assert places.shape == (1, 361)
    assert int((places != torch.arange(361)).sum()) == 37


def test_a_picture_is_scaled_and_cut_as_the_paper_says() -> None:
    assert split.scaled((300, 400), 96) == (72, 96)
    assert split.scaled((400, 299), 96) == (96, 72)  # 71.76, rounded down and to the next even number
    assert split.scaled((1000, 1), 96) == (96, 1)  # no edge of nothing
    assert split.scaled((300, 400), 8192) == (3072, 4096)
    assert split.whole_tiles((72, 96), 32) == (96, 96)
    assert split.whole_tiles((20, 96), 32) == (32, 96)


@given(
    st.integers(1, 9000), st.integers(1, 9000), st.sampled_from([(364, 1456), (512, 2048), (384, 1536), (364, 5000)])
)
def test_every_size_is_that_of_transformers(height: int, width: int, edges: tuple[int, int]) -> None:
    edge, longest = edges
    shape = np.empty((1, height, width), bool)
    first = get_resize_output_image_size(shape, longest)
    assert split.scaled((height, width), longest) == first
    asked: list[Any] = []
    processor: Any = Idefics3ImageProcessorPil()
    processor.resize = lambda image, size, resample: asked.append((size.height, size.width))
    processor.resize_for_vision_encoder(np.empty((1, *first), bool), edge)
    assert [split.whole_tiles(first, edge)] == asked


def test_names_of_the_tower_in_old_files_are_read(make: Make, tmp_path: Path) -> None:
    folder = copy(make("idefics3"), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["model_type"] = "idefics3"
    (folder / "config.json").write_text(json.dumps(config))
    assert read_spec(open_checkpoint(folder)).vision == read_spec(open_checkpoint(make("idefics3"))).vision


def test_the_tokens_around_a_picture_are_those_of_the_tokenizer(make: Make) -> None:
    for case in ("idefics3", "smolvlm"):
        tiling = read_spec(open_checkpoint(make(case))).tiling
        assert tiling is not None
        assert (tiling.before, tiling.after, tiling.tag) == (FAKE, FAKE, OVERVIEW)


_LAYOUT, _TILES = split.layout, split.tiles


def _nearest(image: Any, spec: Any, layout: Any) -> Any:
    return _TILES(image, dataclasses.replace(spec, preprocess=dataclasses.replace(spec.preprocess, resample=0)), layout)


def _text(old: str, new: str) -> Any:
    def layout(*a: Any) -> Any:
        made = _LAYOUT(*a)
        return dataclasses.replace(made, text=made.text.replace(old, new))

    return layout


MISTAKES: dict[str, tuple[str, Any, str]] = {
    "shifted tiles": ("tiles", lambda *a: np.roll(_TILES(*a), 1, 0), "pixel_values max_abs"),
    "nearest pixels": ("tiles", _nearest, "pixel_values max_abs"),
    "not scaled first": ("scaled", lambda size, longest: size, "the bundle's prompt has"),
    "rows named for columns": ("layout", _text("<row_1_col_2>", "<row_2_col_1>"), "the bundle's prompt has"),
    "no blank line before the overview": ("layout", _text("\n\n", "\n"), "the bundle's prompt has"),
    "no overview's tag": ("layout", _text(OVERVIEW, ""), "the bundle's prompt has"),
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
    folder = make("idefics3")
    copy_parts(exported(folder, tmp_path_factory), monkeypatch)
    options = ("--target", "onnx", "--precision", "fp32", "--greedy-tokens", "2")
    monkeypatch.setattr(split, function, wrong)
    ran = run(folder, *options, "-o", tmp_path / "wrong")
    assert ran.code == 1
    assert "parity failed" in ran.err
    assert told in ran.err


CONTRADICTIONS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "patches that do not fill the tile": (
        "config.json",
        "vision_config",
        {"image_size": 36},
        r"image_size 36 is not a whole number of its patches of 8",
    ),
    "a factor that does not fit": ("config.json", "", {"scale_factor": 3}, r"scale_factor 3 does not divide .* 4 × 4"),
    "another tower": (
        "config.json",
        "vision_config",
        {"model_type": "siglip_vision_model"},
        r"'siglip_vision_model' is not that of idefics3",
    ),
    "tiles of another size": (
        "preprocessor_config.json",
        "",
        {"max_image_size": {"longest_edge": 40}},
        r"makes tiles of 40 pixels, but the tower takes 32 × 32",
    ),
    "a size without its edge": (
        "preprocessor_config.json",
        "",
        {"size": {"height": 96, "width": 96}},
        r"has no longest_edge|makes pictures of size",
    ),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_checkpoint_that_contradicts_itself_is_refused_in_one_line(make: Make, tmp_path: Path, what: str) -> None:
    file, part, values, told = CONTRADICTIONS[what]
    folder = copy(make("idefics3"), tmp_path / "copy")
    data = json.loads((folder / file).read_text())
    (data[part] if part else data).update(values)
    (folder / file).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=told) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_the_norm_after_the_tower_is_not_taken_for_unused(make: Make, tmp_path: Path) -> None:
    """Other families' towers may lack it; a tower of this one would give other features without a word."""

    def damage(tensors: dict[str, Any]) -> None:
        del tensors[next(name for name in tensors if name.endswith("post_layernorm.weight"))]

    folder = rewrite(copy(make("idefics3"), tmp_path / "copy"), damage)
    with pytest.raises(CheckpointError, match=r"'vision_tower\.post_layernorm\.weight' is missing"):
        load_model(folder)
