"""The header of a GGUF file, read without trust: llama.cpp sees a file only after everything here holds.

Layout (all little-endian): "GGUF", version, counts of tensors and of keys; keys with typed values; tensor names with
shape, type and offset; padding; the tensors one after the other. Source: docs/gguf.md of ggml-org/ggml.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm_models.errors import BundleError
from vlm_models.spec import LanguageSpec, VLMSpec

Value = str | int | float | bool

_MAX_HEADER = 128 << 20  # a vocabulary of 262 144 tokens with its merges takes some 25 MiB
_MAX_NAME, _MAX_DIMS = 63, 4
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_SCALARS = {number: struct.Struct(f"<{code}") for number, code in enumerate("BbHhIif?")}
_SCALARS |= {10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d")}
_BOOL, _STRING, _ARRAY = 7, 8, 9
# ggml type → (numbers in a block, bytes of a block): those that a model file may hold.
# fmt: off
BLOCKS: Mapping[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 16: (256, 66), 17: (256, 74), 18: (256, 98),
    19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 29: (256, 56), 30: (1, 2),
}
# fmt: on
# general.architecture of a model_type where llama.cpp has another name for it.
ARCHITECTURES: Mapping[str, str] = {"mistral": "llama", "gemma3_text": "gemma3"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` with the row length first, as GGUF has it; `offset` from the start of the file, in bytes."""

    shape: tuple[int, ...]
    type: int
    offset: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """Single values by key, lengths of arrays by key, tensors by name, in the order of the file."""

    values: Mapping[str, Value]
    arrays: Mapping[str, int]
    tensors: Mapping[str, TensorInfo]
    alignment: int


def read_header(path: Path) -> Header:
    """The checked header of a GGUF file, version 3. Raises BundleError, one line, whatever is wrong with it.

    Time and memory are bounded by the header's own bytes, 128 MiB at most; nothing is sized by a number in the file.
    """
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise _Unsound("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(_Cursor(data, min(len(data), _MAX_HEADER)), len(data))
    except _Unsound as error:
        raise BundleError(f"{path} is not a sound GGUF file ({error}): export the model again") from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}") from None


def check_language_model(header: Header, path: Path, spec: VLMSpec) -> None:
    """Raises BundleError unless this is the header of the language model of `spec`."""
    check_part(header, path, spec, "language_model")
    for what, found, wanted in _facts(header, spec.language):
        if found != wanted:
            raise BundleError(f"{path.name}: {what} is {found!r}, its bundle says {wanted!r}: export the model again")


def check_part(header: Header, path: Path, spec: VLMSpec, part: str) -> None:
    """Raises BundleError unless the file says that it is this part of this model."""
    if header.values.get("vlm.part") != part or header.values.get("vlm.fingerprint") != spec.fingerprint:
        raise BundleError(f"{path.name} is a part of another model: it is not the {part} of {spec.name}")


def _facts(header: Header, language: LanguageSpec) -> Iterator[tuple[str, object, object]]:
    """What the file says beside what the bundle says."""
    arch = header.values.get("general.architecture")
    yield "general.architecture", arch, ARCHITECTURES.get(language.model_type, language.model_type)
    for key, wanted in (("embedding_length", language.hidden_size), ("block_count", language.layers)):
        yield f"{arch}.{key}", header.values.get(f"{arch}.{key}"), wanted
    for key, wanted in (
        ("feed_forward_length", language.intermediate_size),
        ("attention.head_count", language.heads),
        ("attention.head_count_kv", language.kv_heads),
        ("attention.key_length", language.head_dim),
        ("attention.value_length", language.head_dim),
    ):
        yield f"{arch}.{key}", header.values.get(f"{arch}.{key}", wanted), wanted
    table = header.tensors.get("token_embd.weight")
    yield "token_embd.weight", table and table.shape, (language.hidden_size, language.vocab_size)
    blocks = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    yield "the number of its blocks", len(blocks), language.layers
    yield "the last of its blocks", str(language.layers - 1) in blocks, True


class _Unsound(Exception):  # noqa: N818 - the reason, on its way to a BundleError
    """What is wrong with the file."""


