"""Engine files of a bundle: the one that fits this GPU and SDK, opened by TensorRT or TensorRT-RTX."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vlm_models.errors import BundleError, DependencyError, InputError
from vlm_models.plain import from_plain
from vlm_runtime.cuda import Gpu

if TYPE_CHECKING:
    from vlm_runtime.bundle import Bundle

SDKS = ("tensorrt", "tensorrt_rtx")
TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}  # TensorRT's names → the manifest's


@dataclass(frozen=True)
class EngineFile:
    """One engine as the manifest lists it in the `engines` of a Part."""

    file: str
    profile: str
    compute_capabilities: tuple[str, ...]
    sdk: Literal["tensorrt", "tensorrt_rtx"]
    version: str

    def __str__(self) -> str:
        return f"{self.profile} ({', '.join(self.compute_capabilities)}; {self.sdk} {self.version})"


def engine_files(bundle: Bundle, part: str, engine: str) -> list[EngineFile]:
    """The engines listed for `part`. Raises BundleError for a list that cannot be read, or without any."""
    held, known = bundle.part(part, engine), EngineFile.__dataclass_fields__
    listed = held.details.get("engines")
    if not isinstance(listed, list | tuple) or not listed:
        raise BundleError(
            f"the bundle has no TensorRT engine of the {part} yet: build it for this GPU with "
            f"vlm-export --build {bundle.folder}, or run its graph with --engine tensorrt_onnx"
        )
    files = []
    for one in listed:
        plain = {name: value for name, value in one.items() if name in known} if isinstance(one, Mapping) else one
        try:
            file = from_plain(EngineFile, plain, f"the manifest's engines of the {part}")
        except InputError as error:
            raise BundleError(f"{error}: export the model again") from None
        if file.file not in held.files:
            raise BundleError(f"the engine {file.file!r} is not one of the files of the {part}: export the model again")
        files.append(file)
    return files


def fitting(bundle: Bundle, part: str, files: list[EngineFile], gpu: Gpu) -> EngineFile:
    """The engine for this GPU and an SDK that is installed in the same version.

    Raises BundleError saying what there is, on both sides, and how to build another.
    """
    here = {sdk: _version(sdk) for sdk in SDKS if any(file.sdk == sdk for file in files) and installed(sdk)}
    for file in files:
        if gpu.capability in file.compute_capabilities and here.get(file.sdk) == file.version:
            return file
    sdks = " and ".join(f"{sdk} {version}" for sdk, version in here.items()) or f"no {files[0].sdk}"
    raise BundleError(
        f"no engine of the {part} fits this machine, {gpu.name} (compute capability {gpu.capability}) with {sdks}: "
        f"the bundle has {'; '.join(map(str, files))}; build one here with vlm-export --build {bundle.folder}"
    )


def installed(sdk: str) -> bool:
    """Whether the module `tensorrt` or `tensorrt_rtx` can be imported, without importing it."""
    return importlib.util.find_spec(sdk) is not None


def _version(sdk: str) -> str:
    try:
        return str(importlib.import_module(sdk).__version__)
    except (ImportError, OSError) as error:  # OSError: a library of the SDK that does not load
        raise DependencyError(f"{sdk} is installed and does not load ({error}): install it again") from None


class OpenEngine:
    """A deserialized engine: what it takes and gives, and contexts to run it in."""

    def __init__(self, bundle: Bundle, file: EngineFile, gpu: Gpu) -> None:
        self.name, self.gpu, self._folder = file.file, gpu, bundle.folder
        self.trt = trt = importlib.import_module(file.sdk)
        self._log = _log(trt)
        self._runtime = trt.Runtime(self._log)
        content = np.memmap(bundle.path(file.file), np.uint8, "r")
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise self.failed("does not load")
        names = [self._engine.get_tensor_name(n) for n in range(self._engine.num_io_tensors)]
        given = trt.TensorIOMode.INPUT
        self.inputs = [name for name in names if self._engine.get_tensor_mode(name) == given]
        self.outputs = [name for name in names if self._engine.get_tensor_mode(name) != given]

    def failed(self, what: str) -> BundleError:
        """The error of an engine that `what`, with TensorRT's words."""
        words = " ".join(" ".join(self._log.errors).split())[:300] or "TensorRT does not say why"
        self._log.errors.clear()
        return BundleError(
            f"the engine {self.name} {what} ({words}): build it again with vlm-export --build {self._folder}"
        )

    def dtype(self, name: str) -> str:
        """The type of an input or output: fp32, fp16, bf16, or TensorRT's name for another."""
        kind: str = self._engine.get_tensor_dtype(name).name
        return TYPES.get(kind, kind)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an input or output; -1 is a size that may change."""
        return tuple(self._engine.get_tensor_shape(name))

    def largest(self, name: str) -> tuple[int, ...]:
        """The largest shape that the engine was built to take."""
        return tuple(self._engine.get_tensor_profile_shape(name, 0)[2])

    def on_host(self, name: str) -> bool:
        """Whether TensorRT reads this input from the host's memory: it then decides shapes, and no graph may fix it."""
        return bool(self._engine.get_tensor_location(name) == self.trt.TensorLocation.HOST)

    def context(self, *, graphs: bool = False) -> Context:
        """A context; with `graphs` the SDK captures and replays CUDA graphs by itself, where it can."""
        strategy = getattr(self.trt, "CudaGraphStrategy", None)
        if graphs and strategy is not None:
            config = self._engine.create_runtime_config()
            config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE
            made = self._engine.create_execution_context(runtime_config=config)
        else:
            made = self._engine.create_execution_context()
        if made is None:
            raise self.failed("has no room to run")
        return Context(self, made)

    @property
    def captures(self) -> bool:
        """Whether the SDK captures CUDA graphs by itself (TensorRT-RTX)."""
        return hasattr(self.trt, "CudaGraphStrategy")


class Context:
    """One execution context, on the stream of its engine's GPU."""

    def __init__(self, engine: OpenEngine, context: Any) -> None:
        self._engine, self._context = engine, context

    def shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Set the shape of an input. Raises BundleError when the engine was not built for it."""
        if not self._context.set_input_shape(name, shape):
            raise self._engine.failed(f"does not take {name} of {shape}")

    def bind(self, name: str, address: int) -> None:
        """Set where an input is read or an output is written."""
        if not self._context.set_tensor_address(name, address):
            raise self._engine.failed(f"does not take an address for {name}")

    def output_shape(self, name: str) -> tuple[int, ...]:
        """The shape of an output for the shapes of the inputs."""
        return tuple(self._context.get_tensor_shape(name))

    def run(self) -> None:
        """Put one run on the stream."""
        if not self._context.execute_async_v3(self._engine.gpu.stream):
            raise self._engine.failed("does not run")


def _log(trt: Any) -> Any:
    """A logger that keeps errors and is silent otherwise."""
    kept = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in kept:
                self.errors.append(message)

    return Log()
