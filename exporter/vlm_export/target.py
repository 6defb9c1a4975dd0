"""Targets, found by file name: `--target onnx` is targets/onnx.py, imported only when asked for."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from vlm_export import targets
from vlm_models.errors import CheckpointError, DependencyError, InputError

if TYPE_CHECKING:
    from vlm_export.reference import Reference
    from vlm_models.model import Model
    from vlm_models.spec import VLMSpec
    from vlm_quant.calibration import Calibration
    from vlm_quant.recipe import Recipe
    from vlm_runtime.manifest import Part

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, of) while work goes on: often, so it must be cheap."""


@dataclass(frozen=True)
class Job:
    """What a target has to build: `parts` of `model` ("language_model", …) at the precisions of `recipe`.

    Files go into `root`/<target>/; the KV cache takes `max_context` positions. `calibration` holds image-text pairs, or
    is None. `gguf_tokenizer` is "checked", or "none", which leaves the vocabulary out of a GGUF. `coreml_kv`: the KV
    cache as a state or as input and output; `coreml_layout`: plain, or channels first as the Neural Engine likes them.
    `tensorrt_kv`: a cache that grows by concatenation, or one of fixed size that is written in place; engines are built
    for `device_profiles` ("rtx40"), by default for the GPU at hand. `web`: ONNX graphs that are fast in a browser.
    """

    model: Model
    recipe: Recipe
    root: Path
    max_context: int
    parts: Collection[str]
    calibration: Calibration | None = None
    gguf_tokenizer: Literal["checked", "none"] = "checked"
    coreml_kv: Literal["state", "io"] = "state"
    coreml_layout: Literal["plain", "ane"] = "plain"
    tensorrt_kv: Literal["concat", "scatter"] = "concat"
    web: bool = False
    device_profiles: Sequence[str] = ()
    progress: Progress = lambda stage, done, of: None


class Target(Protocol):
    """What a file of targets/ holds.

    `ENGINES` says which runtime engine runs each part when parity is measured, `RUN_BY` which engines can run what this
    target builds. A part whose engine is none of these is built by the target of that name: a GGUF language model
    stands beside ONNX vision parts. `GRIDS` says how int4 weights are packed, and so on which grids they are decided:
    with zero points, around zero, or as types of the target's own, which its own quantizer decides.
    """

    ENGINES: Mapping[str, str]
    RUN_BY: tuple[str, ...]
    GRIDS: Literal["zero points", "symmetric", "own"]

    def requires(self, recipe: Recipe, spec: VLMSpec, parts: Collection[str], max_context: int) -> None:
        """Raise RecipeError for a precision that `parts` cannot take, CheckpointError for a model that cannot be
        expressed, DependencyError for an SDK that is not installed.
        """

    def bytes_needed(self, model: Model, recipe: Recipe, parts: Collection[str]) -> float:
        """Bytes on the disk while `parts` are built."""

    def build(self, job: Job) -> Mapping[str, Part]:
        """Write the parts and say what was written, with paths relative to `job.root`."""

    def checks(self, job: Job, written: Mapping[str, Part], reference: Reference) -> Mapping[str, Any]:
        """What was measured beyond parity, for `parity.<target>` in the manifest: name → record with a `note`."""


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


def check_causal(spec: VLMSpec, target: str) -> None:
    """Raise CheckpointError for a language model whose rows see those after them, which `target` cannot express."""
    which = {"pictures": "the rows of a picture", "prompt": "the rows of a prompt"}.get(spec.language.both_ways)
    if which is not None:
        raise CheckpointError(
            f"target {target!r} has causal attention only, and in this model {which} see one another both ways: "
            "choose onnx or gguf for the language model"
        )


def not_installed(error: ModuleNotFoundError, what: str, extra: str) -> DependencyError:
    """The error that names what to install; one of our own modules that is missing is a bug and raised as it is."""
    package = str(error.name).split(".")[0]
    if package.startswith("vlm_"):
        raise error
    return DependencyError(f"{what} needs {package}: pip install 'vlm-export[{extra}]'")


def silent(stage: str, done: int, of: int) -> None:
    """Progress that nobody watches."""
