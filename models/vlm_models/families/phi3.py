"""Phi-3 (4k context): q, k, v stored as one matrix, and gate, up as one; partial rotary where the config says so."""

from typing import Any

from vlm_models.language_config import decoder
from vlm_models.spec import LanguageSpec


def language(config: Any) -> LanguageSpec:
    """No biases."""
    return decoder(config, fused=True)
