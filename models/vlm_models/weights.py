"""The tensors of a folder, memory-mapped under the names in its files: safetensors, or PyTorch's older pickles."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm_models.checkpoint import DTYPES, Stored, read_json
from vlm_models.errors import CheckpointError

# Buffers that old versions saved; they follow from the config.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


def read_weights(folder: Path) -> Iterator[tuple[str, Stored]]:
    """Name and tensor, of all weight files of a folder. Raises CheckpointError for files that are damaged or absent."""
    for kind, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_pickled)):
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


def read_safetensors(path: Path) -> Iterator[tuple[str, Stored]]:
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


def read_pickled(path: Path) -> Iterator[tuple[str, Stored]]:
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
