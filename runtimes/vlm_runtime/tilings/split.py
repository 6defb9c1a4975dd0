"""Idefics3 and SmolVLM: a picture resized to whole tiles, each announced by its row and column, then the whole of it.

Source: Laurençon et al., "Building and better understanding vision-language models" (arXiv:2408.12637), section 2.2;
sizes are rounded as in transformers' `image_processing_idefics3`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm_models.spec import TilingSpec, VLMSpec
from vlm_runtime.image import preprocess
from vlm_runtime.tiling import Layout, Size
from vlm_runtime.tilings.ratio import tile

_LONGEST = 4096  # transformers' limit, whatever the checkpoint says


def layout(size: Size, spec: VLMSpec, pictures: int) -> Layout:
    """One run of rows for each tile and one for the overview; a picture of one tile is its own overview."""
    tiling, edge, token = _tiling(spec), spec.vision.image_size, spec.prompt.image_token
    height, width = whole_tiles(scaled(size, tiling.longest_edge), edge)
    rows, columns = height // edge, width // edge
    if tiling.max_tiles == 1 or rows * columns == 1:
        rows, columns = 0, 0
    lines = [
        "".join(f"{tiling.before}<row_{row}_col_{column}>{token}" for column in range(1, columns + 1)) + "\n"
        for row in range(1, rows + 1)
    ]
    text = "".join(lines) + ("\n" if lines else "") + tiling.before + tiling.tag + token + tiling.after
    tiles = rows * columns + 1
    return Layout(size=size, grid=(rows, columns), tiles=tiles, text=text, runs=(spec.tile_tokens,) * tiles)


def tiles(image: Image.Image, spec: VLMSpec, layout: Layout) -> NDArray[np.float32]:
    """(tiles, 3, s, s): the grid's tiles line by line, then the overview, of the picture resized for the grid."""
    (rows, columns), edge = layout.grid, spec.vision.image_size
    if (longest := _tiling(spec).longest_edge) != 0:
        image = _resized(image, scaled(layout.size, longest), spec)
    if _tiling(spec).max_tiles != 1:
        image = _resized(image, whole_tiles((image.height, image.width), edge), spec)
    out = [tile(image, row, column, spec) for row in range(rows) for column in range(columns)]
    return np.stack([*out, preprocess(image, spec.preprocess)])


def pack(
    rows: NDArray[np.float32], spec: VLMSpec, layout: Layout, newline: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """The rows of the tiles one after the other."""
    return rows.reshape(-1, rows.shape[-1])


def scaled(size: Size, longest: int) -> Size:
    """(height, width) with the longer edge at `longest` (0: as it is) and the other rounded to an even number."""
    if longest == 0:
        return size
    height, width = size
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        height, width = longest, int(longest * ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    ratio = width / height
    if max(height, width) > _LONGEST:
        height, width = (int(_LONGEST / ratio), _LONGEST) if width >= height else (_LONGEST, int(_LONGEST * ratio))
    return max(height, 1), max(width, 1)


def whole_tiles(size: Size, edge: int) -> Size:
    """(height, width) in whole tiles: the longer edge rounded up first, the other after it in proportion."""
    height, width = size
    ratio = width / height
    if width >= height:
        width = math.ceil(width / edge) * edge
        return math.ceil(int(width / ratio) / edge) * edge, width
    height = math.ceil(height / edge) * edge
    return height, math.ceil(int(height * ratio) / edge) * edge


def _resized(image: Image.Image, size: Size, spec: VLMSpec) -> Image.Image:
    return image.resize((size[1], size[0]), Image.Resampling(spec.preprocess.resample))


def _tiling(spec: VLMSpec) -> TilingSpec:
    assert spec.tiling is not None
    return spec.tiling
