"""DeepSeek-VL with the SigLIP tower alone (1.3B): two linear layers, a Llama; pictures fitted into a grey square.

Source: "DeepSeek-VL: Towards Real-World Vision-Language Understanding" (arXiv:2403.05525). The 7B model's second tower
(SAM) is another family, deepseek_vl_hybrid, and not supported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_models import vlm_config
from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.processor import image_processor, prompt_spec, triple
from vlm_models.spec import PreprocessSpec, ProjectorSpec, VLMSpec

if TYPE_CHECKING:
    from torch import nn

vision_encoder = vlm_config.last_state_encoder


def spec(checkpoint: Checkpoint) -> VLMSpec:
    """VLMSpec of config.json, image processor and tokenizer."""
    config = vlm_config.read_config(checkpoint)
    vision, language = vlm_config.last_state(checkpoint, config.vision_config), vlm_config.language(checkpoint, config)
    return VLMSpec(
        family="deepseek_vl",
        name=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        vision=vision,
        projector=ProjectorSpec(
            in_features=vision.hidden_size,
            hidden_size=language.hidden_size,
            out_features=language.hidden_size,
            activation="gelu",
            bias=True,
            kind="deepseek_vl",
        ),
        language=language,
        preprocess=_preprocess(checkpoint, vision.image_size),
        prompt=prompt_spec(checkpoint, config, vision.image_tokens),
    )


def projector(checkpoint: Checkpoint, spec: VLMSpec) -> nn.Module:
    """transformers' own: two linear layers with a GELU between."""
    from transformers.models.deepseek_vl.modeling_deepseek_vl import DeepseekVLAligner

    made: Any = DeepseekVLAligner
    module: nn.Module = made(vlm_config.read_config(checkpoint))
    return module


def _preprocess(checkpoint: Checkpoint, edge: int) -> PreprocessSpec:
    p = image_processor(checkpoint)
    size = dict(p.size or {})
    if not (p.do_resize and p.do_pad) or {size.get("height"), size.get("width")} != {edge}:
        raise CheckpointError(
            f"{checkpoint.folder}: the image processor makes pictures of size {size}, but the tower takes {edge} × "
            f"{edge}, resized and padded"
        )
    r, g, b = (int(level) for level in p.background_color)
    return PreprocessSpec(
        size=edge,
        resize="longest_edge",
        crop=0,
        resample=int(p.resample),
        rescale=float(p.rescale_factor) if p.do_rescale else 1.0,
        mean=triple(p.image_mean) if p.do_normalize else (0.0, 0.0, 0.0),
        std=triple(p.image_std) if p.do_normalize else (1.0, 1.0, 1.0),
        pad_color=(r, g, b),
        least=int(p.min_size),
    )
