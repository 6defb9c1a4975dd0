"""TensorRT: three graphs of standard ONNX, strongly typed, and the engines that can be built of them here.

Engines only run on NVIDIA GPUs. What parity measures is the ONNX that the builder reads, run by ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

from vlm_export.activation_ranges import ActivationRanges, language_ranges, vision_ranges
from vlm_export.preflight import weights
from vlm_export.target import Job
from vlm_export.tensorrt.build import build_engines
from vlm_export.tensorrt.devices import opset_of
from vlm_export.tensorrt.language import language_model
from vlm_export.tensorrt.plan import bytes_per_weight
from vlm_export.tensorrt.trtexec import write_script
from vlm_export.tensorrt.vision import EncoderPart, vision_part
from vlm_models.errors import RecipeError
from vlm_models.model import Model
from vlm_models.spec import VLMSpec
from vlm_quant.recipe import PARTS as RECIPE_PARTS
from vlm_quant.recipe import WORDS, Precision, Recipe
from vlm_quant.tensorrt_types import TENSORRT_TYPES
from vlm_runtime.manifest import PARTS, Part

if TYPE_CHECKING:
    from vlm_export.reference import Reference

ENGINES = dict.fromkeys(PARTS, "tensorrt_onnx")
RUN_BY = ("tensorrt", "tensorrt_onnx")
GRIDS = "symmetric"
FOLDER = "tensorrt"
PROOF = (
    "parity is that of the ONNX graphs in ONNX Runtime; of the engines: that they were built, their layers, types and "
    "sizes; their numbers and speed on a GPU: not measured"
)


def requires(recipe: Recipe, spec: VLMSpec, parts: Collection[str], max_context: int) -> None:
    """Raise RecipeError for the types of other targets; what devices take is refused by `tensorrt.plan.check`."""
    for part in parts:
        for one in _all(recipe, part):
            if one.format and one.format not in TENSORRT_TYPES:
                raise RecipeError(
                    f"target 'tensorrt' has no precision {one.format!r} for the {RECIPE_PARTS[part]} part: "
                    f"choose of {', '.join((*WORDS, *TENSORRT_TYPES))}"
                )


def bytes_needed(model: Model, recipe: Recipe, parts: Collection[str]) -> float:
    """The graphs, and engines for up to two groups of devices while the next one is being written."""
    graphs = sum(weights(model, part) * bytes_per_weight(getattr(recipe, RECIPE_PARTS[part])) for part in parts)
    return 3.5 * graphs


def build(job: Job) -> dict[str, Part]:
    """Write root/tensorrt/{language_model,projector,vision_encoder}.onnx, build.sh, and engines for the devices.

    Raises RecipeError for rounded activations without calibration pairs.
    """
    folder, opset = job.root / FOLDER, opset_of(job.device_profiles)
    ranges = {part: _ranges(job, part) for part in job.parts}
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Part] = {}
    for part in sorted(job.parts):
        precision: Precision = getattr(job.recipe, RECIPE_PARTS[part])
        if part == "language_model":
            parts[part] = language_model(
                job.model.checkpoint,
                job.model.spec,
                precision,
                folder,
                max_context=job.max_context,
                kv=job.tensorrt_kv,
                ranges=ranges[part],
                opset=opset,
                progress=job.progress,
            )
        else:
            encoder = cast(EncoderPart, part)
            parts[part] = vision_part(
                job.model, encoder, precision, folder, ranges=ranges[part], opset=opset, progress=job.progress
            )
    write_script(job.root, job.model.spec, parts)
    return build_engines(job.root, parts, job.device_profiles, job.progress)


def checks(job: Job, written: Mapping[str, Part], reference: Reference) -> dict[str, Any]:
    """What parity does not prove; the facts of the engines are in the details of each part."""
    return {"device": {"measured": False, "note": PROOF}}


def _ranges(job: Job, part: str) -> ActivationRanges | None:
    """Ranges of the inputs of the part's layers, where one of its precisions rounds them."""
    rounding = [one for one in _all(job.recipe, part) if one.format and TENSORRT_TYPES[one.format].activations]
    if not rounding:
        return None
    if job.calibration is None:
        raise RecipeError(
            f"{RECIPE_PARTS[part]}={rounding[0]} rounds activations, whose ranges come from image-text pairs: "
            "give --calibration, or choose int8, which rounds weights alone"
        )
    measure = language_ranges if part == "language_model" else vision_ranges
    return measure(job.model, job.calibration, progress=job.progress)


def _all(recipe: Recipe, part: str) -> list[Precision]:
    """The precision of a part and those that rules give to its layers."""
    whole: Precision = getattr(recipe, RECIPE_PARTS[part])
    return [whole, *(precision for _, precision in whole.rules)]
