"""InternVL: the picture squashed to the grid of tiles whose aspect ratio is closest to its own, and an overview.

Source: Chen et al., "How Far Are We to GPT-4V?" (arXiv:2404.16821), section 3.2; ties as in transformers'
`image_processing_got_ocr2.get_optimal_tiled_canvas`.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm_models.spec import TilingSpec, VLMSpec
from vlm_runtime.image import preprocess
from vlm_runtime.tiling import Layout, Size


def layout(size: Size, spec: VLMSpec, pictures: int) -> Layout:
    """The rows of all tiles in one run. A picture of one tile has no overview."""
    tiling = _tiling(spec)
    rows, columns = grid(size, spec.vision.image_size, tiling.min_tiles, tiling.max_tiles)
    tiles = rows * columns
    if tiles > 1 and tiling.overview == "last":
        tiles += 1
    text = tiling.before + spec.prompt.image_token + tiling.after
    return Layout(size=size, grid=(rows, columns), tiles=tiles, text=text, runs=(tiles * spec.tile_tokens,))


def tiles(image: Image.Image, spec: VLMSpec, layout: Layout) -> NDArray[np.float32]:
    """(tiles, 3, s, s): the grid's tiles line by line, then the overview."""
    (rows, columns), edge = layout.grid, spec.vision.image_size
    squashed = image.resize((columns * edge, rows * edge), Image.Resampling(spec.preprocess.resample))
    out = [tile(squashed, row, column, spec) for row in range(rows) for column in range(columns)]
    if layout.tiles > len(out):
        out.append(preprocess(image, spec.preprocess))
    return np.stack(out)


def pack(
    rows: NDArray[np.float32], spec: VLMSpec, layout: Layout, newline: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """The rows of the tiles one after the other."""
    return rows.reshape(-1, rows.shape[-1])


@functools.lru_cache(maxsize=64)
def grid(size: Size, edge: int, least: int, most: int) -> tuple[int, int]:
    """(rows, columns) of `least` to `most` tiles of `edge` pixels for a picture of (height, width).

    Of grids that are equally close, a larger one wins where the picture has over half of its pixels.
    """
    height, width = size
    shapes = [(c, r) for c in range(1, most + 1) for r in range(1, most // c + 1) if least <= c * r]
    best, nearest = (1, 1), float("inf")
    for columns, rows in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        apart = abs(width / height - columns / rows)
        if apart < nearest or (apart == nearest and width * height > 0.5 * edge * edge * columns * rows):
            best, nearest = (rows, columns), apart
    return best


def tile(image: Image.Image, row: int, column: int, spec: VLMSpec) -> NDArray[np.float32]:
    """Pixel values (3, s, s) of one tile of a picture that has been resized to whole tiles."""
    edge = spec.vision.image_size
    left, top = column * edge, row * edge
    square = image.crop((left, top, left + edge, top + edge))
    return preprocess(square, dataclasses.replace(spec.preprocess, resize="none"))


def _tiling(spec: VLMSpec) -> TilingSpec:
    assert spec.tiling is not None
    return spec.tiling
