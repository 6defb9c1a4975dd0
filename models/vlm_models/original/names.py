"""Tensors of a folder in LLaVA's original layout by their canonical names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from vlm_models.checkpoint import Stored
from vlm_models.errors import CheckpointError
from vlm_models.weights import read_pickled, read_safetensors, read_weights

PROJECTOR = "multi_modal_projector."
TOWER = "vision_tower."
# Wrappers of training (PEFT, DeepSpeed) and of LlavaMetaModel, around what the parts are called.
_OUTER = r"^(?:module\.)?(?:base_model\.model\.)?(?:model\.)?"
_SPELLINGS = (
    (re.compile(_OUTER + r"mm_projector\."), PROJECTOR),
    (re.compile(_OUTER + r"(?:vision_tower\.)+(?:vision_model\.)?"), TOWER),
    (re.compile(_OUTER + r"image_newline$"), "image_newline"),
    (re.compile(_OUTER + r"lm_head\."), "lm_head."),
    (re.compile(_OUTER + r"(?=embed_tokens\.|layers\.|norm\.)"), "language_model."),
)
_HUGGING_FACE = re.compile(r"^(?:model\.)?(?:multi_modal_projector|language_model)\.")
_ADAPTERS = ("mm_projector.safetensors", "mm_projector.bin")


def canonical(folder: Path, tensors: Iterable[tuple[str, Stored]]) -> dict[str, Stored]:
    """Tensors by their canonical names; what is of no part keeps its own.

    Raises CheckpointError for names of Hugging Face's layout among them, and for two spellings of one tensor.
    """
    out: dict[str, Stored] = {}
    for name, stored in tensors:
        if _HUGGING_FACE.match(name):
            raise CheckpointError(
                f"{folder}: two layouts are mixed: config.json is of LLaVA's original layout (mm_vision_tower), but "
                f"tensor {name!r} is of Hugging Face's; save the model again in one of them"
            )
        spelled = next(((pattern, prefix) for pattern, prefix in _SPELLINGS if pattern.match(name)), None)
        known = name if spelled is None else spelled[0].sub(spelled[1], name, count=1)
        if known in out:
            raise CheckpointError(f"{folder}: two tensors are both {known!r}; remove one of the spellings")
        out[known] = stored
    return out


def has_weights(folder: Path) -> bool:
    """Whether a whole model lies in the folder, not a projector alone."""
    kinds = ("model.safetensors", "pytorch_model.bin")
    return any((folder / name).is_file() for kind in kinds for name in (kind, f"{kind}.index.json"))


def model_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder with a whole model, its separate projector included where it has one."""
    tensors = canonical(folder, read_weights(folder))
    if not any(name.startswith(PROJECTOR) for name in tensors):
        tensors |= projector_tensors(folder)
    return tensors


def projector_tensors(folder: Path) -> dict[str, Stored]:
    """Projector (and image_newline) of mm_projector.bin, as the first stage of training saves it; {} without one."""
    path = next((folder / name for name in _ADAPTERS if (folder / name).is_file()), None)
    if path is None:
        return {}
    read = read_pickled if path.suffix == ".bin" else read_safetensors
    found = canonical(folder, read(path))
    if rest := sorted(name for name in found if not name.startswith(PROJECTOR) and name != "image_newline"):
        raise CheckpointError(
            f"{path} holds {rest[0]!r} beside the projector, whose place in the base model is not known; "
            "save the whole model (save_pretrained) and export that"
        )
    return found


def like_transformers(kind: str, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The projector of type `kind` with the names that its module here has: "linear" has one layer without a name."""
    if kind != "linear":
        return dict(tensors)
    named = {f"{PROJECTOR}{part}": f"{PROJECTOR}linear.{part}" for part in ("weight", "bias")}
    return {named.get(name, name): stored for name, stored in tensors.items()}
