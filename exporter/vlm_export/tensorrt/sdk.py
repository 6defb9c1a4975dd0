"""TensorRT or TensorRT-RTX, whichever is installed, and the GPU at hand; looked at without loading either here."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass

from vlm_models.errors import DependencyError

LABELS: Mapping[str, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
INSTALL = "pip install 'vlm-export[tensorrt]'"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}


@dataclass(frozen=True)
class Sdk:
    """An SDK that loads: module name and version. `capabilities` is what it builds for without such a GPU at hand."""

    name: str
    version: str
    capabilities: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{LABELS[self.name]} {self.version}"


@dataclass(frozen=True)
class Gpu:
    """The first NVIDIA GPU of this machine; memory in bytes."""

    name: str
    capability: str
    memory: int


def find_sdks() -> dict[str, Sdk]:
    """The SDKs that can build here. Raises DependencyError where none can, with the reasons."""
    found, reasons = {}, []
    for name in LABELS:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without origin it is just a folder of that name
            continue
        if name == "tensorrt" and gpu_at_hand() is None:
            reasons.append("TensorRT builds only where an NVIDIA GPU is at hand")
            continue
        try:
            found[name] = _probed(name)
        except DependencyError as error:
            reasons.append(str(error))
    if not found:
        why = "; ".join(reasons) or "neither tensorrt nor tensorrt_rtx is installed"
        raise DependencyError(f"building engines needs TensorRT ({why}): {INSTALL}, which builds without a GPU")
    return found


@functools.lru_cache
def _probed(name: str) -> Sdk:
    """Loaded once in a process of its own: what it says of itself."""
    from vlm_export.tensorrt.process import ask

    told = ask({"probe": name})
    return Sdk(name, str(told["version"]), tuple(told["capabilities"]))


@functools.lru_cache
def gpu_at_hand() -> Gpu | None:
    """What the NVIDIA driver says of the first GPU; None without a driver or a GPU."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    memory, name = ctypes.c_size_t(), ctypes.create_string_buffer(128)
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        or cuda.cuDeviceGetName(name, len(name), device)
    )
    if failed:
        return None
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}", memory.value)