class _Cursor:
    """Reads forward in a mapped file and never beyond `end`."""

    def __init__(self, data: mmap.mmap, end: int) -> None:
        self.data, self.end, self.at = data, end, 0

    def take(self, kind: struct.Struct) -> int:
        start = self.at
        self.skip(kind.size)
        number: int = kind.unpack_from(self.data, start)[0]
        return number

    def skip(self, count: int) -> None:
        if count > self.end - self.at:
            raise _Unsound("it is cut short, or a length in its header is wrong")
        self.at += count

    def text(self) -> str:
        count = self.take(_U64)
        start = self.at
        self.skip(count)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise _Unsound(f"the text at byte {start} is not UTF-8") from None

    def skip_texts(self, count: int) -> None:
        """The hot loop of a large vocabulary."""
        data, end, at, unpack = self.data, self.end, self.at, _U64.unpack_from
        if count > (end - at) // _U64.size:
            raise _Unsound(f"a list of {count} texts does not fit it")
        for _ in range(count):
            if at + 8 > end:
                break
            at += 8 + unpack(data, at)[0]
        self.skip(at - self.at)


def _header(cursor: _Cursor, size: int) -> Header:
    if bytes(cursor.data[:4]) != b"GGUF":
        raise _Unsound("it does not start with GGUF")
    cursor.skip(4)
    if (version := cursor.take(_U32)) != 3:
        raise _Unsound(f"version {version} instead of 3")
    tensor_count, key_count = cursor.take(_U64), cursor.take(_U64)
    values: dict[str, Value] = {}
    arrays: dict[str, int] = {}
    for _ in range(min(key_count, cursor.end)):
        key = cursor.text()
        if not key or key in values or key in arrays:
            raise _Unsound(f"key {key[:80]!r} is there twice" if key else "a key has no name")
        kind = cursor.take(_U32)
        if kind == _ARRAY:
            arrays[key] = _array(cursor)
        else:
            values[key] = _value(cursor, kind)
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or alignment not in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise _Unsound(f"general.alignment is {alignment!r:.40}")
    tensors = _tensors(cursor, tensor_count, size, alignment)
    return Header(values, arrays, tensors, alignment)


def _value(cursor: _Cursor, kind: int) -> Value:
    if kind == _STRING:
        return cursor.text()
    if kind not in _SCALARS:
        raise _Unsound(f"a value has the unknown type {kind}")
    start = cursor.at
    value: Value = cursor.take(_SCALARS[kind])
    if kind == _BOOL and cursor.data[start] > 1:
        raise _Unsound(f"a boolean is {cursor.data[start]}")
    return value


def _array(cursor: _Cursor) -> int:
    """Skip an array; its length."""
    kind, count = cursor.take(_U32), cursor.take(_U64)
    if kind == _STRING:
        cursor.skip_texts(count)
    elif kind in _SCALARS:
        cursor.skip(count * _SCALARS[kind].size)
    else:
        raise _Unsound(f"a list has elements of the unknown type {kind}")
    return count


def _tensors(cursor: _Cursor, count: int, size: int, alignment: int) -> dict[str, TensorInfo]:
    """The tensor list, whose offsets must follow each other without a gap and stay inside the file."""
    found: list[tuple[str, tuple[int, ...], int, int]] = []
    names = set()
    for _ in range(min(count, cursor.end)):
        name = cursor.text()
        if not 0 < len(name.encode()) <= _MAX_NAME or not name.isprintable() or name in names:
            raise _Unsound(f"tensor name {name[:80]!r} is too long, not printable or there twice")
        names.add(name)
        dims = cursor.take(_U32)
        if not 1 <= dims <= _MAX_DIMS:
            raise _Unsound(f"{name} has {dims} dimensions")
        shape = tuple(cursor.take(_U64) for _ in range(dims))
        found.append((name, shape, cursor.take(_U32), cursor.take(_U64)))
    data = start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in found:
        length = _bytes(name, shape, kind)
        if data + offset != start:
            raise _Unsound(f"{name} starts at byte {data + offset} instead of {start}")
        if start + length > size:
            raise _Unsound(f"it has {size} bytes, {name} ends at {start + length}: it is cut short")
        tensors[name] = TensorInfo(shape, kind, start, length)
        start += -(-length // alignment) * alignment
    return tensors


def _bytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    if kind not in BLOCKS:
        raise _Unsound(f"{name} has the unknown type {kind}")
    block, size = BLOCKS[kind]
    if min(shape) < 1 or shape[0] % block:
        raise _Unsound(f"{name} has the shape {shape}, rows of its type are multiples of {block}")
    total = size
    for length in (shape[0] // block, *shape[1:]):
        total *= length
    return total
