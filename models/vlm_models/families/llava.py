"""LLaVA 1.5 and its kin: `LlavaForConditionalGeneration` with a CLIP or SigLIP tower and a two-layer MLP projector."""

from __future__ import annotations

from vlm_models import vlm_config
from vlm_models.checkpoint import Checkpoint
from vlm_models.processor import preprocess_spec, prompt_spec
from vlm_models.spec import VLMSpec


def spec(checkpoint: Checkpoint) -> VLMSpec:
    """VLMSpec of config.json, image processor and tokenizer."""
    config = vlm_config.read_config(checkpoint)
    vision, language = vlm_config.vision(checkpoint, config), vlm_config.language(checkpoint, config)
    return VLMSpec(
        family="llava",
        name=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        vision=vision,
        projector=vlm_config.projector(checkpoint, config, vision, language),
        language=language,
        preprocess=preprocess_spec(checkpoint, vision.image_size),
        prompt=prompt_spec(checkpoint, config, vision.image_tokens),
    )
