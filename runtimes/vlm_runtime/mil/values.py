"""Types and constants of a MIL program: what MIL.proto calls ValueType and Value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlm_runtime.mil.wire import Fields, Unsound, fields, floats, integers, message, messages, number, text

Array: TypeAlias = NDArray[Any]

# MIL.proto DataType → name. Numbers below a byte are held one a byte, the rest as NumPy has them.
DTYPES = {
    1: "bool", 2: "string", 10: "fp16", 11: "fp32", 12: "fp64", 21: "int8", 22: "int16", 23: "int32", 24: "int64",
    25: "int4", 31: "uint8", 32: "uint16", 33: "uint32", 34: "uint64", 35: "uint4", 36: "uint2", 37: "uint1",
    38: "uint6", 39: "uint3",
}  # fmt: skip
NUMPY = {
    "bool": np.dtype(np.bool_), "fp16": np.dtype("<f2"), "fp32": np.dtype("<f4"), "fp64": np.dtype("<f8"),
    **{name: np.dtype(name) for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
    **{f"uint{bits}": np.dtype(np.uint8) for bits in (1, 2, 3, 4, 6)}, "int4": np.dtype(np.int8),
}  # fmt: skip
BITS = {name: dtype.itemsize * 8 for name, dtype in NUMPY.items()}
BITS |= {"int4": 4} | {f"uint{bits}": bits for bits in (1, 2, 3, 4, 6)}
MAX_ELEMENTS = 1 << 31
_MAX_RANK, _MAX_DEPTH = 16, 16


@dataclass(frozen=True)
class TensorType:
    """A declared type: `dtype` as MIL names it, `shape` with None where a length is not fixed (None: rank unknown)."""

    dtype: str
    shape: tuple[int | None, ...] | None
    kind: Literal["tensor", "state", "other"] = "tensor"

    def __str__(self) -> str:
        shape = "…" if self.shape is None else ", ".join("?" if n is None else str(n) for n in self.shape)
        return f"{self.dtype}[{shape}]"


@dataclass(frozen=True)
class Blob:
    """A constant in a weight file: the file as the program names it and the offset of its header, in bytes."""

    file: str
    offset: int


@dataclass(frozen=True)
class Value:
    """A constant: its declared type, and its content as an array, a string, a tuple of values, or a blob."""

    type: TensorType
    content: Array | str | Blob | tuple[Any, ...]


def read_type(data: memoryview | None, depth: int = 0) -> TensorType:
    """The bytes of a ValueType. A list, tuple or dictionary is of kind "other"."""
    if data is None or depth > _MAX_DEPTH:
        raise Unsound("a value has no type" if data is None else "types are nested too deep")
    found = fields(data)
    if (tensor := message(found, 1)) is not None:
        return _tensor_type(fields(tensor))
    if (state := message(found, 5)) is not None:
        inner = read_type(message(fields(state), 1), depth + 1)
        if inner.kind != "tensor":
            raise Unsound("a state is not of tensors")
        return TensorType(inner.dtype, inner.shape, "state")
    return TensorType("other", None, "other")


def _tensor_type(found: Fields) -> TensorType:
    dtype = DTYPES.get(number(found, 1))
    if dtype is None:
        raise Unsound(f"data type {number(found, 1)} is not known")
    rank = number(found, 2)
    shape: list[int | None] = []
    for dimension in messages(found, 3):
        parts = fields(dimension)
        constant = message(parts, 1)
        shape.append(None if constant is None else number(fields(constant), 1))
    if rank >> 63:  # -1: the rank is not known
        return TensorType(dtype, None)
    if rank != len(shape) or rank > _MAX_RANK:
        raise Unsound(f"a tensor of rank {rank} has {len(shape)} dimensions")
    if math.prod(n or 1 for n in shape) > MAX_ELEMENTS:
        raise Unsound(f"a tensor is declared with {' × '.join(map(str, shape))} elements")
    return TensorType(dtype, tuple(shape))


def read_value(data: memoryview | None, depth: int = 0) -> Value:
    """The bytes of a Value; numbers in it are checked against its type, blobs when they are read."""
    if data is None or depth > _MAX_DEPTH:
        raise Unsound("a constant is missing" if data is None else "constants are nested too deep")
    found = fields(data)
    type_ = read_type(message(found, 2), depth)
    if (blob := message(found, 5)) is not None:
        place = fields(blob)
        return Value(type_, Blob(text(message(place, 1)), number(place, 2)))
    immediate = fields(message(found, 3) or memoryview(b""))
    if (tensor := message(immediate, 1)) is not None:
        return Value(type_, _immediate(fields(tensor), type_))
    for kind in (2, 3):  # tuple and list
        if (items := message(immediate, kind)) is not None:
            return Value(type_, tuple(read_value(item, depth + 1) for item in messages(fields(items), 1)))
    return Value(type_, ())  # a dictionary, or nothing: no operation that we run takes one


def _immediate(tensor: Fields, type_: TensorType) -> Array | str | tuple[str, ...]:
    """The numbers of a TensorValue in the declared shape, or the string."""
    if type_.dtype == "string":
        strings = tuple(text(item) for item in messages(fields(message(tensor, 4) or memoryview(b"")), 1))
        return strings[0] if type_.shape == () and len(strings) == 1 else strings
    if type_.kind != "tensor" or type_.shape is None or None in type_.shape:
        raise Unsound("a constant has no fixed shape")
    shape = tuple(n for n in type_.shape if n is not None)
    return _numbers(tensor, type_.dtype, shape)


def _numbers(tensor: Fields, dtype: str, shape: tuple[int, ...]) -> Array:
    flat: Array
    if (data := message(tensor, 7)) is not None:
        raw = message(fields(data), 1) or memoryview(b"")
        return unpack(np.frombuffer(raw, np.uint8), dtype, shape)
    if (data := message(tensor, 1)) is not None:
        flat = floats(fields(data), "<f4")
    elif (data := message(tensor, 6)) is not None:
        flat = floats(fields(data), "<f8")
    else:
        data = message(tensor, 2) or message(tensor, 3) or message(tensor, 5)
        flat = np.array(integers(fields(data or memoryview(b""))), np.int64)
    if flat.size != math.prod(shape):
        raise Unsound(f"a constant has {flat.size} numbers, its shape {shape} wants {math.prod(shape)}")
    with np.errstate(over="ignore", invalid="ignore"):
        return flat.astype(NUMPY[dtype]).reshape(shape)


def packed_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that so many numbers take in a file, those below a byte packed without gaps."""
    return -(-math.prod(shape) * BITS[dtype] // 8)


def unpack(raw: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> Array:
    """Bytes of a file as an array of `shape`: a view, or a copy for numbers below a byte (lowest bits first)."""
    if raw.size != packed_bytes(dtype, shape):
        raise Unsound(f"{raw.size} bytes where {dtype} of shape {shape} takes {packed_bytes(dtype, shape)}")
    count, bits = math.prod(shape), BITS[dtype]
    if bits >= 8:
        return raw.view(NUMPY[dtype]).reshape(shape)
    if bits == 4:
        flat: NDArray[Any] = np.empty(raw.size * 2, np.uint8)
        flat[0::2], flat[1::2] = raw & 15, raw >> 4
    elif bits in (1, 2):
        flat = (raw[:, None] >> np.arange(0, 8, bits, dtype=np.uint8) & (1 << bits) - 1).reshape(-1)
    else:  # 3 and 6 cross bytes
        ones = np.unpackbits(raw, bitorder="little")[: count * bits].reshape(count, bits)
        flat = ones @ (1 << np.arange(bits, dtype=np.uint8))
    flat = flat[:count]
    if dtype == "int4":
        signed: NDArray[np.int8] = (flat ^ 8).view(np.int8) - np.int8(8)
        return signed.reshape(shape)
    return flat.reshape(shape)
