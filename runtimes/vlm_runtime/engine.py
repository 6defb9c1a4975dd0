"""What an engine is: it runs parts of a bundle. `engines/<name>.py` is one engine, found by its file name."""

from __future__ import annotations

import importlib
import os
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from vlm_models.errors import DependencyError, InputError
from vlm_runtime import engines

if TYPE_CHECKING:
    from vlm_runtime.bundle import Bundle

Floats = NDArray[np.float32]
KVCache = Literal["f32", "f16", "q8_0"]
KV_CACHES: tuple[KVCache, ...] = ("f32", "f16", "q8_0")


@dataclass(frozen=True)
class Options:
    """How engines run: `threads` (None: one per physical core), rows per prefill step, context wanted, device.

    `kv_cache` is the type of keys and values, `flash_attention` fuses attention; None leaves it to the engine.
    """

    threads: int | None = None
    prefill_chunk: int = 512
    max_context: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    kv_cache: KVCache | None = None
    flash_attention: bool | None = None

    def __post_init__(self) -> None:
        for name in ("threads", "prefill_chunk", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: it must be 1 or more")
        if self.device not in ("cpu", "cuda"):
            raise InputError(f"unknown device {self.device!r}: choose one of cpu, cuda")
        if self.kv_cache is not None and self.kv_cache not in KV_CACHES:
            raise InputError(f"unknown KV cache type {self.kv_cache!r}: choose one of {', '.join(KV_CACHES)}")


class Encoder(Protocol):
    """The vision encoder or the projector."""

    def run(self, x: Floats) -> Floats:
        """(N, …) → (N, rows, channels), float32; the result is the caller's."""


class Decoder(Protocol):
    """The language model with its KV cache, for one sequence.

    `position` rows are in the cache, at most `max_context` fit. Logits are (V,), a view that the next call overwrites.
    """

    max_context: int
    position: int

    def prefill(self, embeds: Floats) -> Floats:
        """Append rows (S, H), S ≥ 1; the logits after the last one. Raises PromptError when they do not fit."""

    def decode(self, embed: Floats) -> Floats:
        """Append one row (H,); its logits. Raises PromptError when the cache is full."""

    def rewind(self, position: int) -> None:
        """Forget all rows from `position` on."""


class Shared(Protocol):
    """A Decoder whose weights can have several KV caches, each for a sequence of its own."""

    def another(self) -> Decoder:
        """An empty one over the same weights. Raises InputError where there is no memory for it."""


class Engine(Protocol):
    """What a module `engines/<name>.py` offers."""

    NAME: str

    def available(self) -> None:
        """Raises DependencyError, naming what to install, where this engine cannot run."""

    def encoder(self, bundle: Bundle, part: str, options: Options) -> Encoder:
        """Open "vision_encoder" or "projector". Raises BundleError when its files are not what they should be."""

    def decoder(self, bundle: Bundle, options: Options) -> Decoder:
        """Open the language model. Raises BundleError when its files are not what they should be."""


def engine_names() -> list[str]:
    """All engines there are, whether or not what they need is installed."""
    return sorted(module.name for module in pkgutil.iter_modules(engines.__path__) if not module.name.startswith("_"))


def find_engine(name: str) -> Engine:
    """The engine module of that name. Raises InputError, listing the names, when there is none."""
    if name not in engine_names():
        raise InputError(f"unknown engine {name!r}: choose one of {', '.join(engine_names())}")
    return cast(Engine, importlib.import_module(f"{engines.__name__}.{name}"))


def thread_count(options: Options) -> int:
    """`options.threads`, or the physical cores that this process may use."""
    return options.threads if options.threads is not None else len(physical_cpus()) or os.cpu_count() or 1


def physical_cpus() -> list[int]:
    """One CPU number for each physical core that this process may use; empty where the system does not say."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = {_siblings(cpu): cpu for cpu in sorted(os.sched_getaffinity(0), reverse=True)}
    return sorted(cores.values())


def _siblings(cpu: int) -> str:
    """The hardware threads that share the core of `cpu`; itself where the system does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


_LATE = {"coreai": 1, "mil": 2, "tensorrt_onnx": 2}  # they check rather than serve where another engine is at hand
PART_WORDS = {"vision": "vision_encoder", "projector": "projector", "language": "language_model"}


def choose_engines(bundle: Bundle, wanted: str | None) -> dict[str, str]:
    """Part → engine name, for each part. `wanted` is None, one name, or `vision=onnx,language=gguf`.

    A single name is taken for all parts that have it; a part that is not named gets the first engine that the bundle
    holds and this machine can run. Raises InputError, BundleError or DependencyError saying what there is.
    """
    asked = _asked(bundle, wanted.strip()) if wanted is not None else {}
    for part, name in asked.items():
        bundle.part(part, name)
        find_engine(name).available()
    return {part: asked.get(part) or _first_available(bundle, part) for part in PART_WORDS.values()}


def _asked(bundle: Bundle, wanted: str) -> dict[str, str]:
    parts = list(PART_WORDS.values())
    if "=" not in wanted:
        find_engine(wanted)
        found = {part: wanted for part in parts if wanted in bundle.engines(part)}
        if not found:
            held = "; ".join(f"{part}: {', '.join(bundle.engines(part))}" for part in parts)
            raise InputError(f"the bundle has nothing for engine {wanted!r}; it has {held}")
        return found
    asked = {}
    for item in wanted.split(","):
        word, _, name = (piece.strip() for piece in item.partition("="))
        part = PART_WORDS.get(word, word)
        if part not in parts or not name or part in asked:
            raise InputError(
                f"engine {wanted!r}: write it as vision=NAME,projector=NAME,language=NAME, each at most once"
            )
        find_engine(name)
        asked[part] = name
    return asked


def _first_available(bundle: Bundle, part: str) -> str:
    reasons = []
    for name in sorted(bundle.engines(part), key=lambda name: (_LATE.get(name, 0), name)):
        if name not in engine_names():
            reasons.append(f"engine {name!r} is not known to this version")
            continue
        try:
            find_engine(name).available()
        except DependencyError as error:
            reasons.append(str(error))
        else:
            return name
    raise DependencyError(f"nothing here can run the {part}: {'; '.join(reasons)}")
