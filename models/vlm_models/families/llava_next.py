"""LLaVA-NeXT (1.6): `LlavaNextForConditionalGeneration`, a picture as an overview and tiles of its best resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_models import anyres
from vlm_models.checkpoint import Checkpoint
from vlm_models.processor import image_processor
from vlm_models.spec import VLMSpec

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def spec(checkpoint: Checkpoint) -> VLMSpec:
    """VLMSpec of config.json, image processor and tokenizer. Raises CheckpointError where these contradict."""
    return anyres.spec(checkpoint, "llava_next")


def pixel_values(checkpoint: Checkpoint, spec: VLMSpec, picture: Image.Image, pictures: int) -> Any:
    """Tiles (N, 3, s, s) by transformers' own image processor; other pictures of the prompt change nothing."""
    return image_processor(checkpoint)(images=picture, return_tensors="np")["pixel_values"][0]


def packed(checkpoint: Checkpoint, spec: VLMSpec, rows: Tensor, size: tuple[int, int], pictures: int) -> Tensor:
    """(R, H) by transformers' own packing."""
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    return anyres.packed_by(
        LlavaNextModel, checkpoint, rows, size, vision_feature_select_strategy=spec.vision.select_strategy
    )


def prompt_ids(checkpoint: Checkpoint, spec: VLMSpec, prompt: str, pictures: Sequence[Image.Image]) -> list[int]:
    """By transformers' own processor, which counts the rows of each picture."""
    return anyres.prompt_ids(checkpoint, spec, prompt, pictures)
