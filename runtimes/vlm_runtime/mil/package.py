"""A Core ML package (`.mlpackage`): Manifest.json, the model's specification, its weight files.

Read with own code, without coremltools, so that a bundle is checked and runs wherever NumPy does.
Sources: mlmodel/format/Model.proto and FeatureTypes.proto, modelpackage/src/ModelPackage.cpp of apple/coremltools.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from vlm_models.errors import BundleError
from vlm_runtime.mil.blob import BlobFile
from vlm_runtime.mil.program import Function, read_program
from vlm_runtime.mil.values import MAX_ELEMENTS, Array, Blob, Value, unpack
from vlm_runtime.mil.wire import Fields, Unsound, entries, fields, integers, message, messages, number, text

_MAX_MANIFEST, _MAX_SPECIFICATION = 1 << 20, 128 << 20
_MODEL_PATH = "@model_path/"
_FEATURE_DTYPES = {65568: "fp32", 65600: "fp64", 131104: "int32", 131080: "int8", 65552: "fp16"}


@dataclass(frozen=True)
class Feature:
    """An input, output or state as the description shows it to an app."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Description:
    """What one function takes and gives, by name."""

    inputs: Mapping[str, Feature]
    outputs: Mapping[str, Feature]
    states: Mapping[str, Feature]


@dataclass(frozen=True)
class Package:
    """An opened package: functions with their descriptions, metadata, and weights by the files' names."""

    folder: Path
    version: int
    functions: Mapping[str, Function]
    descriptions: Mapping[str, Description]
    default: str
    metadata: Mapping[str, str]
    _root: Path = field(repr=False)
    _blobs: dict[str, BlobFile] = field(default_factory=dict, repr=False)

    def constant(self, value: Value) -> Array | str | tuple[Any, ...]:
        """The content of a constant. Raises BundleError when a blob is not what the program says."""
        if not isinstance(value.content, Blob):
            return value.content
        with opening(self.folder):
            return self._blob(value.content, value)

    def check(self, value: Value) -> None:
        """Raises Unsound unless the blob of a constant lies in its file with the declared type and size."""
        if isinstance(value.content, Blob):
            self._blob(value.content, value, read=False)

    def _blob(self, blob: Blob, value: Value, read: bool = True) -> Array:
        declared = value.type.shape
        if declared is None or None in declared or value.type.dtype in ("bool", "string"):
            raise Unsound(f"a constant in a weight file is declared as {value.type}")
        if blob.file not in self._blobs:
            self._blobs[blob.file] = BlobFile(_inside(self._root, blob.file.removeprefix(_MODEL_PATH)))
        shape = tuple(n for n in declared if n is not None)
        data = self._blobs[blob.file].data(blob.offset, value.type.dtype, shape)
        return unpack(data, value.type.dtype, shape) if read else data


@contextlib.contextmanager
def opening(folder: Path) -> Iterator[None]:
    """Turns what is wrong with a package into one BundleError that names it."""
    try:
        yield
    except Unsound as error:
        reason = " ".join(str(error).split())[:200]
        raise BundleError(f"{folder} is not a sound Core ML package ({reason}): export the model again") from None
    except OSError as error:
        raise BundleError(f"cannot read {folder}: {error.strerror or error}") from None


def open_package(folder: str | Path) -> Package:
    """Open a package and check its program and every weight's place. Raises BundleError, one line.

    Time and memory are bounded by the specification's bytes, 128 MiB at most; weights are mapped, not read.
    """
    folder = Path(folder)
    with opening(folder):
        model = _root_model(folder)
        with model.open("rb") as file:
            size = model.stat().st_size
            if not 0 < size <= _MAX_SPECIFICATION:
                raise Unsound(f"its specification has {size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                package = _package(folder, model.parent, memoryview(bytes(mapped)))
        _check_blobs(package)
    return package


def _root_model(folder: Path) -> Path:
    """The specification's path, from Manifest.json."""
    path = folder / "Manifest.json"
    if not path.is_file():
        raise Unsound("it has no Manifest.json")
    if path.stat().st_size > _MAX_MANIFEST:
        raise Unsound("its Manifest.json is larger than 1 MiB")
    try:
        data = json.loads(path.read_bytes())
        name = data["itemInfoEntries"][data["rootModelIdentifier"]]["path"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Unsound("its Manifest.json does not name a model") from None
    return _inside(folder / "Data", name)


def _inside(root: Path, name: Any) -> Path:
    """The file `name` below `root`; links that leave it are refused."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise Unsound(f"{name!r} is not a path in the package")
    relative = PurePosixPath(name)
    path = (root / relative).resolve()
    if relative.is_absolute() or ".." in relative.parts or not path.is_relative_to(root.resolve()):
        raise Unsound(f"{name[:80]!r} is not a path in the package")
    if not path.is_file():
        raise Unsound(f"it has no file {name[:80]!r}")
    return path


def _package(folder: Path, root: Path, data: memoryview) -> Package:
    model = fields(data)
    program, described = message(model, 502), message(model, 2)
    if program is None or described is None:
        raise Unsound("it is not an ML program with a description")
    description = fields(described)
    functions = read_program(program)
    several = {}
    for item in messages(description, 20):
        found = fields(item)
        several[text(message(found, 1))] = _description(found, 2, 3, 6)
    if not several:
        several = {"main": _description(description, 1, 10, 13)}
    for name in functions:
        if name not in several:
            raise Unsound(f"function {name!r} is not described")
    metadata = fields(message(description, 100) or memoryview(b""))
    return Package(
        folder=folder,
        version=number(model, 1),
        functions=functions,
        descriptions=several,
        default=text(message(description, 21)) or "main",
        metadata={key: text(value) for key, value in entries(metadata, 100)},
        _root=root,
    )


def _description(found: Fields, inputs: int, outputs: int, states: int) -> Description:
    return Description(*(dict(_features(messages(found, n))) for n in (inputs, outputs, states)))


def _features(items: Iterator[memoryview]) -> Iterator[tuple[str, Feature]]:
    for item in items:
        found = fields(item)
        kind = fields(message(found, 3) or memoryview(b""))
        if (state := message(kind, 8)) is not None:
            kind = {5: list(messages(fields(state), 1))}
        array = fields(message(kind, 5) or memoryview(b""))
        shape = tuple(integers({1: array.get(1, [])}))
        if any(n < 0 for n in shape) or math.prod(shape) > MAX_ELEMENTS:
            raise Unsound(f"a feature is described with {' × '.join(map(str, shape))} elements")
        yield text(message(found, 1)), Feature(_FEATURE_DTYPES.get(number(array, 2), "other"), shape)


def _check_blobs(package: Package) -> None:
    """Reads the header of each blob, so that a bad place is found now and not in the middle of a run."""
    for function in package.functions.values():
        waiting = [function.block]
        while waiting:
            for op in waiting.pop().operations:
                waiting.extend(op.blocks)
                constants = [one for many in op.inputs.values() for one in many if isinstance(one, Value)]
                for value in (*constants, *(op.attributes or {}).values()):
                    package.check(value)
