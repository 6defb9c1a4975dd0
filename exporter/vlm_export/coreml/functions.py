"""One package of several functions that share their weights, and the marks that say whose part it is."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from vlm_export.coreml.sdk import coremltools, quiet

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")


def merge(functions: Mapping[str, Path], path: Path, metadata: Mapping[str, str]) -> None:
    """Merge packages of one function each into `path`, under the names given; the first one is the default.

    Weights that are equal are stored once. Compress before this: coremltools compresses no merged package.
    """
    utils = coremltools("models.utils")
    descriptor = utils.MultiFunctionDescriptor()
    for name, package in functions.items():
        descriptor.add_function(str(package), src_function_name="main", target_function_name=name)
    descriptor.default_function_name = next(iter(functions))
    if path.exists():
        shutil.rmtree(path)
    with quiet():
        utils.save_multifunction(descriptor, str(path))
    mark(path, metadata)


def mark(path: Path, metadata: Mapping[str, str]) -> None:
    """Write `metadata` ("vlm.fingerprint", "vlm.part") into a package's description."""
    model = coremltools("proto.Model_pb2").Model()
    model.ParseFromString((path / MODEL).read_bytes())
    model.description.metadata.userDefined.update(metadata)
    (path / MODEL).write_bytes(model.SerializeToString())
