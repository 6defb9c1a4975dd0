"""Device profiles: what a GPU that is named takes, known before any work is done.

Types were measured by building for each compute capability with TensorRT-RTX 1.7; 8.7, 9.0 and 11.0 are as NVIDIA's
support matrix has them. A profile stands for the smallest common board; "rtx40:24" is one of 24 GB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vlm_models.errors import InputError, RecipeError
from vlm_models.spec import LanguageSpec
from vlm_quant.recipe import PARTS as RECIPE_PARTS
from vlm_quant.recipe import Precision

GIB = 1 << 30
_DISCRETE, _UNIFIED = 0.9, 0.75  # of its memory that a board leaves to a model; a Jetson's system lives there too


@dataclass(frozen=True)
class Device:
    """A profile: `capability` is NVIDIA's compute capability, `memory` in bytes.

    `unified` memory is shared with the CPU. `opset` is the newest of ONNX that the parser at hand there surely reads:
    Orins of JetPack 6 have TensorRT 10.3, which knows none of the operators of 23.
    """

    name: str
    capability: str
    memory: int
    boards: str
    unified: bool = False
    opset: Literal[21, 23] = 23

    @property
    def usable(self) -> float:
        """Bytes that a model may take."""
        return self.memory * (_UNIFIED if self.unified else _DISCRETE)


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("t4", "7.5", 16 * GIB, "T4"),
        Device("rtx20", "7.5", 6 * GIB, "GeForce RTX 20, Quadro RTX"),
        Device("a100", "8.0", 40 * GIB, "A100, A30"),
        Device("rtx30", "8.6", 8 * GIB, "GeForce RTX 30, RTX A2000 to A6000"),
        Device("a10", "8.6", 24 * GIB, "A10, A40"),
        Device("orin", "8.7", 8 * GIB, "Jetson Orin Nano, NX, AGX", unified=True, opset=21),
        Device("rtx40", "8.9", 8 * GIB, "GeForce RTX 40, RTX Ada"),
        Device("l4", "8.9", 24 * GIB, "L4, L40"),
        Device("h100", "9.0", 80 * GIB, "H100, H200, GH200"),
        Device("thor", "11.0", 64 * GIB, "Jetson Thor T4000, T5000", unified=True, opset=21),
        Device("rtx50", "12.0", 8 * GIB, "GeForce RTX 50, RTX PRO Blackwell"),
        Device("spark", "12.1", 128 * GIB, "DGX Spark", unified=True),
    )
}
DEFAULTS = ("rtx30", "rtx40", "rtx50")

_LACKS: Mapping[str, tuple[str, ...]] = {
    "7.5": ("fp32", "bf16", "int4", "fp8"),
    "8.0": ("fp8",),
    "8.6": ("fp8",),
    "8.7": ("fp8",),
}
_REASONS = {
    "fp32": "TensorRT-RTX has no fp32 matrix products for Turing: take fp16",
    "bf16": "bfloat16 came with Ampere (8.0): take fp16",
    "int4": "4-bit weights need Ampere (8.0) or newer: take int8 or fp16",
    "fp8": "8-bit floats came with Ada (8.9): take int8 or w8a8",
}


def find_device(text: str) -> Device:
    """The profile of that name, "rtx40:24" with 24 GB. Raises InputError listing the profiles."""
    name, colon, memory = text.strip().lower().partition(":")
    if name not in DEVICES:
        raise InputError(f"unknown device profile {text!r}: choose one of {', '.join(DEVICES)}")
    if not colon:
        return DEVICES[name]
    digits = memory.removesuffix("gb")
    if not digits.isdecimal() or not 1 <= int(digits) <= 1024:
        raise InputError(f"device profile {text!r} has no such memory: write whole GB, as in '{name}:24'")
    return replace(DEVICES[name], memory=int(digits) * GIB)


def opset_of(names: Sequence[str]) -> Literal[21, 23]:
    """The ONNX opset that graphs for all these profiles may use; 23 where none is named."""
    return 21 if any(find_device(name).opset == 21 for name in names) else 23


def device_of(capability: str, memory: int, board: str) -> Device:
    """The profile of a GPU at hand; one of its own, named after its capability ("sm103"), where none has that."""
    for device in DEVICES.values():
        if device.capability == capability:
            return replace(device, memory=memory)
    return Device(f"sm{capability.replace('.', '')}", capability, memory, board)


def why_not(device: Device, precision: Precision) -> str | None:
    """Why a device cannot take a precision, or one that a rule gives to some of its layers; None when it can."""
    for one in (precision, *(rule for _, rule in precision.rules)):
        if (kind := one.format or one.weights) in _LACKS.get(device.capability, ()):
            return _REASONS[kind]
    return None


def refuse(device: Device, precisions: Mapping[str, Precision]) -> None:
    """Raise RecipeError where a part ("language_model", …) has a precision that the device cannot take."""
    for part, precision in precisions.items():
        if (reason := why_not(device, precision)) is not None:
            raise RecipeError(
                f"device profile {device.name!r} (compute capability {device.capability}) cannot take "
                f"{RECIPE_PARTS[part]}={precision}: {reason}"
            )


def kv_bytes(language: LanguageSpec, precision: Precision, kv: str) -> int:
    """Bytes that one position takes in the KV cache; "concat" keeps the cache before and after a step."""
    item = 4 if precision.weights == "fp32" else 2
    return 2 * language.layers * language.kv_heads * language.head_dim * item * (2 if kv == "concat" else 1)


def refuse_memory(device: Device, weights: Mapping[str, float], per_position: int, context: int) -> None:
    """Raise InputError with the sum where weights (part → bytes) and KV cache do not fit the device."""
    cache = per_position * context
    total = sum(weights.values()) + cache
    if total <= device.usable:
        return
    room = int((device.usable - sum(weights.values())) // per_position)
    less = f"lower --max-context to {room}, " if room > 0 else "take fewer bits (--precision), "
    terms = [f"{part} {gib(size)}" for part, size in weights.items()]
    raise InputError(
        f"{' + '.join([*terms, f'KV cache of {context} positions {gib(cache)}'])} = {gib(total)} GiB do not fit device "
        f"profile {device.name!r}: {device.memory // GIB} GB leave {gib(device.usable)} GiB; {less}"
        f"or name a larger board, as in '{device.name}:{-(-int(total / device.usable * device.memory) // GIB)}'"
    )


def gib(size: float) -> str:
    """Bytes as GiB, two decimals."""
    return f"{size / GIB:.2f}"
