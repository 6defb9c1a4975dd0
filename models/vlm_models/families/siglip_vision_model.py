"""SigLIP vision tower: patches alone, no class token."""

from typing import Any


def positions(config: Any) -> int:
    """Rows of one hidden state."""
    return int(config.image_size // config.patch_size) ** 2
