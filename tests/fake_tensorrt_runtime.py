# ruff: noqa: N802 - the names are those of TensorRT
"""tensorrt and tensorrt_rtx: an engine file names an ONNX graph, which ONNX Runtime runs on the bound addresses."""

from __future__ import annotations

import ctypes
import enum
import importlib.machinery
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from fake_cuda import FakeCuda

TYPES = {1: ("FLOAT", np.float32), 10: ("HALF", np.float16), 16: ("BF16", np.uint16), 7: ("INT64", np.int64)}
VERSIONS = {"tensorrt": "10.3.0", "tensorrt_rtx": "1.7.1.116"}


class IOMode(enum.Enum):
    """TensorIOMode."""

    INPUT = 1
    OUTPUT = 2


class Location(enum.Enum):
    """TensorLocation."""

    DEVICE = 0
    HOST = 1


class Strategy(enum.Enum):
    """CudaGraphStrategy of TensorRT-RTX."""

    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class ILogger:
    """The base of loggers; `trt.ILogger.__init__` must have been called, as pybind asks."""

    class Severity(enum.Enum):
        """Of a message."""

        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2

    def __init__(self) -> None:
        self.made = True


class FakeTensorRT(types.ModuleType):
    """One of the two modules. `contexts` are those made, `loaded` counts engines, `fails` ends every run."""

    ILogger, TensorIOMode, TensorLocation = ILogger, IOMode, Location

    def __init__(self, name: str, cuda: FakeCuda) -> None:
        super().__init__(name)
        self.__version__ = VERSIONS[name]
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.cuda, self.contexts, self.loaded, self.fails = cuda, list[FakeContext](), 0, False
        if name == "tensorrt_rtx":
            self.CudaGraphStrategy = Strategy

    def Runtime(self, logger: Any) -> Runtime:
        return Runtime(self, logger)


class Runtime:
    """Deserializes what `engine_file` wrote."""

    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        assert logger.made
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, content: Any) -> FakeEngine | None:
        self.trt.loaded += 1
        self.logger.log(ILogger.Severity.WARNING, "a warning, which is nobody's business")
        if bytes(content[:4]) != b"FAKE":
            self.logger.log(ILogger.Severity.ERROR, "Serialization assertion\nmagic tag does not match")
            return None
        return FakeEngine(self.trt, self.logger, json.loads(bytes(content[4:])))


class FakeEngine:
    """ICudaEngine: inputs that may change go from 0 to `most`."""

    def __init__(self, trt: FakeTensorRT, logger: Any, plan: dict[str, Any]) -> None:
        self.trt, self.logger, self.most, self.on_host = trt, logger, plan["most"], set(plan["on_host"])
        graph = onnx.load(plan["graph"]).graph
        self.inputs = {value.name: value.type.tensor_type for value in graph.input}
        self.outputs = {value.name: value.type.tensor_type for value in graph.output}
        quiet = ort.SessionOptions()
        quiet.log_severity_level = 3
        self.session = ort.InferenceSession(plan["graph"], quiet)
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> IOMode:
        return IOMode.INPUT if name in self.inputs else IOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Location:
        return Location.HOST if name in self.on_host else Location.DEVICE

    def get_tensor_dtype(self, name: str) -> Any:
        return types.SimpleNamespace(name=TYPES[self.type(name).elem_type][0])

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size.dim_value if size.HasField("dim_value") else -1 for size in self.type(name).shape.dim]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        assert profile == 0
        assert name in self.inputs
        shape = self.get_tensor_shape(name)
        most = [self.most[name] if size < 0 else size for size in shape]
        return [[0 if size < 0 else size for size in shape], most, most]

    def create_runtime_config(self) -> Any:
        assert self.trt.__name__ == "tensorrt_rtx"
        return types.SimpleNamespace(cuda_graph_strategy=Strategy.DISABLED)

    def create_execution_context(self, runtime_config: Any = None) -> FakeContext:
        context = FakeContext(self, getattr(runtime_config, "cuda_graph_strategy", Strategy.DISABLED))
        self.trt.contexts.append(context)
        return context

    def type(self, name: str) -> Any:
        return (self.inputs | self.outputs)[name]


