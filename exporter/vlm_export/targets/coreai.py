"""Core AI: `.aimodel` assets for iOS and macOS 27, run here by Apple's own CPU runtime; beta."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.preflight import weights
from vlm_export.target import Job, check_causal
from vlm_models.errors import CheckpointError, DependencyError, RecipeError
from vlm_models.model import Model
from vlm_models.spec import VLMSpec
from vlm_quant.recipe import PARTS as RECIPE_PARTS
from vlm_quant.recipe import Recipe, refuse_rules
from vlm_runtime.manifest import PARTS, Part

if TYPE_CHECKING:
    from vlm_export.reference import Reference

ENGINE = "coreai"
ENGINES = dict.fromkeys(PARTS, ENGINE)
RUN_BY = (ENGINE,)
GRIDS = "symmetric"
BYTES = {"fp32": 4.0, "fp16": 2.0}
PACKAGES = {"coreai": "coreai-core", "coreai_torch": "coreai-torch"}
PROOF = (
    "checked by Apple's own Core AI runtime on this machine's CPU; placement on GPU and Neural Engine, numerics and "
    "speed on a device: not measured; at fp16 this CPU also sums in float16, less exactly than devices may; "
    "Core AI is a beta"
)


def requires(recipe: Recipe, spec: VLMSpec, parts: Collection[str], max_context: int) -> None:
    """Float weights only; a language model of one of the forms that were run.

    Raises RecipeError for integers and types of other targets, CheckpointError for a model that has no Core AI form,
    DependencyError where coreai-core or coreai-torch is missing.
    """
    refuse_rules(recipe, parts, "coreai")
    for part in parts:
        precision = getattr(recipe, RECIPE_PARTS[part])
        if str(precision) not in BYTES:
            raise RecipeError(
                f"target 'coreai' has no precision {str(precision)!r} for the {part}: choose of {', '.join(BYTES)}"
            )
    if "language_model" in parts:
        check_causal(spec, "coreai")
        _expressible(spec, max_context)
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise DependencyError(f"target 'coreai' needs {package}: pip install 'vlm-export[coreai]'")


def bytes_needed(model: Model, recipe: Recipe, parts: Collection[str]) -> float:
    """The weights at their precisions; the programs themselves are small."""
    return sum(weights(model, part) * BYTES[str(getattr(recipe, RECIPE_PARTS[part]))] for part in parts)


def build(job: Job) -> dict[str, Part]:
    """Write root/coreai/{language_model,projector,vision_encoder}.aimodel, one after the other to bound memory."""
    from vlm_export.coreai.convert import convert_encoder, convert_language

    folder = job.root / ENGINE
    folder.mkdir(parents=True, exist_ok=True)
    model, parts = job.model, {}
    if "language_model" in job.parts:
        path, precision = folder / "language_model.aimodel", job.recipe.language
        details = convert_language(model, precision, path, max_context=job.max_context, progress=job.progress)
        parts["language_model"] = _part(job.root, path, str(precision), details)
    for part in ("projector", "vision_encoder"):
        if part in job.parts:
            path, precision = folder / f"{part}.aimodel", getattr(job.recipe, RECIPE_PARTS[part])
            details = convert_encoder(model, part, precision, path, progress=job.progress)
            parts[part] = _part(job.root, path, str(precision), details)
    return parts


def checks(job: Job, written: Mapping[str, Part], reference: Reference) -> dict[str, Any]:
    """What parity proves here, and what it does not."""
    return {"device": {"measured": False, "note": PROOF}}


def _expressible(spec: VLMSpec, max_context: int) -> None:
    from vlm_models.torch_language import ACTIVATIONS

    if spec.language.activation not in ACTIVATIONS:
        raise CheckpointError(
            f"activation {spec.language.activation!r} has no Core AI form: supported are {', '.join(ACTIVATIONS)}"
        )
    if max_context < 3:
        raise CheckpointError(f"target 'coreai' needs a context of 3 positions or more, got {max_context}")


def _part(root: Path, path: Path, precision: str, details: Mapping[str, Any]) -> Part:
    files = tuple(sorted(file.relative_to(root).as_posix() for file in path.rglob("*") if file.is_file()))
    made_by = {package: importlib.metadata.version(package) for package in PACKAGES.values()}
    size = sum((root / file).stat().st_size for file in files)
    graph = (path / "metadata.json").relative_to(root).as_posix()
    return Part(graph, files, precision, {**details, "made_by": made_by, "data_bytes": size})
