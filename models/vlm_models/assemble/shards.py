"""Tensors to safetensors files of limited size, with an index, written as they come and never held together.

Format: https://huggingface.co/docs/safetensors (u64 header length, JSON header, data).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vlm_models.checkpoint import Array

SHARD_BYTES = 4 << 30
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: `blocks()` yields its rows in order, arrays of `dtype`'s own NumPy type."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Array]]

    @property
    def bytes(self) -> int:
        """On disk."""
        size = _ITEM_BYTES[self.dtype]
        for n in self.shape:
            size *= n
        return size


def write_shards(folder: Path, tensors: Sequence[Tensor], limit: int = SHARD_BYTES) -> None:
    """model.safetensors, or model-0000i-of-0000n.safetensors of at most `limit` bytes (one tensor at least)."""
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.bytes for t in shards[-1]) + tensor.bytes > limit:
            shards.append([])
        shards[-1].append(tensor)
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names if count > 1 else ["model.safetensors"], shards, strict=True):
        with (folder / name).open("wb") as file:
            _write(file, shard)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(tensor.bytes for tensor in tensors)},
            "weight_map": {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write(file: BinaryIO, shard: Sequence[Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.bytes],
        }
        end += tensor.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in shard:
        for block in tensor.blocks():
            file.write(block.tobytes())
