"""One package of several functions that share their weights, merged on the disk: no weight is held in memory.

coremltools' own merge reads all functions into memory, 10 GB for two of 1.5 billion weights. A weight file is a header
of 64 bytes (count, version), then blobs on boundaries of 64 bytes, each with a header of 64 bytes: 0xDEADBEEF, type,
bytes, offset of the numbers, padding bits. Source: mlmodel/src/MILBlob/Blob/StorageFormat.hpp of apple/coremltools.
"""

from __future__ import annotations

import shutil
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vlm_export.coreml.sdk import coremltools

_DATA = Path("Data/com.apple.CoreML")
_MODEL, _WEIGHTS = _DATA / "model.mlmodel", _DATA / "weights/weight.bin"
_ALIGNMENT = 64
_COUNT, _BLOB = struct.Struct("<I"), struct.Struct("<IIQQ")
_CHUNK = 16 << 20  # bytes compared or copied at a time
_HEAD = 4096  # bytes by which blobs are looked up


def merge(functions: Mapping[str, Path], path: Path, metadata: Mapping[str, str]) -> None:
    """Merge packages of one function "main" each into `path`, under the names given; the first one is the default.

    The packages are used up: the first becomes the merged one, whose weights the others take where they are equal.
    `metadata` ("vlm.fingerprint", "vlm.part") goes into the description. Compress before this: coremltools compresses
    no merged package.
    """
    default, base = next(iter(functions.items()))
    specifications = {name: _specification(package) for name, package in functions.items()}
    merged = type(specifications[default])()
    merged.specificationVersion = max(s.specificationVersion for s in specifications.values())
    merged.mlProgram.version = specifications[default].mlProgram.version
    merged.description.defaultFunctionName = default
    merged.description.metadata.userDefined.update(metadata)
    with (base / _WEIGHTS).open("r+b") as file:
        weights = _Weights(file, {v.offset for v in _blobs(specifications[default])})
        for name, specification in specifications.items():
            if name != default:
                _move(specification, functions[name] / _WEIGHTS, weights)
            described = specification.description
            merged.description.functions.add(
                name=name, input=described.input, output=described.output, state=described.state
            )
            merged.mlProgram.functions[name].CopyFrom(specification.mlProgram.functions["main"])
    (base / _MODEL).write_bytes(merged.SerializeToString())
    if path.exists():
        shutil.rmtree(path)
    base.rename(path)


class _Weights:
    """A weight file that grows by the blobs that it does not hold yet."""

    def __init__(self, file: BinaryIO, offsets: set[int]) -> None:
        self._file = file
        self._known: dict[tuple[int, int, bytes], list[int]] = defaultdict(list)
        for offset in sorted(offsets):
            kind, size, start, _ = _header(file, offset)
            self._known[kind, size, _read(file, start, min(size, _HEAD))].append(offset)

    def take(self, source: BinaryIO, offset: int) -> int:
        """Where the blob at `offset` of `source` lies in this file, copied there unless an equal one is."""
        kind, size, start, padding = _header(source, offset)
        key = kind, size, _read(source, start, min(size, _HEAD))
        for known in self._known[key]:
            if _equal(self._file, _header(self._file, known)[2], source, start, size):
                return known
        (count,) = _COUNT.unpack(_read(self._file, 0, _COUNT.size))
        place = self._end()
        self._write(place, _BLOB.pack(0xDEADBEEF, kind, size, place + _ALIGNMENT) + padding)
        for done in range(0, size, _CHUNK):
            self._write(place + _ALIGNMENT + done, _read(source, start + done, min(_CHUNK, size - done)))
        self._write(0, _COUNT.pack(count + 1))
        self._known[key].append(place)
        return place

    def _end(self) -> int:
        end = self._file.seek(0, 2)
        return -(-end // _ALIGNMENT) * _ALIGNMENT

    def _write(self, offset: int, data: bytes) -> None:
        self._file.seek(offset)
        self._file.write(data)


def _move(specification: Any, path: Path, weights: _Weights) -> None:
    """Point every blob of a specification into `weights`."""
    with path.open("rb") as source:
        for value in _blobs(specification):
            value.offset = weights.take(source, value.offset)


def _specification(package: Path) -> Any:
    specification = coremltools("proto.Model_pb2").Model()
    specification.ParseFromString((package / _MODEL).read_bytes())
    return specification


def _blobs(specification: Any) -> Iterator[Any]:
    """Every reference into the weight file."""
    for block in specification.mlProgram.functions["main"].block_specializations.values():
        yield from _block_blobs(block)


def _block_blobs(block: Any) -> Iterator[Any]:
    for op in block.operations:
        values = [*op.attributes.values(), *(a.value for i in op.inputs.values() for a in i.arguments)]
        yield from (v.blobFileValue for v in values if v.WhichOneof("value") == "blobFileValue")
        for inner in op.blocks:
            yield from _block_blobs(inner)


def _header(file: BinaryIO, offset: int) -> tuple[int, int, int, bytes]:
    """Type, bytes and offset of a blob's numbers, and the rest of its header."""
    header = _read(file, offset, _ALIGNMENT)
    _, kind, size, start = _BLOB.unpack(header[: _BLOB.size])
    return kind, size, start, header[_BLOB.size :]


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _equal(file: BinaryIO, start: int, other: BinaryIO, other_start: int, size: int) -> bool:
    return all(
        _read(file, start + done, min(_CHUNK, size - done))
        == _read(other, other_start + done, min(_CHUNK, size - done))
        for done in range(0, size, _CHUNK)
    )
