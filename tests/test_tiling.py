"""Pictures cut into tiles and rows put together again, equal to transformers' own processors and packing."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaNextProcessor, LlavaOnevisionProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from running import running_spec
from tiled import EDGE, GRIDS, PATCH, SIZES, noise
from vlm_models.spec import PreprocessSpec, TilingSpec, VLMSpec
from vlm_runtime.tiling import layout_of, most_rows, pack, tiles_of
from vlm_runtime.tilings.anyres import best_resolution

MEAN, STD, RESCALE = (0.5, 0.4, 0.3), (0.5, 0.4, 0.3), 0.00392156862745098
RESOLUTIONS = {family: tuple((r * EDGE, c * EDGE) for r, c in grids) for family, grids in GRIDS.items()}
SHRINKING = (4, 9)  # tiles' worth of rows, fewer than the largest grids have


def spec_of(family: str, max_grid: int = 9) -> VLMSpec:
    """A model of `family` whose language model is 32 wide."""
    base, onevision = running_spec(), family == "llava_onevision"
    rows = (EDGE // PATCH) ** 2
    tiling = TilingSpec("anyres", RESOLUTIONS[family], newline=True, single=onevision)
    colour = (127, 102, 76)
    square = PreprocessSpec(EDGE, "exact", 0, 3, RESCALE, MEAN, STD, pad_color=colour)
    cropped = PreprocessSpec(EDGE, "shortest_edge", EDGE, 3, RESCALE, MEAN, STD)
    return dataclasses.replace(
        base,
        vision=dataclasses.replace(base.vision, image_size=EDGE, patch_size=PATCH, image_tokens=rows),
        prompt=dataclasses.replace(base.prompt, image_tokens=rows),
        preprocess=square if onevision else cropped,
        tiling=dataclasses.replace(tiling, max_grid=max_grid) if onevision else tiling,
    )


def processor(family: str) -> Any:
    """transformers' own image processor on Pillow."""
    pinpoints, square = [list(one) for one in RESOLUTIONS[family]], {"height": EDGE, "width": EDGE}
    common: dict[str, Any] = {"image_mean": MEAN, "image_std": STD, "image_grid_pinpoints": pinpoints}
    if family == "llava_next":
        return LlavaNextImageProcessorPil(size={"shortest_edge": EDGE}, crop_size=square, **common)
    return LlavaOnevisionImageProcessorPil(size=square, **common)


def their_rows(
    family: str, rows: np.ndarray, size: tuple[int, int], newline: np.ndarray | None, max_grid: int
) -> np.ndarray:
    """`pack_image_features` of transformers' own model."""
    vision = SimpleNamespace(image_size=EDGE, patch_size=PATCH)
    pinpoints = [list(one) for one in RESOLUTIONS[family]]
    model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    line = None if newline is None else torch.from_numpy(newline)
    given = [torch.from_numpy(rows)], torch.tensor([size])
    if family == "llava_next":
        (out,), _ = LlavaNextModel.pack_image_features(model, *given, "default", line)
    else:
        (out,), _ = LlavaOnevisionModel.pack_image_features(model, *given, line, f"anyres_max_{max_grid}")
    return out.numpy()


