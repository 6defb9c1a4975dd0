"""manifest.json: what a bundle holds, as frozen values; `manifest.schema.json` says the same as JSON Schema."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from vlm_models.errors import BundleError, InputError
from vlm_models.plain import from_plain, to_plain
from vlm_models.spec import VLMSpec

NAME = "manifest.json"
PARTS = ("vision_encoder", "projector", "language_model")
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1}
SCALE_BYTES = 4
_MAX_BYTES = 64 << 20
# fmt: off
_POSITIVE = frozenset((
    "image_size", "patch_size", "hidden_size", "layers", "image_tokens", "in_features", "out_features", "vocab_size",
    "intermediate_size", "heads", "kv_heads", "head_dim", "max_positions", "dim", "size", "rows", "columns", "least",
))
# fmt: on


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle: SHA-256 in lower-case hex and size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Part:
    """One part of the model for one engine: the file the engine opens, all files it reads, its precision."""

    graph: str
    files: tuple[str, ...]
    precision: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """The embedding table: `rows` × `columns` numbers of `dtype`, row after row, little-endian, no header.

    Integers ("I8") are multiplied by the scale of their row: `scales` is a file of `rows` float32 numbers.
    """

    file: str
    dtype: Literal["F32", "F16", "BF16", "I8"]
    rows: int
    columns: int
    scales: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything known about a bundle. Paths are relative to its folder, with `/`; each one is a key of `files`.

    `parts[part][engine]` says how an engine runs a part; `recipes[target]` and `parity[target]` are what it was built
    with and how far it is from the checkpoint. `image_newline` is a file of one row of the language model's width, in
    float32: what ends a line of patches of a picture in tiles. `notes`: what was found and chosen in the checkpoint.
    """

    format: Literal["vlm-bundle"]
    version: Literal[1]
    created: str
    spec: VLMSpec
    max_context: int
    embedding: Table
    tokenizer: str
    files: Mapping[str, FileEntry]
    parts: Mapping[str, Mapping[str, Part]]
    recipes: Mapping[str, str]
    parity: Mapping[str, Any]
    golden: str | None
    tools: Mapping[str, str]
    image_newline: str | None = None
    notes: tuple[str, ...] = ()


def read_manifest(folder: str | Path) -> Manifest:
    """The checked manifest of a bundle folder. Raises BundleError, one line, whatever is wrong with it."""
    path = Path(folder) / NAME
    data = _json(Path(folder), path)
    if not isinstance(data, dict) or data.get("format") != "vlm-bundle":
        raise BundleError(f'{path} is not a vlm-export manifest (no "format": "vlm-bundle"): export the model again')
    version = data.get("version")
    if type(version) is not int or version != 1:
        got = _short(repr(version))
        raise BundleError(f"{path} has version {got}, this vlm-export reads version 1: update it or export again")
    try:
        manifest = from_plain(Manifest, data, "manifest")
    except (InputError, OverflowError, RecursionError) as error:
        raise BundleError(f"{path}: {_short(str(error))}") from None
    for problem in problems(manifest):
        raise BundleError(f"{path}: {_short(problem)}")
    return manifest


