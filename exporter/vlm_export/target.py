"""Targets, found by file name: `--target onnx` is targets/onnx.py, imported only when asked for."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from vlm_export import targets
from vlm_models.errors import DependencyError, InputError

if TYPE_CHECKING:
    from vlm_models.model import Model
    from vlm_models.spec import VLMSpec
    from vlm_quant.recipe import Recipe
    from vlm_runtime.manifest import Part

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, of) while work goes on: often, so it must be cheap."""


class Target(Protocol):
    """What a file of targets/ holds. `ENGINE` is the runtime engine that reads what it writes."""

    ENGINE: str

    def requires(self, recipe: Recipe, spec: VLMSpec) -> None:
        """Raise RecipeError for a precision it cannot take, DependencyError for an SDK that is not installed."""

    def build(
        self, model: Model, recipe: Recipe, root: Path, *, max_context: int, progress: Progress
    ) -> Mapping[str, Part]:
        """Write the parts into root/<target>/ and say what was written, with paths relative to root."""


def target_names() -> list[str]:
    """Every target there is, by the names of the files in targets/."""
    return sorted(m.name for m in pkgutil.iter_modules(targets.__path__) if not m.name.startswith("_"))


def find_target(name: str) -> Target:
    """The target of that name. Raises InputError naming all targets, DependencyError where its SDK is not installed."""
    names = target_names()
    if name not in names:
        raise InputError(f"unknown target {name!r}: choose one of {', '.join(names)}")
    try:
        return cast(Target, importlib.import_module(f"{targets.__name__}.{name}"))
    except ModuleNotFoundError as error:
        raise not_installed(error, f"target {name!r}", name) from error


def not_installed(error: ModuleNotFoundError, what: str, extra: str) -> DependencyError:
    """The error that names what to install; one of our own modules that is missing is a bug and raised as it is."""
    package = str(error.name).split(".")[0]
    if package.startswith("vlm_"):
        raise error
    return DependencyError(f"{what} needs {package}: pip install 'vlm-export[{extra}]'")


def silent(stage: str, done: int, of: int) -> None:
    """Progress that nobody watches."""
