"""Gemma 1: RMSNorm weights stored less one, embeddings scaled by sqrt(hidden_size), tanh GELU."""

from typing import Any

from vlm_models.language_config import decoder
from vlm_models.spec import LanguageSpec


def language(config: Any, **options: Any) -> LanguageSpec:
    """What the Gemma line shares; Gemma 2 and 3 pass their differences."""
    bias = bool(config.attention_bias)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return decoder(
        config,
        # transformers' Gemma 1 and later run the tanh approximation even where an old config says "gelu"
        activation="gelu_pytorch_tanh" if activation in (None, "gelu") else activation,
        norm_offset=1.0,
        embed_multiplier=float(config.hidden_size) ** 0.5,
        qkv_bias=bias,
        o_bias=bias,
        **options,
    )
