"""A weight file of a Core ML package (`weight.bin`), memory-mapped and read without trust.

Layout (all little-endian): a header of 64 bytes (count, version 2), then blobs, each with a header of 64 bytes on a
64-byte boundary: 0xDEADBEEF, type, bytes, offset of the numbers (on a 64-byte boundary too), padding bits.
Source: mlmodel/src/MILBlob/Blob/StorageFormat.hpp of apple/coremltools.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlm_runtime.mil.values import packed_bytes
from vlm_runtime.mil.wire import Unsound

_ALIGNMENT = 64
_FILE_HEADER, _BLOB_HEADER = struct.Struct("<II"), struct.Struct("<IIQQ")
_SENTINEL = 0xDEADBEEF
_TYPES = {
    1: "fp16", 2: "fp32", 3: "uint8", 4: "int8", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1", 10: "uint2",
    11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32",
}  # fmt: skip


class BlobFile:
    """An opened weight file; arrays are views of it, read from the disk when they are used."""

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        if size < _ALIGNMENT:
            raise Unsound(f"the weight file has {size} bytes")
        self._data: NDArray[np.uint8] = np.asarray(np.memmap(path, np.uint8, "r"))
        _, version = _FILE_HEADER.unpack(self._data[: _FILE_HEADER.size].tobytes())
        if version != 2:
            raise Unsound(f"the weight file has version {version}")

    def data(self, offset: int, dtype: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """The packed numbers of the blob whose header is at `offset`. Raises Unsound unless type and size are those."""
        size = len(self._data)
        if offset % _ALIGNMENT or not 0 < offset <= size - _ALIGNMENT:
            raise Unsound(f"a blob's header is at {offset} in a weight file of {size} bytes")
        sentinel, kind, length, start = _BLOB_HEADER.unpack(self._data[offset : offset + _BLOB_HEADER.size].tobytes())
        if sentinel != _SENTINEL or _TYPES.get(kind) != dtype:
            found = _TYPES.get(kind, kind) if sentinel == _SENTINEL else "no blob"
            raise Unsound(f"at {offset} of the weight file is {found}, the program says {dtype}")
        if start % _ALIGNMENT or start > size or length > size - start:
            raise Unsound(f"a blob of {length} bytes at {start} in a weight file of {size} bytes")
        if length != packed_bytes(dtype, shape):
            raise Unsound(f"a blob of {length} bytes for {dtype} of shape {shape}")
        return self._data[start : start + length]