class FakeContext:
    """IExecutionContext; `runs` counts what was put on the stream or captured."""

    def __init__(self, engine: FakeEngine, strategy: Strategy) -> None:
        self.engine, self.strategy, self.runs = engine, strategy, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, 0)
        if len(shape) != len(high) or not all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True)):
            self._say(f"set_input_shape: {name} {shape} is outside {low} to {high}")
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.names
        self.addresses[name] = address
        return bool(address)

    def get_tensor_shape(self, name: str) -> list[int]:
        """Of the encoders' outputs: what they say, for as many pictures as are given."""
        (given,) = self.shapes.values()
        return [given[0] if size < 0 else size for size in self.engine.get_tensor_shape(name)]

    def execute_async_v3(self, stream_handle: int) -> bool:
        self.runs += 1
        if self.engine.trt.fails:
            self._say("Cuda Runtime (an illegal memory access was encountered)")
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        assert set(shapes) == set(self.engine.inputs), "an input has no shape"
        assert set(addresses) == set(self.engine.names), "an input or output has no address"
        self.engine.trt.cuda.streams[stream_handle].put(lambda: self._run(shapes, addresses))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        binding, spans, engine = self.engine.session.io_binding(), {}, self.engine
        for name, shape in shapes.items():
            kind = engine.type(name).elem_type
            size = math.prod(shape) * np.dtype(TYPES[kind][1]).itemsize
            address = engine.trt.cuda.held(addresses[name], size, host=name in engine.on_host)
            spans[name] = (address, size)
            copied = ctypes.create_string_buffer(
                ctypes.string_at(address, size), max(size, 1)
            )  # runs read before writing
            binding.bind_input(name, "cpu", 0, kind, shape, ctypes.addressof(copied))
            binding.kept = [*getattr(binding, "kept", []), copied]
        for name in engine.outputs:
            binding.bind_output(name)
        engine.session.run_with_iobinding(binding)
        for name, value in zip(engine.outputs, binding.get_outputs(), strict=True):
            address, size = addresses[name], value.tensor_size_in_bytes()
            engine.trt.cuda.held(address, size)
            for other, (start, length) in spans.items():
                apart = address + size <= start or start + length <= address
                fixed = engine.get_tensor_shape(name)
                same = (address, size) == (start, length) and -1 not in fixed and "cache" in name and "cache" in other
                assert apart or same, f"{name} is written over {other}"
            ctypes.memmove(address, value.data_ptr(), size)

    def _say(self, words: str) -> None:
        self.engine.logger.log(ILogger.Severity.ERROR, words)


def engine_file(path: Path, graph: Path, most: dict[str, int], on_host: tuple[str, ...] = ()) -> None:
    """Write an engine whose inputs' open sizes go up to `most`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"FAKE" + json.dumps({"graph": str(graph), "most": most, "on_host": on_host}).encode())


def install(monkeypatch: pytest.MonkeyPatch, sdk: str, cuda: FakeCuda) -> FakeTensorRT:
    """Put the two modules in the place of what is installed, and take the other SDK away."""
    fake = FakeTensorRT(sdk, cuda)
    for name in VERSIONS:
        monkeypatch.setitem(sys.modules, name, fake if name == sdk else None)  # type: ignore[arg-type]
    for name in ("cuda", "cuda.bindings"):
        package = types.ModuleType(name)
        package.__path__ = []
        package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        monkeypatch.setitem(sys.modules, name, package)
    cuda.__spec__ = importlib.machinery.ModuleSpec(cuda.__name__, None)
    monkeypatch.setitem(sys.modules, cuda.__name__, cuda)
    return fake
