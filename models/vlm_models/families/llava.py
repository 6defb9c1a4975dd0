"""LLaVA 1.5 and its kin: `LlavaForConditionalGeneration` with a CLIP or SigLIP tower and a projector of any kind."""

from __future__ import annotations

from vlm_models import vlm_config
from vlm_models.checkpoint import Checkpoint
from vlm_models.processor import preprocess_spec, prompt_spec
from vlm_models.spec import VLMSpec


def spec(checkpoint: Checkpoint) -> VLMSpec:
    """VLMSpec of config.json, image processor and tokenizer."""
    config = vlm_config.read_config(checkpoint)
    vision, language = vlm_config.vision(checkpoint, config), vlm_config.language(checkpoint, config)
    projector = vlm_config.projector(checkpoint, config, vision, language)
    return VLMSpec(
        family="llava",
        name=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        vision=vision,
        projector=projector,
        language=language,
        preprocess=preprocess_spec(checkpoint, vision.image_size),
        prompt=prompt_spec(checkpoint, config, projector.out_tokens or vision.image_tokens),
    )
