"""What an assembled LLaVA takes from the two folders: the tower's weights and config, and the language model's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_models import family
from vlm_models.assemble.shards import Tensor
from vlm_models.checkpoint import Array, Stored, local_folder, read_json
from vlm_models.errors import CheckpointError
from vlm_models.weights import read_weights

_BLOCK = 64 << 20  # bytes written at a time
_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


@dataclass(frozen=True)
class Folder:
    """An opened folder of one model: its config and its tensors by name without the part's prefix."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    @property
    def model_type(self) -> str:
        """As config.json says."""
        return str(self.config["model_type"])


def read_tower(source: str | Path) -> Folder:
    """The vision tower of a CLIP or SigLIP folder, whole models' and towers' own. Raises CheckpointError."""
    folder = local_folder(source)
    config = read_json(folder / "config.json", "is not a Hugging Face checkpoint")
    found = config.get("vision_config") if "vision_config" in config else config
    vision: dict[str, Any] = dict(found) if isinstance(found, Mapping) else {}
    kind = vision.get("model_type") or _TOWERS.get(str(config.get("model_type")))
    family.find(kind, "positions", f"{folder}: vision tower")
    names = {name: stored for name, stored in read_weights(folder) if not name.startswith("text_")}
    tensors = {_PREFIX.sub("", name): stored for name, stored in names.items() if _PREFIX.match(name)} or names
    return Folder(folder, {**vision, "model_type": kind}, tensors)


def read_language(source: str | Path) -> Folder:
    """A language model's folder; its head is "lm_head.weight". Raises CheckpointError for another model."""
    folder = local_folder(source)
    config = read_json(folder / "config.json", "is not a Hugging Face checkpoint")
    family.find(config.get("model_type"), "language", f"{folder}: language model")
    tensors = {re.sub(r"^model\.", "", name): stored for name, stored in read_weights(folder)}
    if "embed_tokens.weight" not in tensors:
        raise CheckpointError(f"{folder} has no model.embed_tokens.weight: it is not a language model's folder")
    return Folder(folder, config, tensors)


def copied(name: str, stored: Stored) -> Tensor:
    """A tensor as it is."""
    return Tensor(name, stored.dtype, stored.array.shape, lambda: blocks(stored.array))


def grown(name: str, stored: Stored, rows: int) -> Tensor:
    """A table with `rows` rows: the new ones are the mean of the old (Hewitt 2021, "Initializing new word embeddings").

    So the new tokens change no probability of the old ones by more than a mean token would.
    """
    array = stored.array

    def written() -> Iterator[Array]:
        yield from blocks(array)
        mean = sum(block.astype(np.float64).sum(0) for block in blocks(array)) / len(array)
        yield np.repeat(np.asarray(mean)[None], rows - len(array), 0).astype(array.dtype)

    return Tensor(name, stored.dtype, (rows, *array.shape[1:]), written)


def blocks(array: Array) -> Iterator[Array]:
    """The array in pieces of whole rows."""
    if array.ndim == 0:
        yield array
        return
    step = max(1, _BLOCK // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        yield array[start : start + step]


_PREFIX = re.compile(r"^(?:model\.)?vision_(?:model|tower)\.(?:vision_model\.)?")
