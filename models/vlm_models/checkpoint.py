"""An opened checkpoint folder: its config and its tensors, memory-mapped and named canonically; read when asked for."""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_models.conversation import Written
from vlm_models.errors import CheckpointError
from vlm_models.grid import Grid
from vlm_models.made import MadeFolder

Array = npt.NDArray[Any]

ADAPTER = "adapter_config.json"
PIECES = ("non_lora_trainables.bin", "mm_projector.bin")  # what training saves beside an adapter, or alone
DTYPES = ("F32", "F16", "BF16")
_SAMPLE = 4096  # bytes of each end of a tensor that enter the fingerprint
_PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a matrix (R, C, …) of R rows: scale · up (R, r) @ down (r, C · …), in float32."""

    up: Array
    down: Array
    scale: float

    def add(self, rows: Array, start: int, stop: int | None) -> Array:
        """Rows start:stop of the matrix with what is added to them, a new float32 array of the same shape."""
        added = self.up[start:stop].astype(np.float32) @ self.down.astype(np.float32)
        added *= np.float32(self.scale)
        out: Array = rows.astype(np.float32)
        out += added.reshape(rows.shape)
        return out


@dataclass(frozen=True)
class Stored:
    """One tensor on disk: `array` is a view of the mapped file; `span` its bytes there, for dropping pages.

    `grid` says on which values a quantizer has put it, so that packing finds the same integers again. With `low_rank`
    the tensor is more than `array`, and its dtype F32. `order` (n,) are the rows of `array` that it has, where not all.
    """

    dtype: str
    array: Array
    map: mmap.mmap | None = None
    span: tuple[int, int] = (0, 0)
    grid: Grid | None = None
    low_rank: LowRank | None = None
    order: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Sources:
    """Where the pieces lie that a checkpoint folder only names: folders or hub ids; None takes what the folder says.

    `base`: the model that an adapter was trained on. `vision_tower`: the tower that config.json names.
    `conversation`: the name of the conversation template, where the folder does not say how it was trained.
    """

    base: str | Path | None = None
    vision_tower: str | Path | None = None
    conversation: str | None = None


NO_SOURCES = Sources()


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and weights; open it with `open_checkpoint`.

    Whatever the layout of the folder, `config` and the tensors' names are those of Hugging Face's layout, and `files`
    is a folder that holds processor, tokenizer and chat template as transformers reads them: `folder` itself, or one
    made from it that lives as long as `made`. `notes` say in sentences what was found and chosen on the way.
    `conversation` is how LLaVA's original code writes its prompts, where the checkpoint is of that code. `adapted` are
    the tensors that an adapter changes or replaces.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored] = field(repr=False)
    fingerprint: str
    layout: str = "huggingface"
    notes: tuple[str, ...] = ()
    made: MadeFolder | None = field(default=None, repr=False, compare=False)
    conversation: Written | None = None
    adapted: frozenset[str] = frozenset()

    @property
    def files(self) -> Path:
        """Where processor, tokenizer and chat template are."""
        return self.folder if self.made is None else Path(self.made.name)

    def names(self) -> list[str]:
        """Canonical tensor names, sorted."""
        return sorted(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def _get(self, name: str) -> Stored:
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: tensor {name!r} is missing; the checkpoint is incomplete")
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored."""
        stored = self._get(name)
        return stored.array.shape if stored.order is None else (len(stored.order), *stored.array.shape[1:])

    def dtype(self, name: str) -> str:
        """One of F32, F16, BF16."""
        return self._get(name).dtype

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows start:stop of the tensor: a read-only view of the mapped file in its own dtype (bf16 as ml_dtypes).

        Of a tensor with an adapter a new float32 array, computed on each call.
        """
        stored = self._get(name)
        rows: Array = stored.array[start:stop] if stored.order is None else stored.array[stored.order[start:stop]]
        return rows if stored.low_rank is None else stored.low_rank.add(rows, start, stop)

    def grid(self, name: str) -> Grid | None:
        """The values on which a quantizer has put the tensor; None for one as it was trained."""
        return self._get(name).grid

    def release(self, name: str) -> None:
        """Drop the tensor's pages from memory; they are read again when needed."""
        stored = self._get(name)
        if stored.map is not None and stored.span[1] > stored.span[0]:
            start = stored.span[0] // _PAGE * _PAGE
            stored.map.madvise(mmap.MADV_DONTNEED, start, stored.span[1] - start)


def open_checkpoint(path_or_hub_id: str | Path, sources: Sources = NO_SOURCES) -> Checkpoint:
    """Open a local folder, or a Hugging Face Hub id (downloaded once; HF_HUB_OFFLINE is respected), of any layout.

    Raises CheckpointError for no such folder, no config.json, damaged or unsafe weight files.
    """
    from vlm_models.layout import find_layout  # layouts are made of what this file defines

    folder = local_folder(path_or_hub_id)
    if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
        config: dict[str, Any] = {}  # PEFT saves none: the base model's counts
    else:
        config = read_json(folder / "config.json", "is not a Hugging Face checkpoint")
    return find_layout(folder, config).open_folder(folder, config, sources)


def read_json(path: Path, without: str) -> dict[str, Any]:
    """A JSON object from a file; `without` ends the message when the file is absent."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}: it {without}")
    try:
        data = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


def refuse_sources(folder: Path, sources: Sources, layout: str, *names: str) -> None:
    """Raise CheckpointError for the first of `names` that is given though a folder of `layout` has no use for it."""
    for name in names:
        if getattr(sources, name) is not None:
            raise CheckpointError(
                f"{folder} {layout}, so that --{name.replace('_', '-')} would change nothing: leave it out"
            )


def local_folder(path_or_hub_id: str | Path) -> Path:
    """The folder itself, or the hub id's download. Raises CheckpointError."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file: give the folder that holds config.json")
    name = str(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise CheckpointError(f"no such folder: {name}; give a folder with config.json or a hub id like org/model")
    return _download(name)


def _download(hub_id: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt", *PIECES]
    try:
        listing = huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns)
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        raise CheckpointError(
            f"no such folder: {hub_id}, and it could not be had from the hub ({type(error).__name__}); "
            "check the name and the network, or give a local folder"
        ) from error
    folder = Path(listing)
    if not any(folder.glob("*.safetensors")):
        folder = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=[*patterns, "*.bin"]))
    return folder


def fingerprint(config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> str:
    """SHA-256 over the config and, of every tensor, name, dtype, shape and both ends; of adapters every number."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        stored = tensors[name]
        digest.update(f"{name} {stored.dtype} {stored.array.shape}".encode())
        flat = stored.array.reshape(-1)
        count = _SAMPLE // flat.dtype.itemsize
        digest.update(flat[:count].tobytes())
        digest.update(flat[-count:].tobytes())
        if stored.low_rank is not None:
            digest.update(repr(stored.low_rank.scale).encode())
            digest.update(stored.low_rank.up.tobytes())
            digest.update(stored.low_rank.down.tobytes())
    return digest.hexdigest()
