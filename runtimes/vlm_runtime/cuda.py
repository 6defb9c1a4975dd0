"""One CUDA device through cuda-python: memory on it, pinned memory beside it, one stream, graphs captured from it."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_models.errors import DependencyError, InputError


def runtime(engine: str) -> Any:
    """cuda.bindings.runtime. Raises DependencyError, naming the extra, where it is not installed."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        raise DependencyError(f"engine {engine!r} needs cuda-python: pip install 'vlm-export[tensorrt]'")
    return importlib.import_module("cuda.bindings.runtime")


def check_device(engine: str) -> None:
    """Raises DependencyError where cuda-python, its driver or a device is missing."""
    cuda = runtime(engine)
    error, count = cuda.cudaGetDeviceCount()
    if int(error) or not count:
        reason = _words(cuda, error) if int(error) else "CUDA finds no device"
        raise DependencyError(
            f"engine {engine!r} needs an NVIDIA GPU and its driver, which do not answer ({reason}): "
            "--engine tensorrt_onnx runs the same graphs without"
        )


def _words(cuda: Any, error: Any) -> str:
    names = cuda.cudaGetErrorName(error)[-1], cuda.cudaGetErrorString(error)[-1]
    return ": ".join(name.decode(errors="replace") for name in names)


class Memory:
    """Bytes on the device, zeroed; freed with this object."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        self.size = size
        self.address: int = gpu.allocate(size)
        weakref.finalize(self, gpu.cuda.cudaFree, self.address).atexit = False


class Gpu:
    """The first CUDA device of this process: `name`, `capability` as "8.9", and a stream of its own.

    Raises DependencyError where there is no device, or when CUDA fails; InputError when its memory is full.
    """

    def __init__(self, engine: str) -> None:
        check_device(engine)
        self.cuda = cuda = runtime(engine)
        attributes = cuda.cudaDeviceAttr
        major = self.call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, 0)
        minor = self.call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, 0)
        self.capability = f"{major}.{minor}"
        self.name: str = self.call("cudaGetDeviceProperties", 0).name.decode(errors="replace").rstrip("\0")
        self._stream = self.call("cudaStreamCreateWithFlags", cuda.cudaStreamNonBlocking)
        self.stream = int(self._stream)
        weakref.finalize(self, cuda.cudaStreamDestroy, self._stream).atexit = False

    def call(self, name: str, *arguments: Any) -> Any:
        """What the CUDA function returns behind its error code. Raises DependencyError with CUDA's words."""
        error, *values = getattr(self.cuda, name)(*arguments)
        if int(error):
            raise DependencyError(
                f"CUDA's {name} failed on {getattr(self, 'name', 'the GPU')} ({_words(self.cuda, error)})"
            )
        return values[0] if values else None

    def allocate(self, size: int) -> int:
        """The address of `size` zeroed bytes, for whoever frees them."""
        error, address = self.cuda.cudaMalloc(max(size, 1))
        if int(error):
            free, total = self._memory()
            self.cuda.cudaGetLastError()
            raise InputError(
                f"{self.name} has no room for {size >> 20} MiB more ({free >> 20} of {total >> 20} MiB are free): "
                "lower --max-context, or end what else uses it"
            )
        self.call("cudaMemsetAsync", address, 0, max(size, 1), self._stream)
        return int(address)

    def pinned(self, shape: tuple[int, ...], dtype: type[Any]) -> NDArray[Any]:
        """A zeroed array in page-locked memory of the host, which the device copies from and to by itself."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = int(self.call("cudaMallocHost", max(size, 1)))
        raw = (ctypes.c_char * size).from_address(address)
        weakref.finalize(raw, self.cuda.cudaFreeHost, address).atexit = False
        array: NDArray[Any] = np.ndarray(shape, dtype, buffer=memoryview(raw).cast("B"))
        array[...] = 0
        return array

    def upload(self, address: int, source: NDArray[Any]) -> None:
        """Copy a contiguous pinned array to the device, in the order of the stream."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, kind, self._stream)

    def download(self, target: NDArray[Any], address: int) -> None:
        """Copy to a contiguous pinned array, in the order of the stream."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", target.ctypes.data, address, target.nbytes, kind, self._stream)

    def copy_blocks(self, target: int, target_step: int, source: int, source_step: int, size: int, count: int) -> None:
        """Copy `count` blocks of `size` bytes that begin every so many bytes; the two may not overlap."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpy2DAsync", target, target_step, source, source_step, size, count, kind, self._stream)

    def synchronize(self) -> None:
        """Wait until the stream has done all it was given."""
        self.call("cudaStreamSynchronize", self._stream)

    def capture(self, work: Callable[[], None]) -> Graph | None:
        """`work` as one graph, captured and not run; None when it cannot be captured."""
        mode = self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
            whole = True
        except (DependencyError, InputError):
            whole = False
        error, graph = self.cuda.cudaStreamEndCapture(self._stream)
        if not whole or int(error):
            self.cuda.cudaGetLastError()
            return None
        return Graph(self, graph)

    def _memory(self) -> tuple[int, int]:
        error, free, total = self.cuda.cudaMemGetInfo()
        return (0, 0) if int(error) else (int(free), int(total))


class Graph:
    """Work captured from a stream, launched as often as wanted; its addresses are those of the capture."""

    def __init__(self, gpu: Gpu, graph: Any) -> None:
        self._gpu = gpu
        self._executable = gpu.call("cudaGraphInstantiate", graph, 0)
        gpu.call("cudaGraphDestroy", graph)
        weakref.finalize(self, gpu.cuda.cudaGraphExecDestroy, self._executable).atexit = False

    def launch(self) -> None:
        """Put the work on the stream."""
        self._gpu.call("cudaGraphLaunch", self._executable, self._gpu._stream)
