"""Core ML: three packages for iOS 18 and macOS 15, checked here by an executor of their MIL programs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vlm_export.coreml.convert import convert_language
from vlm_export.coreml.lint import notes
from vlm_export.coreml.vision import EncoderPart, convert_encoder
from vlm_export.preflight import weight_bytes, weights
from vlm_export.rules import check_rules, kept_note, language_layers
from vlm_export.target import Job, check_causal
from vlm_models.errors import DependencyError
from vlm_models.model import Model
from vlm_models.spec import VLMSpec
from vlm_quant.coreml_types import check_coreml, coreml_type
from vlm_quant.recipe import PARTS as RECIPE_PARTS
from vlm_quant.recipe import Precision, Recipe
from vlm_runtime.engines.mil import MilDecoder, MilEncoder
from vlm_runtime.manifest import PARTS, Part
from vlm_runtime.mil import open_package

if TYPE_CHECKING:
    from vlm_export.reference import Reference

ENGINES = dict.fromkeys(PARTS, "mil")
RUN_BY = ("mil", "coreml")
GRIDS = "symmetric"
FOLDER = "coreml"
PROOF = (
    "checked by executing the packages' programs on this machine; loading, placement on the Neural Engine, numerics "
    "and speed on a device: not measured"
)


def requires(recipe: Recipe, spec: VLMSpec, parts: Collection[str], max_context: int) -> None:
    """coremltools with a NumPy that it works with, and types that Core ML has."""
    for part in parts:
        check_coreml(getattr(recipe, RECIPE_PARTS[part]), part)
    if "language_model" in parts:
        check_causal(spec, "coreml")
        check_rules(recipe.language, language_layers(spec.language), "language_model")
    if importlib.util.find_spec("coremltools") is None:
        raise DependencyError("target 'coreml' needs coremltools: pip install 'vlm-export[coreml]'")
    numpy = importlib.metadata.version("numpy")
    if tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        raise DependencyError(
            f"coremltools 9 cannot convert with numpy {numpy} (coremltools issue 2633): pip install 'numpy>=2.3,<2.4'"
        )


def bytes_needed(model: Model, recipe: Recipe, parts: Collection[str]) -> float:
    """The packages; of the language model also its functions before they are merged, and one float copy."""

    def size(part: str) -> float:
        return weight_bytes(model, part, recipe, lambda layer: coreml_type(layer, part).bits / 8)

    sizes = {part: size(part) for part in parts}
    copies = 2 * sizes["language_model"] + 2.0 * weights(model, "language_model") if "language_model" in sizes else 0.0
    return sum(sizes.values()) + copies


def build(job: Job) -> dict[str, Part]:
    """Write root/coreml/{language_model,projector,vision_encoder}.mlpackage, and look for what devices refuse."""
    root, built = job.root / FOLDER, {}
    root.mkdir(parents=True, exist_ok=True)
    for part in sorted(job.parts):
        precision: Precision = getattr(job.recipe, RECIPE_PARTS[part])
        package = root / f"{part}.mlpackage"
        if part == "language_model":
            details = convert_language(
                job.model,
                precision,
                package,
                max_context=job.max_context,
                kv=job.coreml_kv,
                layout=job.coreml_layout,
                progress=job.progress,
            )
            if precision.weights == "fp32" and details["cache"] == "fp16":
                details["inexact"] = "Core ML's states are float16, also beside float32 weights"
        else:
            pairs = job.calibration if coreml_type(precision, part).activations else None
            encoder = cast(EncoderPart, part)
            details = convert_encoder(job.model, encoder, precision, package, calibration=pairs, progress=job.progress)
        built[part] = _part(job.root, package, precision, part, details)
    return built


def checks(job: Job, written: Mapping[str, Part], reference: Reference) -> dict[str, Any]:
    """Operations whose float16 results overflow on the golden picture and prompt, and what parity does not prove."""
    found: dict[str, Any] = {"device": {"measured": False, "note": PROOF}}
    lost: dict[str, Any] = {}
    for part, described in written.items():
        package = open_package((job.root / described.graph).parent)
        if part == "language_model":
            decoder = MilDecoder(package, job.max_context)
            decoder.prefill(reference.inputs_embeds)
            overflows = decoder.overflows
        else:
            encoder = MilEncoder(package)
            encoder.run(reference.pixel_values if part == "vision_encoder" else reference.image_features)
            overflows = encoder.overflows
        if overflows:
            lost[part] = [dataclasses.asdict(overflow) for overflow in overflows.values()]
    if lost:
        first = next(iter(lost.values()))[0]
        count = sum(map(len, lost.values()))
        note = f"{count} operations overflow float16, {first['name']!r} ({first['op']}) among them"
        found["overflows"] = {"parts": lost, "note": f"{note}: see manifest.json, or choose fp32 for the part"}
    return found


def _part(root: Path, package: Path, precision: Precision, part: str, details: dict[str, Any]) -> Part:
    warning = coreml_type(precision, part).warning
    found = [*([warning] if warning else []), *notes(package)]
    found += kept_note(part, precision, details.get("kept", {}))
    if less := details.get("inexact"):
        found.append(less)
    files = sorted(path.relative_to(root).as_posix() for path in package.rglob("*") if path.is_file())
    graph = (package / "Manifest.json").relative_to(root).as_posix()
    return Part(graph, tuple(files), str(precision), {**details, "notes": found})
