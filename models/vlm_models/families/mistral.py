"""Mistral 7B: Llama with a sliding window on every layer where the config sets one."""

from typing import Any

from vlm_models.language_config import decoder
from vlm_models.spec import LanguageSpec


def language(config: Any) -> LanguageSpec:
    """No biases."""
    return decoder(config)
