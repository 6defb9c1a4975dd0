"""LLaVA-NeXT and OneVision: the whole picture, and the picture at the best of several resolutions, cut into tiles.

Of the tiles' rows those that show padding are left out, each line of patches ends with the newline row, and OneVision
shrinks what would be too many lines (LLaVA-OneVision, arXiv 2408.03326, figure 2). Rounded as transformers rounds.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm_models.spec import TilingSpec, VLMSpec
from vlm_runtime.image import preprocess
from vlm_runtime.tiling import Layout, Size

Floats = NDArray[np.float32]

_SHRINKS = 1.1  # how many times longer lines may be than `max_grid` asks before they are shrunk


def layout(size: Size, spec: VLMSpec, pictures: int) -> Layout:
    """The overview and the tiles of the best resolution; the overview alone where a picture must be `single`."""
    tiling, image_token = _tiling(spec), spec.prompt.image_token
    if tiling.single and pictures > 1:
        return Layout(size, (1, 1), 1, image_token, (spec.tile_tokens + tiling.newline,))
    height, width = best_resolution(size, tiling.resolutions)
    grid = height // spec.vision.image_size, width // spec.vision.image_size
    lines, columns = _shrunk(*_unpadded(size, grid, spec), spec)
    rows = spec.tile_tokens + lines * (columns + tiling.newline)
    return Layout(size, grid, 1 + grid[0] * grid[1], image_token, (rows,))


def tiles(image: Image.Image, spec: VLMSpec, layout: Layout) -> Floats:
    """(tiles, 3, s, s): the picture squashed to a square, then the tiles from left to right and top to bottom.

    A picture that shares its prompt is padded to a square instead.
    """
    pixels, edge, resample = spec.preprocess, spec.vision.image_size, Image.Resampling(spec.preprocess.resample)
    if layout.tiles == 1:
        return preprocess(image, dataclasses.replace(pixels, pad="square"))[None]
    out = np.empty((layout.tiles, 3, edge, edge), np.float32)
    out[0] = preprocess(image.resize((pixels.size, pixels.size), resample), pixels)
    rows, columns = layout.grid
    height, width = _fitted(layout.size, (rows * edge, columns * edge))
    canvas = Image.new("RGB", (columns * edge, rows * edge))
    canvas.paste(image.resize((width, height), resample), ((canvas.width - width) // 2, (canvas.height - height) // 2))
    for tile in range(rows * columns):
        top, left = tile // columns * edge, tile % columns * edge
        out[1 + tile] = preprocess(canvas.crop((left, top, left + edge, top + edge)), pixels)
    return out


def pack(rows: Floats, spec: VLMSpec, layout: Layout, newline: Floats | None) -> Floats:
    """(tiles, T, H) → (layout.rows, H): the overview's rows, then the lines of patches over all tiles."""
    if layout.tiles == 1:
        return rows[0] if newline is None else np.concatenate([rows[0], newline[None]])
    (down, across), side, hidden = layout.grid, _side(spec), rows.shape[-1]
    whole = rows[1:].reshape(down, across, side, side, hidden).transpose(0, 2, 1, 3, 4)
    lines = whole.reshape(down * side, across * side, hidden)
    height, width = _unpadded(layout.size, layout.grid, spec)
    top, left = (lines.shape[0] - height) // 2, (lines.shape[1] - width) // 2
    lines = lines[top : top + height, left : left + width]
    if (size := _shrunk(height, width, spec)) != (height, width):
        lines = _bilinear(lines, size)
    if newline is not None:
        ends = np.broadcast_to(newline, (lines.shape[0], 1, hidden))
        lines = np.concatenate([lines, ends], axis=1)
    return np.concatenate([rows[0], lines.reshape(-1, hidden)])


def best_resolution(size: Size, resolutions: tuple[Size, ...]) -> Size:
    """The one that keeps most of the picture's pixels, of equal ones the one that wastes least, then the first."""
    height, width = size

    def worth(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=worth)


def _fitted(size: Size, into: Size) -> Size:
    """The picture's size inside a resolution, its aspect ratio kept."""
    (height, width), (rows, columns) = size, into
    if columns / width < rows / height:
        return min(math.ceil(height * (columns / width)), rows), columns
    return rows, min(math.ceil(width * (rows / height)), columns)


def _unpadded(size: Size, grid: tuple[int, int], spec: VLMSpec) -> Size:
    """How many lines and columns of patches of a grid show the picture, padding left out on both sides alike."""
    (height, width), side = size, _side(spec)
    lines, columns = grid[0] * side, grid[1] * side
    if width / height > columns / lines:
        lines -= (lines - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (lines / height), 7))) // 2 * 2
    return lines, columns


def _shrunk(lines: int, columns: int, spec: VLMSpec) -> Size:
    """What is left of them where they are clearly more than `max_grid` tiles have."""
    most = _tiling(spec).max_grid * spec.tile_tokens
    ratio = math.sqrt(lines * columns / most) if most else 0.0
    return (int(lines // ratio), int(columns // ratio)) if ratio > _SHRINKS else (lines, columns)


def _bilinear(lines: Floats, size: Size) -> Floats:
    """(h, w, H) → (*size, H) between the two nearest of each axis, as torch's interpolate without aligned corners."""
    for axis, count in enumerate(size):
        length = lines.shape[axis]
        at = np.maximum((np.arange(count, dtype=np.float32) + 0.5) * np.float32(length / count) - 0.5, 0)
        low = at.astype(np.int64)
        part = (at - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        below, above = lines.take(low, axis), lines.take(np.minimum(low + 1, length - 1), axis)
        lines = below * (1 - part) + above * part
    return lines


def _side(spec: VLMSpec) -> int:
    """Patches along an edge of a tile, one row each."""
    return math.isqrt(spec.tile_tokens)


def _tiling(spec: VLMSpec) -> TilingSpec:
    assert spec.tiling is not None
    return spec.tiling
