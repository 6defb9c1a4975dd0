"""Qwen2 and Qwen2.5: biases on q, k and v; sliding layers where use_sliding_window is set."""

from typing import Any

from vlm_models.language_config import decoder
from vlm_models.spec import LanguageSpec


def language(config: Any) -> LanguageSpec:
    """q, k, v with bias, o without."""
    return decoder(config, qkv_bias=True)
