"""Qwen3 (dense): RMSNorm on each head of q and k; head_dim given by the config."""

from typing import Any

from vlm_models.language_config import decoder
from vlm_models.spec import LanguageSpec


def language(config: Any) -> LanguageSpec:
    """Biases only where attention_bias is set."""
    bias = bool(config.attention_bias)
    return decoder(config, qk_norm=True, qkv_bias=bias, o_bias=bias)
