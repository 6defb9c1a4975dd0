"""Gemma 3 text: Gemma 2 with RMSNorm on each head of q and k, and a rotary embedding of its own on sliding layers."""

from typing import Any

from vlm_models.families import gemma, gemma2
from vlm_models.language_config import rope
from vlm_models.spec import LanguageSpec


def language(config: Any) -> LanguageSpec:
    """rope_parameters holds one entry for each kind of layer."""
    p = config.rope_parameters
    return gemma.language(
        config,
        qk_norm=True,
        rope=rope(p["full_attention"], config.head_dim, config),
        rope_local=rope(p["sliding_attention"], config.head_dim, config),
        **gemma2.differences(config),
    )
