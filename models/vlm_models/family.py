"""Families found by file name: `families/<model_type>.py`, the model_type that config.json names.

A family of whole checkpoints offers `spec(checkpoint) → VLMSpec` and, where it is not as LLaVA 1.5 does it:

* `vision_encoder(checkpoint, spec)`, `projector(checkpoint, spec)`: modules on the meta device (`vlm_models.vision`);
* what the reference of `vlm_export.reference` takes from transformers, so that the runtime's own way is checked by it:
  `pixel_values(checkpoint, spec, picture, pictures)`: tiles (N, 3, s, s) of one of several pictures;
  `packed(checkpoint, spec, rows, size, pictures)`: projected rows (N, T, H) of a picture of (height, width) → (R, H);
  `prompt_ids(checkpoint, spec, prompt, pictures)`: token ids, image tokens repeated, for a list of Pillow images;
  `question(picture, text)`: a question about one picture where no chat template of the checkpoint writes it.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from vlm_models import families
from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.spec import VLMSpec


def supported(role: str) -> list[str]:
    """The model types that offer `role`: "spec" (whole checkpoints), "language" or "positions" (vision towers)."""
    return [name for name in _names() if hasattr(_module(name), role)]


def find(model_type: object, role: str, what: str) -> ModuleType:
    """The family's module. Raises CheckpointError listing the supported ones."""
    if model_type in _names() and hasattr(module := _module(str(model_type)), role):
        return module
    raise CheckpointError(f"{what} {model_type!r} is not supported; supported are {', '.join(supported(role))}")


def family_of(checkpoint: Checkpoint) -> ModuleType:
    """The module of the checkpoint's family. Raises CheckpointError where it is of none that is supported."""
    return find(checkpoint.config.get("model_type"), "spec", f"{checkpoint.folder}: model_type")


def read_spec(checkpoint: Checkpoint) -> VLMSpec:
    """The checkpoint's VLMSpec. Raises CheckpointError where it is of no supported family or contradicts itself."""
    spec: VLMSpec = family_of(checkpoint).spec(checkpoint)
    return spec


def _names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(families.__path__))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{families.__name__}.{name}")
