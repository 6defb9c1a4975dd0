"""Which engines to build, with which SDK, on which devices; everything that can be refused is refused here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_export.tensorrt.devices import (
    DEFAULTS,
    DEVICES,
    Device,
    device_of,
    find_device,
    kv_bytes,
    opset_of,
    refuse,
    refuse_memory,
    why_not,
)
from vlm_export.tensorrt.machine import check_memory, disk_needed
from vlm_export.tensorrt.sdk import Sdk, find_sdks, gpu_at_hand
from vlm_models.errors import DependencyError, InputError, RecipeError
from vlm_models.spec import LanguageSpec
from vlm_quant.recipe import PARTS as RECIPE_PARTS
from vlm_quant.recipe import Precision, parse_recipe

if TYPE_CHECKING:
    from vlm_models.model import Model
    from vlm_quant.recipe import Recipe

Precisions = Mapping[str, Precision]
_TURING = "7.5"


@dataclass(frozen=True)
class Step:
    """One engine of each part, by `sdk`, that runs on all of `devices`."""

    sdk: Sdk
    devices: tuple[Device, ...]

    @property
    def name(self) -> str:
        """The folder of its engines, "rtx30-rtx40"."""
        return "-".join(device.name for device in self.devices)

    @property
    def capabilities(self) -> list[str]:
        """Compute capabilities, each once."""
        return list(dict.fromkeys(device.capability for device in self.devices))


def precisions_of(parts: Mapping[str, str]) -> dict[str, Precision]:
    """Part → its precision, from the text that the manifest has of it."""
    return {
        part: getattr(parse_recipe(f"{RECIPE_PARTS[part]}={text}"), RECIPE_PARTS[part]) for part, text in parts.items()
    }


def devices_of(names: Sequence[str], precisions: Precisions) -> tuple[Device, ...]:
    """The devices that are named, by default the GPU at hand where an SDK builds for it, else RTX 30, 40 and 50.

    Raises InputError for an unknown name, RecipeError for a precision that a named device, or none, can take.
    """
    if names:
        named = {device.name: device for device in map(find_device, names)}
        for device in named.values():
            refuse(device, precisions)
        return tuple(named.values())
    if (own := _at_hand()) is not None:
        refuse(own, precisions)
        return (own,)
    usual = [DEVICES[name] for name in DEFAULTS]
    fitting = [device for device in usual if not any(why_not(device, one) for one in precisions.values())]
    if not fitting:
        text = ", ".join(f"{RECIPE_PARTS[part]}={precision}" for part, precision in precisions.items())
        raise RecipeError(f"no device profile takes {text}: choose other precisions")
    return tuple(fitting)


def steps(devices: Iterable[Device]) -> tuple[list[Step], list[Device]]:
    """What can be built here, and the devices that must build for themselves.

    TensorRT builds for the GPU at hand; TensorRT-RTX for all that it knows, in one engine of the size that one device
    needs; Turing has its own, which NVIDIA advises. Raises DependencyError where no SDK is installed.
    """
    sdks, gpu = find_sdks(), gpu_at_hand()
    full, rtx = sdks.get("tensorrt"), sdks.get("tensorrt_rtx")
    own: list[Step] = []
    shared: dict[bool, list[Device]] = {}
    later: list[Device] = []
    for device in devices:
        if full is not None and gpu is not None and gpu.capability == device.capability:
            own.append(Step(full, (device,)))
        elif rtx is not None and device.capability in rtx.capabilities:
            shared.setdefault(device.capability == _TURING, []).append(device)
        else:
            later.append(device)
    together = [Step(rtx, tuple(some)) for some in shared.values()] if rtx is not None else []
    return [*own, *together], later


def refuse_later(later: Sequence[Device]) -> None:
    """Raise DependencyError for devices whose engines only they can build."""
    if later:
        names = ", ".join(repr(device.name) for device in later)
        raise DependencyError(
            f"no SDK here builds for device profile {names}: copy the bundle to the device, which has its TensorRT "
            f"(Jetson: JetPack), and run vlm-export --build BUNDLE or the bundle's tensorrt/build.sh there"
        )


def check(names: Sequence[str], model: Model, recipe: Recipe, parts: Iterable[str], context: int, kv: str) -> float:
    """Before an export: bytes of the engines that will be built here.

    Raises for unknown devices, precisions they cannot take, memory that is not enough (theirs, or this machine's for
    building), no SDK. Devices that nobody named are not held against their memory: RTX 40 is anything from 8 to 24 GB.
    """
    from vlm_export.preflight import weight_bytes

    chosen = {part: getattr(recipe, RECIPE_PARTS[part]) for part in parts}
    devices = devices_of(names, chosen)
    if kv == "scatter" and opset_of(names) < 23:
        old = next(name for name in names if opset_of([name]) < 23)
        raise InputError(
            f"device profile {old!r} may have a TensorRT that does not know TensorScatter: take --tensorrt-kv concat"
        )
    sizes = {part: weight_bytes(model, part, recipe, bytes_per_weight) for part in chosen}
    if names:
        check_boards(devices, sizes, model.spec.language, recipe.language, context, kv)
    here = steps(devices)[0]
    if here:
        largest = max(sizes, key=sizes.__getitem__)
        check_memory(largest, sizes[largest])
    return len(here) * sum(disk_needed(size) for size in sizes.values())


def check_boards(
    devices: Iterable[Device],
    weights: Mapping[str, float],
    language: LanguageSpec,
    precision: Precision,
    context: int,
    kv: str,
) -> None:
    """Raise InputError with the sum where weights (part → bytes) and KV cache do not fit one of the devices."""
    for device in devices:
        refuse_memory(device, weights, kv_bytes(language, precision, kv), context)


def bytes_per_weight(precision: Precision) -> float:
    """On the disk and on the device, scales included."""
    if precision.weights == "int4":
        return 0.5 + 2 / precision.group_size
    return {"fp32": 4.0, "fp16": 2.0}.get(precision.weights, 1.01)


def covered(step: Step, engines: Iterable[Mapping[str, Any]]) -> bool:
    """Whether engines of a part (`details["engines"]`) run on all devices of a step, made by the same SDK."""
    same = [one for one in engines if (one.get("sdk"), one.get("version")) == (step.sdk.name, step.sdk.version)]
    known = {capability for one in same for capability in one.get("compute_capabilities", ())}
    return known.issuperset(step.capabilities)


def _at_hand() -> Device | None:
    gpu = gpu_at_hand()
    if gpu is None:
        return None
    sdks = find_sdks()
    known = "tensorrt" in sdks or gpu.capability in sdks["tensorrt_rtx"].capabilities
    return device_of(gpu.capability, gpu.memory, gpu.name) if known else None
