# ruff: noqa: N802, N815 - the names are those of CUDA
"""cuda.bindings.runtime over the host's memory: real addresses, and a stream that does nothing before it must.

Work put on the stream runs when the stream is synchronized, so that a missing wait gives wrong numbers; work captured
runs when its graph is launched. An access outside what is allocated raises, freed memory is overwritten.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

GRAVE = 0xFF  # not a number, in every type


class Error(enum.IntEnum):
    """cudaError_t."""

    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorStreamCaptureUnsupported = 900


class Kind(enum.IntEnum):
    """cudaMemcpyKind."""

    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class CaptureMode(enum.IntEnum):
    """cudaStreamCaptureMode."""

    cudaStreamCaptureModeThreadLocal = 1


class Attribute(enum.IntEnum):
    """cudaDeviceAttr."""

    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


@dataclass(eq=False)
class Stream:
    """Work in order; `captured` collects it instead while a graph is captured."""

    handle: int
    waiting: list[Callable[[], None]] = field(default_factory=list)
    captured: list[Callable[[], None]] | None = None

    def __int__(self) -> int:
        return self.handle

    def put(self, work: Callable[[], None]) -> None:
        (self.waiting if self.captured is None else self.captured).append(work)


class FakeCuda(types.ModuleType):
    """The calls that vlm_runtime.cuda makes, with their names, arguments and results.

    `capability`, `count`, `memory` (bytes) and `can_capture` say what the device is; `launches` counts graphs run.
    """

    cudaError_t, cudaMemcpyKind, cudaDeviceAttr, cudaStreamCaptureMode = Error, Kind, Attribute, CaptureMode
    cudaStreamNonBlocking = 1

    def __init__(self, capability: tuple[int, int] = (8, 9), count: int = 1, memory: int = 1 << 30) -> None:
        super().__init__("cuda.bindings.runtime")
        self.capability, self.count, self.memory, self.can_capture = capability, count, memory, True
        self.device: dict[int, Any] = {}
        self.host: dict[int, Any] = {}
        self.streams: dict[int, Stream] = {}
        self.graves: list[Any] = []
        self.launches, self._handles = 0, itertools.count(1000)

    def held(self, address: int, size: int, *, host: bool = False) -> int:
        """`address`, if all of `size` bytes there are allocated; AssertionError otherwise."""
        blocks = self.host if host else self.device
        inside = any(start <= address and address + size <= start + len(block) for start, block in blocks.items())
        assert inside, f"{size} bytes at {address:#x} are not allocated on the {'host' if host else 'device'}"
        return address

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (Error.cudaSuccess, self.count) if self.count >= 0 else (Error.cudaErrorInsufficientDriver, None)

    def cudaDeviceGetAttribute(self, attribute: Attribute, device: int) -> tuple[Any, ...]:
        return Error.cudaSuccess, self.capability[attribute - Attribute.cudaDevAttrComputeCapabilityMajor]

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        return Error.cudaSuccess, types.SimpleNamespace(name=b"NVIDIA Pretended 4000\0\0")

    def cudaGetErrorName(self, error: Error) -> tuple[Any, ...]:
        return Error.cudaSuccess, error.name.encode()

    def cudaGetErrorString(self, error: Error) -> tuple[Any, ...]:
        return Error.cudaSuccess, b"in words"

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return (Error.cudaSuccess,)

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return Error.cudaSuccess, self.memory - self._used(), self.memory

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if self._used() + size > self.memory:
            return Error.cudaErrorMemoryAllocation, None
        return Error.cudaSuccess, self._new(self.device, size)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        return self._bury(self.device, address)

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        return Error.cudaSuccess, self._new(self.host, size)

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        return self._bury(self.host, address)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        stream = Stream(next(self._handles))
        self.streams[stream.handle] = stream
        return Error.cudaSuccess, stream

    def cudaStreamDestroy(self, stream: Stream) -> tuple[Any, ...]:
        del self.streams[stream.handle]
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[Any, ...]:
        assert stream.captured is None, "waiting ends a capture"
        while stream.waiting:
            stream.waiting.pop(0)()
        return (Error.cudaSuccess,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: Stream) -> tuple[Any, ...]:
        self.held(address, size)
        stream.put(lambda: _ignore(ctypes.memset(address, value, size)))
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Kind, stream: Stream) -> tuple[Any, ...]:
        self.held(target, size, host=kind == Kind.cudaMemcpyDeviceToHost)
        self.held(source, size, host=kind == Kind.cudaMemcpyHostToDevice)
        stream.put(lambda: _ignore(ctypes.memmove(target, source, size)))
        return (Error.cudaSuccess,)

    def cudaMemcpy2DAsync(
        self,
        target: int,
        target_step: int,
        source: int,
        source_step: int,
        width: int,
        height: int,
        kind: Kind,
        stream: Stream,
    ) -> tuple[Any, ...]:
        assert kind == Kind.cudaMemcpyDeviceToDevice
        assert width <= min(target_step, source_step)
        spans = [(a, (height - 1) * step + width) for a, step in ((target, target_step), (source, source_step))]
        for address, size in spans:
            self.held(address, size)
        (low, size), (high, _) = sorted(spans)
        assert low + size <= high, "the two overlap"

        def copy() -> None:
            for row in range(height):
                ctypes.memmove(target + row * target_step, source + row * source_step, width)

        stream.put(copy)
        return (Error.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: Stream, mode: CaptureMode) -> tuple[Any, ...]:
        assert stream.captured is None
        stream.captured = []
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: Stream) -> tuple[Any, ...]:
        graph, stream.captured = stream.captured, None
        return (Error.cudaSuccess, graph) if self.can_capture else (Error.cudaErrorStreamCaptureUnsupported, None)

    def cudaGraphInstantiate(self, graph: list[Callable[[], None]], flags: int) -> tuple[Any, ...]:
        return Error.cudaSuccess, list(graph)

    def cudaGraphDestroy(self, graph: list[Callable[[], None]]) -> tuple[Any, ...]:
        graph.clear()
        return (Error.cudaSuccess,)

    def cudaGraphLaunch(self, graph: list[Callable[[], None]], stream: Stream) -> tuple[Any, ...]:
        self.launches += 1
        stream.waiting.extend(graph)
        return (Error.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: list[Callable[[], None]]) -> tuple[Any, ...]:
        graph.clear()
        return (Error.cudaSuccess,)

    def _used(self) -> int:
        return sum(map(len, self.device.values()))

    def _new(self, blocks: dict[int, Any], size: int) -> int:
        block = (ctypes.c_ubyte * size)()
        ctypes.memset(block, GRAVE, size)  # what is new holds anything
        address = ctypes.addressof(block)
        blocks[address] = block
        return address

    def _bury(self, blocks: dict[int, Any], address: int) -> tuple[Any, ...]:
        block = blocks.pop(address)
        ctypes.memset(block, GRAVE, len(block))
        self.graves.append(block)  # the addresses stay ours, so that late work harms nobody else
        return (Error.cudaSuccess,)


def _ignore(result: Any) -> None:
    """ctypes returns the address."""
