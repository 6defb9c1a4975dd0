"""Engine "coreml": Core ML itself, on macOS 15 or later. Not measured: no Mac has run it yet.

It takes the packages that engine "mil" takes, in the same way; only their functions run elsewhere: on whichever of CPU,
GPU and Neural Engine Core ML chooses. Where they run, and how numbers round there, is Core ML's.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vlm_models.errors import BundleError, DependencyError, InputError
from vlm_runtime.engine import Options
from vlm_runtime.engines.mil import MilDecoder, MilEncoder
from vlm_runtime.mil import Executor, Outcome, Package, open_package
from vlm_runtime.mil.values import Array

if TYPE_CHECKING:
    from vlm_runtime.bundle import Bundle

NAME = "coreml"
_MACOS = 15  # the first with states and several functions


def available() -> None:
    """Raises DependencyError anywhere but on macOS 15 or later with coremltools."""
    if platform.system() != "Darwin" or int(platform.mac_ver()[0].split(".")[0] or 0) < _MACOS:
        raise DependencyError(
            f"engine 'coreml' needs macOS {_MACOS} or later: use --engine mil here, which reads the same packages"
        )
    if importlib.util.find_spec("coremltools") is None:
        raise DependencyError("engine 'coreml' needs coremltools: pip install 'vlm-export[coreml]'")


def encoder(bundle: Bundle, part: str, options: Options) -> MilEncoder:
    """The vision encoder or the projector of a bundle."""
    package = _package(bundle, part, options)
    opened = MilEncoder(package)
    opened.executor = cast(Executor, CoreMLFunctions(package))
    return opened


def decoder(bundle: Bundle, options: Options) -> MilDecoder:
    """The language model of a bundle, with room for min(asked, bundle's) positions."""
    package, limit = _package(bundle, "language_model", options), bundle.manifest.max_context
    opened = MilDecoder(package, min(options.max_context or limit, limit))
    opened.executor = cast(Executor, CoreMLFunctions(package))
    return opened


class CoreMLFunctions:
    """The functions of one package, run by Core ML: what `Executor.run` is to engine "mil".

    Each function is a model of its own that is compiled and loaded when it is first called; all share one MLState.
    """

    def __init__(self, package: Package) -> None:
        self._package = package
        self._models: dict[str, Any] = {}
        self._state: Any = None

    def run(self, feeds: Mapping[str, Array], state: Any = None, *, function: str | None = None) -> Outcome:
        """Outputs by name, float32. `state` says only whether there is one: its values lie in Core ML.

        Raises BundleError where Core ML does not load the package or does not run it.
        """
        try:
            model = self._model(function or self._package.default)
            if state is not None and self._state is None:
                self._state = model.make_state()
            outputs = model.predict(dict(feeds), state=self._state)
        except Exception as error:  # coremltools raises nothing more specific
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise BundleError(
                f"{self._package.folder.name} cannot be run by Core ML ({reason}): try --engine mil"
            ) from None
        return Outcome({name: np.asarray(value, np.float32) for name, value in outputs.items()}, ())

    def _model(self, function: str) -> Any:
        if function not in self._models:
            coremltools = importlib.import_module("coremltools")
            several = len(self._package.functions) > 1
            self._models[function] = coremltools.models.MLModel(
                str(self._package.folder),
                compute_units=coremltools.ComputeUnit.ALL,
                function_name=function if several else None,
            )
        return self._models[function]


def _package(bundle: Bundle, part: str, options: Options) -> Package:
    """One part's package, checked to be of this bundle's model. Raises DependencyError, InputError or BundleError."""
    available()
    if options.device != "cpu" or options.kv_cache is not None or options.flash_attention is not None:
        raise InputError(
            "engine 'coreml' lets Core ML choose where it runs, with the package's own KV cache: "
            "leave out --device, --kv-cache and --flash-attention"
        )
    folder: Path = bundle.path(bundle.part(part, NAME).graph).parent
    package = open_package(folder)
    written = package.metadata
    if written.get("vlm.part") != part or written.get("vlm.fingerprint") != bundle.spec.fingerprint:
        raise BundleError(f"{folder.name} is a part of another model: it is not the {part} of {bundle.spec.name}")
    return package
