"""Llama 1 to 3.x, Vicuna, SmolLM and every other checkpoint of model_type llama."""

from typing import Any

from vlm_models.language_config import decoder
from vlm_models.spec import LanguageSpec


def language(config: Any) -> LanguageSpec:
    """Biases where attention_bias or mlp_bias is set; no sliding window."""
    layers = config.num_hidden_layers
    bias = bool(config.attention_bias)
    return decoder(config, windows=(0,) * layers, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.mlp_bias))
