"""What LLaVA's original code makes of a picture, from its own config.json: tiles and the tower's rows.

Written from `process_images` (llava/mm_utils.py) and the `feature_select` of its towers (multimodal_encoder/), on the
processor and config of the tower as they were found: what was translated for the bundle is checked by it.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vlm_models.original.files import CONFIG, PROCESSOR, SOURCE, TOWER_CONFIG

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_models.checkpoint import Checkpoint
    from vlm_models.model import Model


def is_original(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint, or the base of its adapter, is of LLaVA's original layout."""
    return (checkpoint.files / SOURCE / CONFIG).is_file()


def original_pixels(model: Model, picture: Image.Image, pictures: int) -> Any:
    """(N, 3, s, s) of one of `pictures` pictures. LLaVA-OneVision cuts only a picture that is alone in its prompt."""
    checkpoint, edge = model.checkpoint, model.spec.vision.image_size
    config = _read(checkpoint, CONFIG)
    processor, aspect = _processor(model), str(config.get("image_aspect_ratio"))
    if aspect == "pad":
        picture = _on_square(picture, tuple(int(mean * 255) for mean in processor.image_mean))
    if not aspect.startswith("anyres"):
        return processor(images=picture, return_tensors="np")["pixel_values"]
    tiles = [picture.resize((edge, edge), Image.Resampling.BICUBIC)]
    if pictures == 1 or aspect == "anyres":
        width, height = _best(picture.size, _resolutions(config, edge))
        whole = _in_box(picture, width, height)
        boxes = [(x, y, x + edge, y + edge) for y in range(0, height, edge) for x in range(0, width, edge)]
        tiles += [whole.crop(box) for box in boxes]
    return np.concatenate([processor(images=tile, return_tensors="np")["pixel_values"] for tile in tiles])


def original_features(model: Model, pixels: Tensor) -> Tensor:
    """(N, T, F): the rows that LLaVA's code takes of the tower's hidden states, which are transformers' own."""
    config, tower = _read(model.checkpoint, CONFIG), _read(model.checkpoint, TOWER_CONFIG)
    module: Any = model.vision_encoder().tower
    states = module(pixels, output_hidden_states=True, return_dict=True).hidden_states
    carried = len(states) - 1
    depth = int(tower.get("num_hidden_layers") or carried)
    layer = int(config.get("mm_vision_select_layer", -2))
    if layer < 0:
        layer += depth + 1  # of the tower as it is named, of which a checkpoint may carry fewer layers
    rows: Tensor = states[layer]
    classed = model.spec.vision.model_type == "clip_vision_model"  # SigLIP's code knows no class row
    return rows[:, 1:] if classed and config.get("mm_vision_select_feature", "patch") == "patch" else rows


def _read(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    path = checkpoint.files / SOURCE / name
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def _processor(model: Model) -> Any:
    """The tower's own, or as LLaVA's code makes it where there is none: CLIP's or SigLIP's of the tower's size."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    edge, clip = model.spec.vision.image_size, model.spec.vision.model_type == "clip_vision_model"
    found = {k: v for k, v in _read(model.checkpoint, PROCESSOR).items() if not k.endswith(("_type", "_class"))}
    if clip:
        sizes = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
        return CLIPImageProcessorPil(**{**sizes, **found})
    return SiglipImageProcessorPil(**{**found, "size": {"height": edge, "width": edge}, "do_center_crop": False})


def _on_square(picture: Image.Image, color: tuple[int, ...]) -> Image.Image:
    edge = max(picture.size)
    out = Image.new("RGB", (edge, edge), color)
    out.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
    return out


def _resolutions(config: dict[str, Any], edge: int) -> list[Sequence[int]]:
    """(width, height) of each."""
    given = config["image_grid_pinpoints"]
    if isinstance(given, str) and "..." in given:
        numbers = [int(n) for n in re.findall(r"\d+", given)]
        columns, rows = range(numbers[0], numbers[2] + 1), range(numbers[1], numbers[3] + 1)
        return [(column * edge, row * edge) for column in columns for row in rows]
    return list(ast.literal_eval(given) if isinstance(given, str) else given)


def _best(size: tuple[int, int], resolutions: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The first of those that keep the most pixels of the picture and then waste the fewest."""
    width, height = size

    def kept(one: Sequence[int]) -> tuple[int, int]:
        scale = min(one[0] / width, one[1] / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - one[0] * one[1]

    best = max(resolutions, key=kept)
    return int(best[0]), int(best[1])


def _in_box(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The picture as large as it fits, in the middle of black."""
    across, down = width / picture.width, height / picture.height
    if across < down:
        size = width, min(math.ceil(picture.height * across), height)
    else:
        size = min(math.ceil(picture.width * down), width), height
    out = Image.new("RGB", (width, height))
    place = (width - size[0]) // 2, (height - size[1]) // 2
    out.paste(picture.resize(size, Image.Resampling.BICUBIC), place)
    return out
