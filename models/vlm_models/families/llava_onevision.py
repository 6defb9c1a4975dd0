"""LLaVA-OneVision: `LlavaOnevisionForConditionalGeneration`; a picture that is alone is cut into tiles.

Of several pictures each is one square, padded with the mean colour. Videos are not exported.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_models import anyres
from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.processor import image_processor
from vlm_models.spec import VLMSpec

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def spec(checkpoint: Checkpoint) -> VLMSpec:
    """VLMSpec of config.json, image processor and tokenizer. Raises CheckpointError where these contradict."""
    made = anyres.spec(checkpoint, "llava_onevision")
    assert made.tiling is not None
    red, green, blue = (int(255 * mean) for mean in made.preprocess.mean)
    return dataclasses.replace(
        made,
        tiling=dataclasses.replace(made.tiling, max_grid=_max_grid(checkpoint), single=True),
        preprocess=dataclasses.replace(made.preprocess, pad_color=(red, green, blue)),
    )


def pixel_values(checkpoint: Checkpoint, spec: VLMSpec, picture: Image.Image, pictures: int) -> Any:
    """Tiles (N, 3, s, s) by transformers' own image processor, as one of so many pictures of a prompt."""
    return image_processor(checkpoint)(images=[[picture] * pictures], return_tensors="np")["pixel_values"][0]


def packed(checkpoint: Checkpoint, spec: VLMSpec, rows: Tensor, size: tuple[int, int], pictures: int) -> Tensor:
    """(R, H) by transformers' own packing."""
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    ratio = checkpoint.config.get("vision_aspect_ratio", "anyres_max_9")
    return anyres.packed_by(LlavaOnevisionModel, checkpoint, rows, size, vision_aspect_ratio=ratio)


def prompt_ids(checkpoint: Checkpoint, spec: VLMSpec, prompt: str, pictures: Sequence[Image.Image]) -> list[int]:
    """By transformers' own processor, which counts the rows of each picture."""
    return anyres.prompt_ids(checkpoint, spec, prompt, pictures)


def _max_grid(checkpoint: Checkpoint) -> int:
    """How many tiles' worth of rows the tiles may give: the number in vision_aspect_ratio."""
    ratio = checkpoint.config.get("vision_aspect_ratio", "anyres_max_9")
    found = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", ratio) if isinstance(ratio, str) else None
    if found is None:
        raise CheckpointError(
            f"{checkpoint.folder}: vision_aspect_ratio {ratio!r} is not supported: it must be anyres_max_ and a number"
        )
    return int(found[1])