def projected(tiles: int, hidden: int = 32) -> np.ndarray:
    return np.random.default_rng(tiles).standard_normal((tiles, (EDGE // PATCH) ** 2, hidden)).astype(np.float32)


NEWLINE = np.linspace(-3, 3, 32, dtype=np.float32)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", GRIDS)
def test_tiles_equal_the_processors(family: str, size: tuple[int, int]) -> None:
    picture, spec = noise(size), spec_of(family)
    want = np.asarray(processor(family)(images=picture, return_tensors="np")["pixel_values"][0])
    got = tiles_of(picture, spec, layout_of(size, spec))
    assert got.shape == want.shape
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("family", "max_grid"), [("llava_next", 0), *(("llava_onevision", n) for n in SHRINKING)])
def test_rows_equal_the_models_own_packing(family: str, max_grid: int, size: tuple[int, int]) -> None:
    spec = spec_of(family, max_grid)
    layout = layout_of(size, spec)
    rows = projected(layout.tiles)
    want = their_rows(family, rows, size, NEWLINE, max_grid)
    got = pack(rows, spec, layout, NEWLINE)
    assert got.shape == want.shape == (layout.rows, 32)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # weights between rows round in another order
    assert layout.text == spec.prompt.image_token
    assert len(layout.runs) == 1


def test_without_a_newline_row_lines_follow_each_other() -> None:
    spec = spec_of("llava_next")
    spec = dataclasses.replace(spec, tiling=dataclasses.replace(spec.tiling, newline=False))
    layout = layout_of((41, 57), spec)
    rows = projected(layout.tiles)
    np.testing.assert_array_equal(pack(rows, spec, layout, None), their_rows("llava_next", rows, (41, 57), None, 0))


@pytest.mark.parametrize("size", [size for size in SIZES if max(size) <= 1000], ids=str)
def test_one_of_several_pictures_of_onevision_is_a_padded_square(size: tuple[int, int]) -> None:
    picture, spec = noise(size), spec_of("llava_onevision")
    want = np.asarray(processor("llava_onevision")(images=[[picture] * 2], return_tensors="np")["pixel_values"][1])
    layout = layout_of(size, spec, pictures=2)
    np.testing.assert_allclose(tiles_of(picture, spec, layout), want, rtol=0, atol=1e-5)
    rows = projected(layout.tiles)
    np.testing.assert_array_equal(
        pack(rows, spec, layout, NEWLINE), their_rows("llava_onevision", rows, size, NEWLINE, 9)
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_picture_of_next_is_cut_however_many_there_are(size: tuple[int, int]) -> None:
    spec = spec_of("llava_next")
    assert layout_of(size, spec, pictures=3) == layout_of(size, spec)


def test_of_equally_good_resolutions_the_first_is_taken() -> None:
    assert best_resolution((10, 10), ((56, 28), (28, 56), (28, 28))) == (28, 28)  # wastes least
    assert best_resolution((10, 10), ((56, 28), (28, 56))) == (56, 28)
    assert best_resolution((10, 10), ((28, 56), (56, 28))) == (28, 56)
    assert best_resolution((4000, 3), ((28, 56), (56, 28), (84, 28))) == (28, 56)  # nothing of the picture is left


@pytest.mark.parametrize("family", GRIDS)
def test_no_picture_takes_many_more_rows_than_the_context_has_room_for(family: str) -> None:
    spec, rng = spec_of(family), np.random.default_rng(0)
    most = most_rows(spec)
    sizes = [tuple(map(int, rng.integers(1, 400, 2))) for _ in range(500)]
    taken = [layout_of((height, width), spec).rows for height, width in sizes]
    assert max(taken) <= most * 1.05
    assert max(taken) >= most * 0.8


@pytest.mark.parametrize(("family", "edge", "patch"), [("llava_next", 336, 14), ("llava_onevision", 384, 14)])
def test_rows_of_published_models_are_as_many_as_their_processors_count(family: str, edge: int, patch: int) -> None:
    """24 and 27 patches along an edge, the resolutions of LLaVA-NeXT and OneVision, 300 sizes."""
    side = edge // patch
    resolutions = tuple((rows * edge, columns * edge) for rows, columns in GRIDS[family])
    spec = spec_of(family)
    spec = dataclasses.replace(
        spec,
        vision=dataclasses.replace(spec.vision, image_size=edge, patch_size=patch, image_tokens=side**2),
        tiling=dataclasses.replace(spec.tiling, resolutions=resolutions),
    )
    own: Any = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=[list(one) for one in resolutions]),
        patch_size=patch,
        num_image_tokens=side**2,
        num_additional_image_tokens=0,
        vision_aspect_ratio="anyres_max_9",
    )
    kind: Any = LlavaNextProcessor if family == "llava_next" else LlavaOnevisionProcessor
    own._get_unpadded_features = functools.partial(kind._get_unpadded_features, own)
    rng = np.random.default_rng(0)
    sizes = [*SIZES, *((int(h), int(w)) for h, w in rng.integers(1, 2500, (300, 2)))]
    counted = [kind._get_number_of_features(own, height, width, edge, edge) for height, width in sizes]
    assert [layout_of(size, spec).rows for size in sizes] == counted
