"""SmolVLM: Idefics3 whose tokenizer names the tokens around a picture; pictures only, no video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_models.checkpoint import Checkpoint
from vlm_models.families import idefics3
from vlm_models.families.idefics3 import pixel_values, projector, vision_encoder
from vlm_models.processor import image_processor, special_token, transformers_tokenizer
from vlm_models.spec import VLMSpec

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["pixel_values", "projector", "prompt_ids", "spec", "vision_encoder"]


def spec(checkpoint: Checkpoint) -> VLMSpec:
    """VLMSpec of config.json, image processor and tokenizer. Raises CheckpointError where these contradict."""
    return idefics3.spec_of(
        checkpoint,
        special_token(checkpoint, "fake_image_token", idefics3.FAKE),
        special_token(checkpoint, "global_image_token", idefics3.GLOBAL),
    )


def prompt_ids(checkpoint: Checkpoint, spec: VLMSpec, prompt: str, pictures: Sequence[Image.Image]) -> list[int]:
    """By the texts of transformers' own processor, which itself asks for packages that only videos need."""
    from transformers.models.smolvlm import processing_smolvlm

    texts: Any = processing_smolvlm
    tokenizer, processor = transformers_tokenizer(checkpoint), image_processor(checkpoint)
    names = ("fake_image_token", "image_token", "global_image_token")
    fake, image, overview = (
        getattr(tokenizer, name, None) or default
        for name, default in zip(names, (idefics3.FAKE, "<image>", idefics3.GLOBAL), strict=True)
    )
    first, *rest = prompt.split(image)
    text = first
    for picture, piece in zip(pictures, rest, strict=True):
        cut = processor(images=picture, return_tensors="np", return_row_col_info=True)
        text += texts.get_image_prompt_string(
            cut["rows"][0][0], cut["cols"][0][0], spec.tile_tokens, fake, image, overview
        )
        text += piece
    written = spec.prompt.bos_token is not None and prompt.startswith(spec.prompt.bos_token)
    return list(tokenizer(text, add_special_tokens=not written)["input_ids"])