def write_manifest(folder: str | Path, manifest: Manifest) -> Path:
    """Write `manifest` into the folder, atomically; NaN and infinities in `parity` become null.

    Raises BundleError for a manifest that `read_manifest` would refuse.
    """
    for problem in problems(manifest):
        raise BundleError(f"cannot write {NAME}: {_short(problem)}")
    data = to_plain(manifest)
    data["parity"] = _finite(data["parity"])
    for where, key in ((data["embedding"], "scales"), (data, "image_newline"), (data, "notes")):
        if not where[key]:  # runtimes that do not know it read the bundle all the same
            del where[key]
    path = Path(folder) / NAME
    partial = path.with_name(f".{NAME}.partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path


def problems(manifest: Manifest) -> Iterator[str]:
    """What is wrong with a manifest beyond the types of its fields, one line each; nothing when it is sound."""
    for name, entry in manifest.files.items():
        if not safe_path(name):
            yield f"file {name!r} does not stay inside the bundle: relative paths with '/' and without '..' only"
        if not re.fullmatch(r"[0-9a-f]{64}", entry.sha256):
            yield f"file {name!r} has no valid sha256: {entry.sha256!r}"
        if entry.bytes < 0:
            yield f"file {name!r} has a size of {entry.bytes} bytes"
    if not manifest.tokenizer or manifest.golden == "":
        yield "the tokenizer or golden file has an empty name"
    for use, name in _references(manifest):
        if name not in manifest.files:
            yield f"{use} names {name!r}, which is not in 'files'"
    for target, record in manifest.parity.items():
        sound = isinstance(record, Mapping) and isinstance(record.get("passed"), bool)
        if not sound or not isinstance(record.get("stages"), Mapping):
            yield f"the parity record of {target!r} has no 'passed' or no 'stages'"
    yield from _part_problems(manifest)
    yield from _table_problems(manifest)
    yield from _not_positive(manifest.spec, "spec")
    yield from _not_positive(manifest.embedding, "embedding")
    yield from _spec_problems(manifest.spec)
    yield from _tiling_problems(manifest.spec)


def safe_path(name: str) -> bool:
    """Whether a path of a manifest is relative, normal and stays inside the folder, on every system."""
    if not name or any(c in name for c in "\\:\0\n\r") or name.startswith("/") or name == NAME:
        return False
    return all(p not in ("", ".", "..") for p in name.split("/")) and str(PurePosixPath(name)) == name


def _json(folder: Path, path: Path) -> Any:
    try:
        if not folder.is_dir():
            raise BundleError(f"no such folder: {folder}")
        if not path.is_file():
            raise BundleError(f"{folder} is not a bundle: it has no {NAME}; make one with vlm-export")
        if path.stat().st_size > _MAX_BYTES:
            raise BundleError(f"{path} is larger than {_MAX_BYTES >> 20} MiB: the bundle is damaged; export again")
        return json.loads(path.read_bytes(), parse_constant=_not_finite, parse_float=_float)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BundleError(f"{path} is not valid JSON ({_short(str(error))}): export again") from None


def _float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_finite(text)


def _not_finite(text: str) -> float:
    raise ValueError(f"{_short(text)} is not a finite number")


def _references(manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield "embedding", manifest.embedding.file
    if manifest.embedding.scales is not None:
        yield "embedding", manifest.embedding.scales
    yield "tokenizer", manifest.tokenizer
    for use, name in (("golden", manifest.golden), ("image_newline", manifest.image_newline)):
        if name is not None:
            yield use, name
    for name, engines in manifest.parts.items():
        for engine, part in engines.items():
            for file in (part.graph, *part.files):
                yield f"{name} of engine {engine!r}", file


def _part_problems(manifest: Manifest) -> Iterator[str]:
    if set(manifest.parts) != set(PARTS):
        yield f"parts are {', '.join(map(repr, manifest.parts)) or 'missing'}; a bundle has {', '.join(PARTS)}"
    for name, engines in manifest.parts.items():
        if not engines:
            yield f"{name} has no engine that can run it"
        for engine, part in engines.items():
            if part.graph not in part.files:
                yield f"{name} of engine {engine!r}: graph {part.graph!r} is not one of its files"


def _table_problems(manifest: Manifest) -> Iterator[str]:
    table, language = manifest.embedding, manifest.spec.language
    if (table.rows, table.columns) != (language.vocab_size, language.hidden_size):
        yield (
            f"the embedding table is {table.rows} × {table.columns}, "
            f"the language model needs {language.vocab_size} × {language.hidden_size}"
        )
    if (table.dtype == "I8") != (table.scales is not None):
        yield f"the embedding table of {table.dtype} has {'no' if table.scales is None else 'a'} file of scales"
    scales = manifest.files.get(table.scales or "")
    if scales is not None and scales.bytes != table.rows * SCALE_BYTES:
        yield f"{table.scales} has {scales.bytes} bytes, but {table.rows} scales are {table.rows * SCALE_BYTES} bytes"
    entry, size = manifest.files.get(table.file), table.rows * table.columns * ITEM_BYTES[table.dtype]
    if entry is not None and entry.bytes != size:
        yield (
            f"{table.file} has {entry.bytes} bytes, but {table.rows} × {table.columns} numbers of {table.dtype} "
            f"are {size} bytes"
        )
    tiling, newline = manifest.spec.tiling, manifest.files.get(manifest.image_newline or "")
    if (tiling is not None and tiling.newline) != (manifest.image_newline is not None):
        yield "spec.tiling.newline and image_newline do not agree: a model has the row and its file, or neither"
    if newline is not None and newline.bytes != 4 * language.hidden_size:
        yield f"image_newline has {newline.bytes} bytes, a row of {language.hidden_size} float32 has other"
    if manifest.max_context < 1:
        yield f"max_context is {manifest.max_context}; it must be positive"


def _not_positive(value: Any, where: str) -> Iterator[str]:
    for one in dataclasses.fields(value):
        inner = getattr(value, one.name)
        if dataclasses.is_dataclass(inner):
            yield from _not_positive(inner, f"{where}.{one.name}")
        elif one.name in _POSITIVE and inner < 1:
            yield f"{where}.{one.name} is {inner}; it must be positive"


def _spec_problems(spec: VLMSpec) -> Iterator[str]:
    pixels, prompt, language = spec.preprocess, spec.prompt, spec.language
    projector, width = spec.projector, spec.vision.feature_size
    if projector.out_features != language.hidden_size:
        yield f"the projector gives rows of {projector.out_features}, the language model takes {language.hidden_size}"
    if projector.in_features != width:
        yield f"the vision encoder gives rows of {width}, the projector takes {projector.in_features}"
    if spec.tiling is None and prompt.image_tokens != spec.tile_tokens:
        yield f"prompt has {prompt.image_tokens} tokens a picture, the projector gives {spec.tile_tokens}"
    if len(language.windows) != language.layers:
        yield f"the language model has {language.layers} layers, but windows of {len(language.windows)}"
    if not prompt.image_token or prompt.image_token_id < 0:
        yield f"the image token is {prompt.image_token!r} with id {prompt.image_token_id}"
    if 0.0 in pixels.std or pixels.crop < 0 or not 0 <= pixels.resample <= 5:
        yield f"spec.preprocess cannot be: std {pixels.std}, crop {pixels.crop}, resample {pixels.resample}"
    if not all(0 <= c <= 255 for c in pixels.pad_color):
        yield f"spec.preprocess.pad_color is {pixels.pad_color}: three numbers of 0 to 255"


def _tiling_problems(spec: VLMSpec) -> Iterator[str]:
    tiling, edge, rows = spec.tiling, spec.vision.image_size, spec.tile_tokens
    if tiling is None or tiling.rule != "anyres":
        return
    if not tiling.resolutions or any(n < edge or n % edge for pair in tiling.resolutions for n in pair):
        yield f"spec.tiling.resolutions are {tiling.resolutions}: heights and widths that are multiples of {edge}"
    if math.isqrt(rows) ** 2 != rows or tiling.max_grid < 0:
        yield f"spec.tiling cannot be: tiles of {rows} rows, which are no square, or max_grid {tiling.max_grid}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
