"""Hugging Face's own layout, as transformers 4.3x to 5.x has written it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm_models.checkpoint import Checkpoint, Sources, Stored, fingerprint, refuse_sources
from vlm_models.errors import CheckpointError
from vlm_models.weights import read_weights

# Every spelling → one canonical spelling.
_SPELLINGS = (
    (re.compile(r"^(?:model\.)?(?:language_model\.)?lm_head\."), "lm_head."),
    (re.compile(r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?"), "language_model."),
    (re.compile(r"^(?:model\.)?(?:vision_tower|vision_model)\.(?:vision_model\.)?"), "vision_tower."),
    (re.compile(r"^(?:model\.)?(?:multi_modal_projector|connector|aligner)\."), "multi_modal_projector."),
    (re.compile(r"^(?:model\.)?image_newline$"), "image_newline"),
)


def matches(folder: Path, config: Mapping[str, Any]) -> bool:
    """The default: whatever is no other layout."""
    return True


def open_folder(folder: Path, config: Mapping[str, Any], sources: Sources) -> Checkpoint:
    """Everything is in the folder, so `sources` have nothing to add and are refused."""
    refuse_sources(folder, sources, "is in Hugging Face's layout", "base", "vision_tower", "conversation")
    tensors = canonical(folder, read_weights(folder))
    return Checkpoint(folder, folder.resolve().name, config, tensors, fingerprint(config, tensors))


def canonical(folder: Path, tensors: Iterable[tuple[str, Stored]]) -> dict[str, Stored]:
    """Tensors by their canonical names. Raises CheckpointError where two spellings of one are there."""
    out: dict[str, Stored] = {}
    for name, stored in tensors:
        spelled = next(((p, prefix) for p, prefix in _SPELLINGS if p.match(name)), None)
        canonical = name if spelled is None else spelled[0].sub(spelled[1], name, count=1)
        if canonical in out:
            raise CheckpointError(f"{folder}: two tensors are both {canonical!r}; remove one of the spellings")
        out[canonical] = stored
    return out
