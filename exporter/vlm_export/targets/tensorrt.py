"""TensorRT: three graphs of standard ONNX, strongly typed, and the engines that can be built of them here.

Engines only run on NVIDIA GPUs. What parity measures is the ONNX that the builder reads, run by ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

from vlm_export.activation_ranges import ActivationRanges, language_ranges, vision_ranges
from vlm_export.preflight import weight_bytes
from vlm_export.rules import check_rules, language_layers
from vlm_export.target import Job, check_causal
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
    """Raise RecipeError for types of other targets and for rules that fit none of the language model's layers.

    What devices take is refused by `tensorrt.plan.check`.
    """
    for part in parts:
        for one in _all(recipe, part):
            if one.format and one.format not in TENSORRT_TYPES:
                raise RecipeError(
                    f"target 'tensorrt' has no precision {one.format!r} for the {RECIPE_PARTS[part]} part: "
                    f"choose of {', '.join((*WORDS, *TENSORRT_TYPES))}"
                )
    if "language_model" in parts:
        check_causal(spec, "tensorrt")
        check_rules(recipe.language, language_layers(spec.language), "language_model")


def bytes_needed(model: Model, recipe: Recipe, parts: Collection[str]) -> float:
    """The graphs; `tensorrt.plan.check` knows how many engines come beside them."""
    return sum(weight_bytes(model, part, recipe, bytes_per_weight) for part in parts)


def build(job: Job) -> dict[str, Part]:
    """Write root/tensorrt/{language_model,projector,vision_encoder}.onnx, build.sh, and engines for the devices.

    Raises RecipeError for rounded activations without calibration pairs.
    """
    folder, opset = job.root / FOLDER, opset_of(job.device_profiles)
    ranges = _ranges(job)
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
                ranges=ranges.get(part),
                opset=opset,
                progress=job.progress,
            )
        else:
            encoder = cast(EncoderPart, part)
            parts[part] = vision_part(
                job.model, encoder, precision, folder, ranges=ranges.get(part), opset=opset, progress=job.progress
            )
    write_script(job.root, job.model.spec, parts)
    return build_engines(job.root, parts, job.device_profiles, job.progress)


def checks(job: Job, written: Mapping[str, Part], reference: Reference) -> dict[str, Any]:
    """What parity does not prove; the facts of the engines are in the details of each part."""
    return {"device": {"measured": False, "note": PROOF}}


def _ranges(job: Job) -> dict[str, ActivationRanges]:
    """Part → ranges of its layers' inputs, of those that round them; of the decided, maybe smoothed model."""
    rounding = {part: str(one) for part in sorted(job.parts) for one in _all(job.recipe, part) if _rounds_inputs(one)}
    for part, text in rounding.items():
        if job.calibration is None:
            raise RecipeError(
                f"{RECIPE_PARTS[part]}={text} rounds activations, whose ranges come from image-text pairs: "
                "give --calibration, or choose int8, which rounds weights alone"
            )
    if job.calibration is None or not rounding:
        return {}
    found: dict[str, ActivationRanges] = {}
    if "language_model" in rounding:
        found["language_model"] = language_ranges(job.model, job.calibration, progress=job.progress)
    if vision := rounding.keys() - {"language_model"}:  # one run of the pictures for both
        found |= dict.fromkeys(vision, vision_ranges(job.model, job.calibration, progress=job.progress))
    return found


def _rounds_inputs(precision: Precision) -> bool:
    return bool(precision.format) and TENSORRT_TYPES[precision.format].activations


def _all(recipe: Recipe, part: str) -> list[Precision]:
    """The precision of a part and those that rules give to its layers."""
    whole: Precision = getattr(recipe, RECIPE_PARTS[part])
    return [whole, *(precision for _, precision in whole.rules)]
