"""Gemma 3 with its SigLIP tower: patches pooled to 256 soft tokens, whose rows see one another both ways.

Source: "Gemma 3 Technical Report" (arXiv:2503.19786); prompts as transformers' `processing_gemma3` writes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_models import vlm_config
from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.processor import image_processor, preprocess_spec, processor_ids, prompt_spec, token_text
from vlm_models.spec import ProjectorSpec, VLMSpec

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

vision_encoder = vlm_config.last_state_encoder


def spec(checkpoint: Checkpoint) -> VLMSpec:
    """VLMSpec of config.json, image processor and tokenizer. Raises CheckpointError for pan and scan."""
    config = vlm_config.read_config(checkpoint, "gemma3_text")
    vision = vlm_config.last_state(checkpoint, config.vision_config)
    language = dataclasses.replace(vlm_config.language(checkpoint, config), both_ways="pictures")
    tokens = int(config.mm_tokens_per_image)
    side, patches = round(tokens**0.5), vision.image_size // vision.patch_size
    if side * side != tokens or patches % side:
        raise CheckpointError(
            f"{checkpoint.folder}: mm_tokens_per_image {tokens} is not the square of a number that divides the tower's "
            f"{patches} patches a side"
        )
    if getattr(image_processor(checkpoint), "do_pan_and_scan", False):
        raise CheckpointError(
            f"{checkpoint.folder}: do_pan_and_scan cuts pictures by their content's shape, which is not supported: "
            "set it to false in preprocessor_config.json"
        )
    prompt = prompt_spec(checkpoint, config, tokens)
    begin, end = (token_text(checkpoint, int(i)) for i in (config.boi_token_index, config.eoi_token_index))
    return VLMSpec(
        family="gemma3",
        name=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        vision=vision,
        projector=ProjectorSpec(
            in_features=vision.hidden_size,
            hidden_size=vision.hidden_size,
            out_features=language.hidden_size,
            activation="none",
            bias=False,
            kind="gemma3",
            out_tokens=tokens,
        ),
        language=language,
        preprocess=preprocess_spec(checkpoint, vision.image_size),
        prompt=dataclasses.replace(prompt, placeholder=begin, before=f"\n\n{begin}", after=f"{end}\n\n"),
    )


def projector(checkpoint: Checkpoint, spec: VLMSpec) -> nn.Module:
    """transformers' own: average pooling, RMSNorm, one matrix."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

    made: Any = Gemma3MultiModalProjector
    module: nn.Module = made(vlm_config.read_config(checkpoint))
    return module


def prompt_ids(checkpoint: Checkpoint, spec: VLMSpec, prompt: str, pictures: Sequence[Image.Image]) -> list[int]:
    """The reference's: by transformers' own processor."""
    written = spec.prompt.bos_token is not None and prompt.startswith(spec.prompt.bos_token)
    return processor_ids(checkpoint, prompt, pictures, special_tokens=not written)
