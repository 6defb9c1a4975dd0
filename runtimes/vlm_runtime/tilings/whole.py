"""No tiles: the picture is resized and cropped to the one square that the tower takes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm_models.spec import VLMSpec
from vlm_runtime.image import preprocess
from vlm_runtime.tiling import Layout, Size


def layout(size: Size, spec: VLMSpec, pictures: int) -> Layout:
    """One tile, and as many rows as the projector gives."""
    text = spec.prompt.before + spec.prompt.image_token + spec.prompt.after
    return Layout(size=size, grid=(1, 1), tiles=1, text=text, runs=(spec.prompt.image_tokens,))


def tiles(image: Image.Image, spec: VLMSpec, layout: Layout) -> NDArray[np.float32]:
    """(1, 3, s, s)."""
    return preprocess(image, spec.preprocess)[None]


def pack(
    rows: NDArray[np.float32], spec: VLMSpec, layout: Layout, newline: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """The rows of the one tile."""
    (of_the_tile,) = rows
    return np.asarray(of_the_tile, np.float32)
