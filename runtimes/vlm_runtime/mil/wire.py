"""Protocol buffers' wire format, read without trust and without generated classes.

A Core ML specification needs some 40 field numbers of a schema with thousands; reading them here keeps protobuf out of
the runtime, and a length or a nesting that lies is found where it is read. Nothing is sized by a number in the file.
Source: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Fields: TypeAlias = "dict[int, list[int | memoryview]]"

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_U64, _U32 = struct.Struct("<Q"), struct.Struct("<I")


class Unsound(Exception):  # noqa: N818 - a finding about a file, not a failure of ours
    """What is wrong with a file, in a few words; the opener turns it into a BundleError that names the file."""


def fields(data: memoryview) -> Fields:
    """Field number → its values in order: integers, or the bytes of strings, messages and packed lists."""
    found: Fields = {}
    position, end = 0, len(data)
    while position < end:
        tag, position = _varint(data, position, end)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise Unsound(f"a field has the number {number}")
        value: int | memoryview
        if kind == _BYTES:
            length, position = _varint(data, position, end)
            if length > end - position:
                raise Unsound(f"a field of {length} bytes in a message with {end - position} left")
            value, position = data[position : position + length], position + length
        elif kind == _VARINT:
            value, position = _varint(data, position, end)
        elif kind in (_FIXED64, _FIXED32):
            number_of = _U64 if kind == _FIXED64 else _U32
            if number_of.size > end - position:
                raise Unsound("it ends inside a number")
            value = number_of.unpack_from(data, position)[0]
            position += number_of.size
        else:
            raise Unsound(f"a field has the wire type {kind}")
        found.setdefault(number, []).append(value)
    return found


def _varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, position
        shift += 7
    raise Unsound("it ends inside a number" if position >= end else "a number has more than ten bytes")


def messages(found: Fields, number: int) -> Iterator[memoryview]:
    """The bytes of each message, string or packed list in field `number`."""
    for value in found.get(number, ()):
        if isinstance(value, int):
            raise Unsound(f"field {number} is a number where a message belongs")
        yield value


def message(found: Fields, number: int) -> memoryview | None:
    """The last message in field `number`, as protobuf reads it; None when there is none."""
    last = None
    for last in messages(found, number):  # noqa: B007
        pass
    return last


def number(found: Fields, field: int) -> int:
    """The unsigned number in `field`, 0 when it is absent."""
    value = found.get(field, [0])[-1]
    if not isinstance(value, int):
        raise Unsound(f"field {field} is a message where a number belongs")
    return value


def text(data: memoryview | None) -> str:
    """A string; "" when it is absent."""
    try:
        return str(data, "utf-8") if data is not None else ""
    except UnicodeDecodeError:
        raise Unsound("a name is not UTF-8") from None


def entries(found: Fields, field: int) -> Iterator[tuple[str, memoryview]]:
    """Key and value bytes of a map with string keys; a later entry of the same key follows."""
    for entry in messages(found, field):
        pair = fields(entry)
        yield text(message(pair, 1)), message(pair, 2) or memoryview(b"")


def floats(found: Fields, dtype: str) -> NDArray[np.generic]:
    """A repeated float ("<f4") or double ("<f8") in field 1, packed or one by one."""
    width = np.dtype(dtype).itemsize
    pieces = []
    for value in found.get(1, ()):
        piece = value.to_bytes(width, "little") if isinstance(value, int) else bytes(value)
        if len(piece) % width:
            raise Unsound(f"a list of {len(piece)} bytes where each number has {width}")
        pieces.append(piece)
    return np.frombuffer(b"".join(pieces), dtype)


def integers(found: Fields) -> list[int]:
    """A repeated signed integer or bool in field 1, packed or one by one."""
    values: list[int] = []
    for value in found.get(1, ()):
        if isinstance(value, int):
            values.append(value)
            continue
        position = 0
        while position < len(value):
            one, position = _varint(value, position, len(value))
            values.append(one)
    return [value - (1 << 64) if value >> 63 else value for value in values]
