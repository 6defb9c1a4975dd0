"""Gemma 2: norms after attention and MLP too, softcaps on scores and logits, every other layer sliding."""

from typing import Any

from vlm_models.families import gemma
from vlm_models.spec import LanguageSpec


def language(config: Any) -> LanguageSpec:
    """Scores scaled by query_pre_attn_scalar^-0.5."""
    return gemma.language(config, **differences(config))


def differences(config: Any) -> dict[str, Any]:
    """The options in which Gemma 2 and 3 differ from Gemma 1."""
    return {
        "post_norms": True,
        "attention_scale": float(config.query_pre_attn_scalar) ** -0.5,
        "attention_softcap": float(config.attn_logit_softcapping or 0.0),
        "logit_softcap": float(config.final_logit_softcapping or 0.0),
    }
