"""A picture as tiles of the vision encoder's size, and the tiles' projected rows as the rows of the picture."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from vlm_models.errors import BundleError
from vlm_models.spec import VLMSpec
from vlm_runtime import tilings
from vlm_runtime.bundle import Bundle

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]
"""(height, width) of a picture in pixels."""
Floats = NDArray[np.float32]
_GRIDS, _PARTS = 12, 8


@dataclass(frozen=True)
class Layout:
    """What becomes of a picture of `size`: `tiles` squares, those of the grid (rows, columns) and the overview.

    `text` stands for it in the prompt; it holds the image token once for each of `runs`, the numbers of rows that
    follow each other without text between.
    """

    size: Size
    grid: tuple[int, int]
    tiles: int
    text: str
    runs: tuple[int, ...]

    @property
    def rows(self) -> int:
        """How many rows of the prompt the picture takes."""
        return sum(self.runs)


class Rule(Protocol):
    """What a module of `tilings` offers."""

    def layout(self, size: Size, spec: VLMSpec, pictures: int) -> Layout:
        """For one of `pictures` pictures of a prompt. Raises ImageError for a size that cannot be cut."""

    def tiles(self, image: Image.Image, spec: VLMSpec, layout: Layout) -> Floats:
        """Pixel values (tiles, 3, s, s) of an RGB picture."""

    def pack(self, rows: Floats, spec: VLMSpec, layout: Layout, newline: Floats | None) -> Floats:
        """Projected rows (tiles, T, H) → (layout.rows, H); `newline` (H,) ends a line of patches."""


def rule(spec: VLMSpec) -> Rule:
    """How the pictures of a model are cut."""
    name = "whole" if spec.tiling is None else spec.tiling.rule
    return cast(Rule, importlib.import_module(f"{tilings.__name__}.{name}"))


def layout_of(size: Size, spec: VLMSpec, pictures: int = 1) -> Layout:
    """The layout of one of `pictures` pictures of a prompt. Raises ImageError for a size that cannot be cut."""
    return rule(spec).layout(size, spec, pictures)


def tiles_of(image: Image.Image, spec: VLMSpec, layout: Layout) -> Floats:
    """Pixel values (layout.tiles, 3, s, s) of an RGB picture. Raises ImageError."""
    return rule(spec).tiles(image, spec, layout)


def pack(rows: Floats, spec: VLMSpec, layout: Layout, newline: Floats | None) -> Floats:
    """The rows (layout.rows, H) of a picture from its tiles' projected rows (layout.tiles, T, H).

    Raises BundleError where the projector gave others than the manifest says.
    """
    if rows.ndim != 3 or rows.shape[:2] != (layout.tiles, spec.tile_tokens):
        raise BundleError(
            f"the projector gave rows of shape {rows.shape}, the manifest says ({layout.tiles}, {spec.tile_tokens}, "
            "H): the parts are not of the same model; export again"
        )
    return rule(spec).pack(rows, spec, layout, newline)


def most_rows(spec: VLMSpec) -> int:
    """About as many rows as one picture can take, found by trying pictures that fill a resolution or a grid.

    Where nothing bounds them, those of one tile.
    """
    if (tiling := spec.tiling) is None:
        return spec.prompt.image_tokens
    edge, grids = spec.vision.image_size, range(1, min(tiling.max_tiles, _GRIDS) + 1)
    sizes = [*tiling.resolutions, *((edge * down, edge * across) for down in grids for across in grids)]
    if tiling.longest_edge:
        sizes.append((tiling.longest_edge, tiling.longest_edge))
    parts = [n / _PARTS for n in range(_PARTS // 2, _PARTS + 1)]  # padding left out may save more than shrinking
    tried = {(int(h * part), int(w * other)) for h, w in sizes for one in parts for part, other in ((one, 1), (1, one))}
    return max((layout_of(size, spec).rows for size in tried), default=spec.prompt.image_tokens)


def image_newline(bundle: Bundle) -> Floats | None:
    """The row (H,) that ends a line of patches; None where the model has none."""
    name = bundle.manifest.image_newline
    return None if name is None else np.fromfile(bundle.path(name), "<f4").astype(np.float32, copy=False)
