"""PaliGemma 1 and 2: SigLIP, one linear layer, Gemma; the rows of a prompt see one another both ways.

Source: "PaliGemma: A versatile 3B VLM for transfer" (arXiv:2407.07726); prompts as transformers' `processing_paligemma`
writes them: the pictures, BOS, the text, a line break.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_models import vlm_config
from vlm_models.checkpoint import Checkpoint
from vlm_models.processor import preprocess_spec, processor_ids, prompt_spec
from vlm_models.spec import ProjectorSpec, VLMSpec

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

# One question about pictures: PaliGemma was not taught conversations.
_TEMPLATE = (
    "{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}"
    "{{ raise_exception('PaliGemma takes one question: no system message and no further turns') }}"
    "{%- endif -%}"
    "{%- for part in messages[0]['content'] if part['type'] == 'image' -%}{{ image_token }}{%- endfor -%}"
    "{{ bos_token }}"
    "{%- for part in messages[0]['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{{ '\\n' }}"
)

vision_encoder = vlm_config.last_state_encoder


def spec(checkpoint: Checkpoint) -> VLMSpec:
    """VLMSpec of config.json, image processor and tokenizer."""
    config = vlm_config.read_config(checkpoint, "gemma")
    vision = vlm_config.last_state(checkpoint, config.vision_config)
    softcap = float(getattr(config.text_config, "final_logit_softcapping", None) or 0.0)
    config.text_config.use_bidirectional_attention = False  # the family's own masks say it, `both_ways`
    language = vlm_config.language(checkpoint, config)
    prompt = prompt_spec(checkpoint, config, vision.image_tokens)
    return VLMSpec(
        family="paligemma",
        name=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        vision=vision,
        projector=ProjectorSpec(
            in_features=vision.hidden_size,
            hidden_size=language.hidden_size,
            out_features=language.hidden_size,
            activation="none",
            bias=True,
            kind="paligemma",
        ),
        language=dataclasses.replace(language, both_ways="prompt", logit_softcap=softcap),
        preprocess=preprocess_spec(checkpoint, vision.image_size),
        prompt=dataclasses.replace(prompt, chat_template=_TEMPLATE, special_tokens=False),
    )


def projector(checkpoint: Checkpoint, spec: VLMSpec) -> nn.Module:
    """transformers' own: one linear layer."""
    from transformers.models.paligemma.modeling_paligemma import PaliGemmaMultiModalProjector

    made: Any = PaliGemmaMultiModalProjector
    module: nn.Module = made(vlm_config.read_config(checkpoint))
    return module


def question(picture: str, text: str) -> str:
    """The reference's: what transformers' processor is given, which adds BOS and the line break itself."""
    return picture + text


def prompt_ids(checkpoint: Checkpoint, spec: VLMSpec, prompt: str, pictures: Sequence[Image.Image]) -> list[int]:
    """The reference's: by transformers' own processor."""
    text = prompt.replace(spec.prompt.bos_token or "", "", 1).removesuffix("\n")
    return processor_ids(checkpoint, text, pictures, special_tokens=False)
