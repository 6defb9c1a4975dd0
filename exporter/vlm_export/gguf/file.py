"""One GGUF file written while the checkpoint streams by: header first, then every row range at its place."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from vlm_export.gguf.architecture import Architecture, Value
from vlm_export.gguf.blocks import block, ggml_type, grid_of_blocks, grid_to_blocks, largest, to_blocks
from vlm_export.gguf.tensors import HEAD, TOKEN_EMBEDDING, Tensor
from vlm_export.target import Progress
from vlm_models.errors import BundleError, CheckError, CheckpointError, RecipeError
from vlm_models.grid import Grid
from vlm_quant.affine import widen
from vlm_quant.gguf_types import GgufType
from vlm_runtime.gguf_header import read_header

CHUNK = 1 << 21  # weights read, converted and written by one thread at a time
_QUANTIZATION_VERSION = 2
_ALIGNMENT = 32


@dataclass(frozen=True)
class FileFacts:
    """What a file holds: the ggml type of each tensor ("q8_0"), and why some did not take the type asked for.

    The integers of `grids` are a quantizer's; tensors of `rounded_again` stood on a grid that has no such form.
    """

    types: Mapping[str, str]
    fallbacks: Mapping[str, str]
    grids: tuple[str, ...] = ()
    rounded_again: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Place:
    """Where a tensor goes and as what."""

    tensor: Tensor
    type: str
    offset: int
    row_bytes: int


def write_gguf(
    path: Path,
    arch: Architecture,
    fields: Mapping[str, Value],
    tensors: Sequence[Tensor],
    type: GgufType,
    tokenizer_fields: Mapping[str, Value],
    *,
    own: Mapping[str, str] | None = None,
    progress: Progress,
) -> FileFacts:
    """Write `tensors` at the direct type `type`; `fields` are keys of ours and general.* beside the architecture's.

    The matrices take the type, those of `own` the ggml type named there. Without one, the head and the embedding table
    keep q8_0 under 4- and 5-bit types. Rows that are no multiple of the type's block are f16, which is a fallback. All
    else is f32. The file is read back.
    Raises RecipeError for weights beyond the type's range, CheckpointError for weights that are not finite.
    """
    assert type.direct, type.name
    chosen = {tensor.name: _choose(tensor, type, (own or {}).get(tensor.name)) for tensor in tensors}
    types = {name: kind for name, (kind, _) in chosen.items()}
    general: dict[str, Value] = {"general.type": "model", "general.file_type": type.file_type}
    if any(block(name)[0] > 1 for name in types.values()):
        general["general.quantization_version"] = _QUANTIZATION_VERSION
    start = _write_header(path, arch.name, {**general, **fields, **arch.fields, **tokenizer_fields}, tensors, types)
    _write_tensors(path, list(_places(tensors, types, start)), progress)
    checked(path, {tensor.name: tensor.shape for tensor in tensors}, types)
    fallbacks = {name: reason for name, (_, reason) in chosen.items() if reason}
    on_grid = {tensor.name: _grid(tensor, types[tensor.name]) for tensor in tensors if tensor.grid is not None}
    packed = tuple(name for name, grid in on_grid.items() if grid is not None)
    again = tuple(name for name in on_grid if name not in packed and block(types[name])[0] > 1)
    return FileFacts(types, fallbacks, packed, again)


def checked(
    path: Path, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Open a finished file again and compare its tensors with `shapes` and, where given, `types`; the types found.

    Writers have reported success on files without tensors. Raises CheckError naming the first difference.
    """
    try:
        found = read_header(path).tensors
    except BundleError as error:
        raise CheckError(f"{path.name} cannot be read back ({error})") from None
    names = {name: GGMLQuantizationType(tensor.type).name.lower() for name, tensor in found.items()}
    for name, shape in shapes.items():
        if name not in found:
            raise CheckError(f"{path.name} was written without its tensor {name!r}: export again")
        if found[name].shape[::-1] != shape:
            raise CheckError(f"{path.name}: tensor {name!r} has shape {found[name].shape[::-1]} instead of {shape}")
        if types is not None and names[name] != types[name]:
            raise CheckError(f"{path.name}: tensor {name!r} is {names[name]} instead of {types[name]}")
    if more := sorted(set(found) - set(shapes)):
        raise CheckError(f"{path.name} holds a tensor {more[0]!r} that the model does not have")
    return names


