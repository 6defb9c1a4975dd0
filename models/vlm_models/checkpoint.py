"""An opened checkpoint folder: its config and its tensors, memory-mapped and named canonically; read when asked for."""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_models.errors import CheckpointError
from vlm_models.grid import Grid as Grid

Array = npt.NDArray[Any]

DTYPES = ("F32", "F16", "BF16")
_SAMPLE = 4096  # bytes of each end of a tensor that enter the fingerprint
_PAGE = mmap.PAGESIZE

# Every spelling that transformers 4.3x to 5.x has written → one canonical spelling.
_SPELLINGS = (
    (re.compile(r"^(?:model\.)?(?:language_model\.)?lm_head\."), "lm_head."),
    (re.compile(r"^(?:model\.)?language_model\.(?:model\.)?"), "language_model."),
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"), "vision_tower."),
    (re.compile(r"^(?:model\.)?multi_modal_projector\."), "multi_modal_projector."),
)
# Buffers that old versions saved; they follow from the config.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


@dataclass(frozen=True)
class Stored:
    """One tensor on disk: `array` is a view of the mapped file; `span` its bytes there, for dropping pages.

    `grid` says on which values a quantizer has put it, so that packing finds the same integers again.
    """

    dtype: str
    array: Array
    map: mmap.mmap | None = None
    span: tuple[int, int] = (0, 0)
    grid: Grid | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and weights; open it with `open_checkpoint`."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored] = field(repr=False)
    fingerprint: str

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
        return self._get(name).array.shape

    def dtype(self, name: str) -> str:
        """One of F32, F16, BF16."""
        return self._get(name).dtype

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows start:stop of the tensor: a read-only view of the mapped file in its own dtype (bf16 as ml_dtypes)."""
        return self._get(name).array[start:stop]

    def grid(self, name: str) -> Grid | None:
        """The values on which a quantizer has put the tensor; None for one as it was trained."""
        return self._get(name).grid

    def release(self, name: str) -> None:
        """Drop the tensor's pages from memory; they are read again when needed."""
        stored = self._get(name)
        if stored.map is not None and stored.span[1] > stored.span[0]:
            start = stored.span[0] // _PAGE * _PAGE
            stored.map.madvise(mmap.MADV_DONTNEED, start, stored.span[1] - start)


def open_checkpoint(path_or_hub_id: str | Path) -> Checkpoint:
    """Open a local folder, or a Hugging Face Hub id (downloaded once; HF_HUB_OFFLINE is respected).

    Raises CheckpointError for no such folder, no config.json, damaged or unsafe weight files.
    """
    folder = _folder(path_or_hub_id)
    config = read_json(folder / "config.json", "is not a Hugging Face checkpoint")
    tensors = _canonical(folder, dict(_weights(folder)))
    return Checkpoint(folder, folder.resolve().name, config, tensors, _fingerprint(config, tensors))


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


def _folder(path_or_hub_id: str | Path) -> Path:
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

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
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


def _weights(folder: Path) -> Iterator[tuple[str, Stored]]:
    for kind, read in (("model.safetensors", _safetensors), ("pytorch_model.bin", _pickled)):
        if (folder / f"{kind}.index.json").is_file():
            for file in _shards(folder, f"{kind}.index.json"):
                yield from read(folder / file)
            return
        if (folder / kind).is_file():
            yield from read(folder / kind)
            return
    raise CheckpointError(f"{folder} has no model.safetensors (nor shards with an index, nor pytorch_model.bin)")


def _shards(folder: Path, index: str) -> list[str]:
    weight_map = read_json(folder / index, "has no weights").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / index} has no weight_map")
    files = sorted({str(v) for v in weight_map.values()})
    for file in files:
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{folder / index} points outside its folder: {file!r}; only plain file names are read"
            )
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file} is missing, though {index} lists it")
    return files


def _safetensors(path: Path) -> Iterator[tuple[str, Stored]]:
    """Map one file. Format: https://huggingface.co/docs/safetensors (u64 header length, JSON header, data)."""
    import ml_dtypes

    types = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100 << 20):
            raise CheckpointError(f"{path} is truncated or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(file.read(length))
            entries = [_entry(name, e) for name, e in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} has a damaged safetensors header") from error
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    for name, dtype, shape, start, stop in entries:
        if _BUFFERS.search(name):
            continue
        if dtype not in types:
            raise CheckpointError(f"{path}: tensor {name!r} is {dtype}; supported are {', '.join(DTYPES)}")
        count = int(np.prod(shape, dtype=object))
        if min(shape, default=0) < 0 or start < 0 or stop - start != count * types[dtype].itemsize:
            raise CheckpointError(f"{path}: tensor {name!r} of shape {shape} does not fit its bytes {start}:{stop}")
        if 8 + length + stop > size:
            raise CheckpointError(f"{path} is truncated: tensor {name!r} ends at byte {8 + length + stop} of {size}")
        array = np.frombuffer(mapped, types[dtype], count, 8 + length + start).reshape(shape)
        yield name, Stored(dtype, array, mapped, (8 + length + start, 8 + length + stop))


def _entry(name: str, entry: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, dtype, shape and byte range of one header entry."""
    start, stop = map(int, entry["data_offsets"])
    return str(name), str(entry["dtype"]), tuple(map(int, entry["shape"])), start, stop


def _pickled(path: Path) -> Iterator[tuple[str, Stored]]:
    """pytorch_model.bin by torch's restricted unpickler: tensors only, nothing in the file is executed."""
    import ml_dtypes
    import torch

    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, … : all mean that it is not a tensor file
        raise CheckpointError(
            f"{path} holds more than tensors or is damaged, and is not executed; save it again as safetensors"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or _BUFFERS.search(str(name)):
            continue
        if tensor.dtype not in names:
            raise CheckpointError(f"{path}: tensor {name!r} is {tensor.dtype}; supported are {', '.join(DTYPES)}")
        dtype, tensor = names[tensor.dtype], tensor.detach().contiguous()
        array = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if dtype == "BF16" else tensor.numpy()
        yield str(name), Stored(dtype, array)


def _canonical(folder: Path, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    out: dict[str, Stored] = {}
    for name, stored in tensors.items():
        canonical = name
        for pattern, prefix in _SPELLINGS:
            if (match := pattern.match(name)) is not None:
                canonical = prefix + name[match.end() :]
                break
        if canonical in out:
            raise CheckpointError(f"{folder}: two tensors are both {canonical!r}; remove one of the spellings")
        out[canonical] = stored
    return out


def _fingerprint(config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> str:
    """SHA-256 over the config and, of every tensor, name, dtype, shape and both ends."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        stored = tensors[name]
        digest.update(f"{name} {stored.dtype} {stored.array.shape}".encode())
        flat = stored.array.reshape(-1)
        count = _SAMPLE // flat.dtype.itemsize
        digest.update(flat[:count].tobytes())
        digest.update(flat[-count:].tobytes())
    return digest.hexdigest()
