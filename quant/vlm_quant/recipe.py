"""Recipe: the precision of each part, read from and written as one short text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

from vlm_models.errors import RecipeError
from vlm_quant.coreml_types import COREML_TYPES
from vlm_quant.gguf_types import GGUF_TYPES

Weights = Literal["fp32", "fp16", "int8", "int4", "int3", "int2"]
"""How coarse weights are, finest first. Parity's limits follow it; int3 and int2 come only as a target's own type."""

WORDS = ("fp32", "fp16", "int8", "int4")
GROUP_SIZES = (16, 32, 64, 128, 256)
PARTS = {
    "vision": "vision",
    "vision_encoder": "vision",
    "projector": "projector",
    "language": "language",
    "language_model": "language",
}


@dataclass(frozen=True)
class Precision:
    """How the weights of one part are stored. `group_size` counts the weights that share one int4 scale.

    `format` is a type of one target alone, as GGUF's "q4_k_m"; empty where the target chooses for the word.
    """

    weights: Weights
    group_size: int = 32
    format: str = ""

    def __str__(self) -> str:
        return self.format or (f"int4:g{self.group_size}" if self.weights == "int4" else self.weights)


@dataclass(frozen=True)
class Recipe:
    """The precision of each of the three parts; `str` gives the text that `parse_recipe` reads."""

    vision: Precision
    projector: Precision
    language: Precision

    def __str__(self) -> str:
        return f"vision={self.vision},projector={self.projector},language={self.language}"


PRESETS = {
    "fp32": Recipe(Precision("fp32"), Precision("fp32"), Precision("fp32")),
    "fp16": Recipe(Precision("fp16"), Precision("fp16"), Precision("fp16")),
    "int8": Recipe(Precision("int8"), Precision("fp16"), Precision("int8")),
    "int4": Recipe(Precision("int8"), Precision("fp16"), Precision("int4")),
}


def parse_recipe(text: str) -> Recipe:
    """A Recipe from a preset ("int4") or a list ("language=int4:g128,vision=int8", "language=q4_k_m").

    A type alone ("q4_k_m") is the language model's; parts left out take fp16.
    Raises RecipeError naming what was given and what is allowed.
    """
    if text.strip() in PRESETS:
        return PRESETS[text.strip()]
    if text.strip().lower() in GGUF_TYPES:
        text = f"language={text.strip()}"
    parts: dict[str, Precision] = {}
    for item in text.split(","):
        name, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals:
            raise RecipeError(
                f"unknown precision {text!r}: choose one of {', '.join(PRESETS)}, "
                "or name parts as in 'language=int4:g32,vision=int8' or 'language=q4_k_m'"
            )
        if name not in PARTS:
            raise RecipeError(f"unknown part {name!r} in precision {text!r}: choose of vision, projector, language")
        if PARTS[name] in parts:
            raise RecipeError(f"part {name!r} stands twice in precision {text!r}")
        parts[PARTS[name]] = _precision(value, text)
    rest = Precision("fp16")
    return Recipe(parts.get("vision", rest), parts.get("projector", rest), parts.get("language", rest))


def _precision(value: str, text: str) -> Precision:
    own = GGUF_TYPES.get(value.lower()) or COREML_TYPES.get(value.lower())
    if own is not None:
        return Precision(own.weights, format=own.name)
    weights, colon, group = value.partition(":")
    if weights not in WORDS:
        raise RecipeError(
            f"unknown precision {value!r} in {text!r}: choose of {', '.join(WORDS)}, int4:g64; "
            f"for target gguf also {', '.join(GGUF_TYPES)}; for coreml {', '.join(COREML_TYPES)}"
        )
    if not colon:
        return Precision(cast(Weights, weights))
    sizes = {f"g{size}": size for size in GROUP_SIZES}
    if weights != "int4" or group not in sizes:
        raise RecipeError(
            f"precision {value!r} in {text!r} has no such group: only int4 has groups, of {', '.join(sizes)}"
        )
    return Precision("int4", sizes[group])


def refuse_formats(recipe: Recipe, parts: Iterable[str], target: str) -> None:
    """Raise RecipeError where one of `parts` ("language_model", …) has a type that only another target knows."""
    for part in parts:
        precision: Precision = getattr(recipe, PARTS[part])
        if precision.format:
            raise RecipeError(
                f"target {target!r} has no precision {precision.format!r} for the {PARTS[part]} part: "
                f"choose of {', '.join(WORDS)}"
            )