def _choose(tensor: Tensor, type: GgufType, own: str | None) -> tuple[str, str]:
    """The ggml type of a tensor, and the reason where that is a fallback."""
    if not tensor.matrix:
        return "f32", ""
    name = own or ("q8_0" if type.bits < 8 and tensor.name in (TOKEN_EMBEDDING, HEAD) else type.name)
    weights, columns = block(name)[0], tensor.shape[-1]
    if columns % weights:
        return "f16", f"f16: its rows of {columns} weights are not a multiple of {name}'s blocks of {weights}"
    return name, ""


def _grid(tensor: Tensor, name: str) -> Grid | None:
    return None if tensor.grid is None else grid_of_blocks(tensor.grid, name, tensor.shape[-1])


def _row_bytes(tensor: Tensor, name: str) -> int:
    """Bytes of one row of a matrix, or of one value of a vector."""
    weights, size = block(name)
    return (tensor.shape[-1] if tensor.matrix else 1) // weights * size


def _write_header(
    path: Path, name: str, fields: Mapping[str, Value], tensors: Sequence[Tensor], types: Mapping[str, str]
) -> int:
    """Everything before the tensor data; the offset at which that starts."""
    writer = GGUFWriter(path, name)
    for key, value in fields.items():
        if value != []:  # GGUF's arrays take their type from the first value
            writer.add_key_value(key, value, _value_type(value))
    for tensor in tensors:
        size = tensor.shape[0] * _row_bytes(tensor, types[tensor.name])
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, ggml_type(types[tensor.name]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return _aligned(path.stat().st_size)


def _value_type(value: Value) -> GGUFValueType:
    if isinstance(value, list):
        return GGUFValueType.ARRAY
    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    return kinds.get(value.__class__, GGUFValueType.STRING)


def _places(tensors: Sequence[Tensor], types: Mapping[str, str], start: int) -> Iterator[_Place]:
    for tensor in tensors:
        size = _row_bytes(tensor, types[tensor.name])
        yield _Place(tensor, types[tensor.name], start, size)
        start = _aligned(start + tensor.shape[0] * size)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _write_tensors(path: Path, places: Sequence[_Place], progress: Progress) -> None:
    """All row ranges of all tensors on all cores: numpy works outside the interpreter lock."""
    end = max(_aligned(p.offset + p.tensor.shape[0] * p.row_bytes) for p in places)
    total, done = sum(math.prod(p.tensor.shape) for p in places), 0
    file = os.open(path, os.O_WRONLY)
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        os.ftruncate(file, end)
        tasks = [(p, [pool.submit(_write_rows, file, p, *span) for span in _spans(p.tensor)]) for p in places]
        for place, ranges in tasks:
            progress("language_model", done, total)
            for task in ranges:
                task.result()
            place.tensor.release()
            done += math.prod(place.tensor.shape)
        progress("language_model", total, total)
    finally:
        pool.shutdown(cancel_futures=True)
        os.close(file)


def _spans(tensor: Tensor) -> Iterator[tuple[int, int]]:
    rows = tensor.shape[0]
    step = max(CHUNK // math.prod(tensor.shape[1:]), 1)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _write_rows(file: int, place: _Place, start: int, stop: int) -> None:
    rows = _converted(place, place.tensor.read(start, stop), start)
    data = memoryview(cast(Any, np.ascontiguousarray(rows).reshape(-1).view(np.uint8)))
    assert len(data) == (stop - start) * place.row_bytes, place.tensor.name
    offset = place.offset + start * place.row_bytes
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _converted(place: _Place, rows: NDArray[Any], start: int) -> NDArray[Any]:
    """Rows `start`… as they stand in the file."""
    tensor, kind = place.tensor, place.type
    if tensor.dtype.lower() == kind:
        return rows
    values = rows if rows.dtype == np.float32 else widen(rows)
    if kind != "f32":
        _check_range(tensor, kind, values)
        if (grid := _grid(tensor, kind)) is not None:
            return grid_to_blocks(values, kind, grid.rows(start, start + len(values)))
        return to_blocks(values, kind)
    return values


def _check_range(tensor: Tensor, kind: str, values: NDArray[np.float32]) -> None:
    reached = float(np.maximum(values.max(initial=0), -values.min(initial=0)))
    if not math.isfinite(reached):
        raise CheckpointError(f"{tensor.source} holds weights that are not finite: the checkpoint is damaged")
    if reached > largest(kind):
        raise RecipeError(
            f"{tensor.source} reaches {reached:.3g}, beyond {kind}: choose bf16 or fp32 for the language model"
        )
