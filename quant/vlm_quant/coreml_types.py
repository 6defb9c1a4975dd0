"""The weight types that only Core ML has, by the names that a recipe gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_models.errors import RecipeError

if TYPE_CHECKING:
    from vlm_quant.recipe import Precision, Weights

PARTS = ("vision_encoder", "projector", "language_model")

PALETTIZED = (
    "palettized weights are a choice of the user's: packages palettized to 4 bits by coremltools 9.0 were reported to "
    "crash or to compute wrong numbers on the Neural Engine and the CPU of macOS 26 (coremltools issue 2716, pull "
    "request 2688), which no check off the device can see; try int8 or int4 first"
)


@dataclass(frozen=True)
class CoreMLType:
    """A type of weights: `weights` is how coarse it is, `bits` what one weight takes, `palette` those of an index.

    `activations` are rounded to int8 too, by ranges from calibration pairs. `parts` can be stored so. `warning` goes
    to whoever asks for it and into the manifest.
    """

    name: str
    weights: Weights
    bits: float
    palette: int = 0
    activations: bool = False
    parts: tuple[str, ...] = PARTS
    warning: str = ""


COREML_TYPES: Mapping[str, CoreMLType] = {
    type.name: type
    for type in (
        CoreMLType("w8a8", "int8", 8, activations=True, parts=("vision_encoder", "projector")),
        CoreMLType("pal6", "int4", 6, palette=6, warning=PALETTIZED),
        CoreMLType("pal4", "int4", 4, palette=4, warning=PALETTIZED),
    )
}


def coreml_type(precision: Precision, part: str) -> CoreMLType:
    """The Core ML type of `part` ("language_model", …): its own, or the one that stands for the common word.

    Raises RecipeError for types of other targets and for parts that cannot take a type.
    """
    if not precision.format:
        bits = {"fp32": 32.0, "fp16": 16.0, "int8": 8.0, "int4": 4 + 16 / precision.group_size}
        return CoreMLType(str(precision), precision.weights, bits[precision.weights])
    found = COREML_TYPES.get(precision.format)
    if found is None or part not in found.parts:
        allowed = [name for name, type in COREML_TYPES.items() if part in type.parts]
        raise RecipeError(
            f"target 'coreml' has no precision {precision.format!r} for the {part}: "
            f"choose of fp32, fp16, int8, int4, {', '.join(allowed)}"
        )
    return found


def check_coreml(precision: Precision, part: str) -> None:
    """Raise RecipeError for types that `part` cannot take, and for rules that one program cannot hold.

    Integers may stand beside integers and floats of the program's one type, not beside palettes or rounded activations.
    """
    coreml_type(precision, part)
    own_float = "fp32" if precision.weights == "fp32" else "fp16"
    words = (own_float, "int8", "int4")
    for pattern, rule in precision.rules:
        if precision.format or rule.format or rule.weights not in words:
            raise RecipeError(
                f"rule {pattern}={rule} cannot be in a Core ML {part} at {precision.format or precision.weights}: "
                f"rules take {', '.join(words)}, in parts of these"
            )
