"""Small Core ML packages, written by coremltools from MIL operations, for tests of our executor."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Build = Callable[..., Any]


@functools.cache
def coremltools() -> Any:
    """coremltools and what is inside, quiet: it tells of versions that it has not been tested with."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools
        from coremltools.converters.mil import mil  # noqa: F401
    return coremltools


def mb() -> Any:
    """The builder of MIL operations."""
    return coremltools().converters.mil.mil.Builder


def tensor(shape: tuple[int, ...], dtype: str = "fp16") -> Any:
    """An input of a function."""
    return mb().TensorSpec(shape, getattr(coremltools().converters.mil.mil.types, dtype))


def state(shape: tuple[int, ...]) -> Any:
    """A state of float16."""
    return mb().StateTensorSpec(shape, coremltools().converters.mil.mil.types.fp16)


def package(
    path: Path,
    inputs: Mapping[str, Any],
    build: Build,
    *,
    metadata: Mapping[str, str] | None = None,
    target: str = "iOS18",
) -> Path:
    """A package of the function `build(**inputs)`, which returns one MIL variable or several, unoptimized."""
    ct = coremltools()
    mil, opset = ct.converters.mil.mil, getattr(ct.target, target)
    program = mil.Program()
    with mil.Function(dict(inputs), opset) as function:
        made = build(**function.inputs)
        function.set_outputs(list(made) if isinstance(made, tuple | list) else [made])
    program.add_function("main", function)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ct.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            minimum_deployment_target=opset,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
    model.user_defined_metadata.update(metadata or {})
    model.save(str(path))
    return path


def numbers(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> NDArray[np.float32]:
    """Random float32 that float16 holds exactly."""
    values = np.random.default_rng(seed).normal(0, scale, shape)
    return values.astype(np.float16).astype(np.float32)
