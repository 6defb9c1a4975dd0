"""Recipe: the precision of each part, and of single layers in it, read from and written as one short text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, cast

from vlm_models.errors import RecipeError
from vlm_quant.coreml_types import COREML_TYPES
from vlm_quant.gguf_types import GGUF_TYPES
from vlm_quant.tensorrt_types import TENSORRT_TYPES

Weights = Literal["fp32", "fp16", "int8", "int4", "int3", "int2"]
"""How coarse weights are, finest first. Parity's limits follow it; int3 and int2 come only as a target's own type."""

WORDS = ("fp32", "fp16", "int8", "int4")
_PATTERN = re.compile(r"[\w-]+(\.[\w-]+)*")
_SPAN = re.compile(r"(\d+)-(\d+)")
GROUP_SIZES = (16, 32, 64, 128, 256)
PARTS = {
    "vision": "vision",
    "vision_encoder": "vision",
    "projector": "projector",
    "language": "language",
    "language_model": "language",
    "embedding": "embedding",
}


@dataclass(frozen=True)
class Precision:
    """How the weights of one part are stored. `group_size` counts the weights that share one int4 scale.

    `format` is a type of one target alone, as GGUF's "q4_k_m"; empty where the target chooses for the word. `rules`
    give single layers another precision: (pattern, precision), of which the last that fits a layer holds.
    """

    weights: Weights
    group_size: int = 32
    format: str = ""
    rules: tuple[tuple[str, Precision], ...] = ()

    def __str__(self) -> str:
        whole = self.format or (f"int4:g{self.group_size}" if self.weights == "int4" else self.weights)
        return ";".join([whole, *(f"{pattern}={precision}" for pattern, precision in self.rules)])

    def rule(self, layer: str) -> Precision | None:
        """What the rules say of a linear layer ("layers.3.mlp.down_proj", "lm_head"), None where they say nothing.

        A pattern fits where its pieces stand one after the other in the layer's name; "0-3" is any of these numbers.
        """
        fitting = [precision for pattern, precision in self.rules if _fits(pattern, layer)]
        return fitting[-1] if fitting else None

    def at(self, layer: str) -> Precision:
        """The precision of one linear layer, without rules."""
        return self.rule(layer) or replace(self, rules=())


@dataclass(frozen=True)
class Recipe:
    """The precision of each of the three parts; `str` gives the text that `parse_recipe` reads.

    `embedding` is that of the table of input embeddings, None for rows as the checkpoint stores them.
    """

    vision: Precision
    projector: Precision
    language: Precision
    embedding: Precision | None = None

    def __str__(self) -> str:
        table = "" if self.embedding is None else f",embedding={self.embedding}"
        return f"vision={self.vision},projector={self.projector},language={self.language}{table}"


PRESETS = {
    "fp32": Recipe(Precision("fp32"), Precision("fp32"), Precision("fp32")),
    "fp16": Recipe(Precision("fp16"), Precision("fp16"), Precision("fp16")),
    "int8": Recipe(Precision("int8"), Precision("fp16"), Precision("int8")),
    "int4": Recipe(Precision("int8"), Precision("fp16"), Precision("int4")),
}


def parse_recipe(text: str) -> Recipe:
    """A Recipe from a preset ("int4") or a list ("language=int4:g128,vision=int8", "language=q4_k_m").

    A type alone ("q4_k_m") is the language model's; parts left out take fp16. Layers of a part follow it after ";":
    "language=int4;lm_head=fp16;layers.0-1=int8;down_proj=int8", where the last that fits holds. "embedding=int8" rounds
    the table of input embeddings, which stays as it is otherwise.
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
            raise RecipeError(
                f"unknown part {name!r} in precision {text!r}: choose of vision, projector, language, embedding"
            )
        if PARTS[name] in parts:
            raise RecipeError(f"part {name!r} stands twice in precision {text!r}")
        parts[PARTS[name]] = _with_rules(value, text)
    rest, table = Precision("fp16"), parts.get("embedding")
    if table not in (None, Precision("int8")):
        raise RecipeError(
            f"embedding={table} in precision {text!r} cannot be: give embedding=int8, or leave it out to keep the rows "
            "as the checkpoint stores them"
        )
    return Recipe(parts.get("vision", rest), parts.get("projector", rest), parts.get("language", rest), table)


def _with_rules(value: str, text: str) -> Precision:
    """The precision of a part with those of its layers."""
    whole, *rest = (piece.strip() for piece in value.split(";"))
    rules = []
    for item in rest:
        pattern, equals, precision = (piece.strip() for piece in item.partition("="))
        if not equals or not _PATTERN.fullmatch(pattern):
            raise RecipeError(
                f"rule {item!r} in precision {text!r} names no layers: write them as in "
                "'language=int4;lm_head=fp16;layers.0-3=int8;down_proj=int8'"
            )
        rules.append((pattern, _precision(precision, text)))
    return replace(_precision(whole, text), rules=tuple(rules))


def _fits(pattern: str, layer: str) -> bool:
    asked, pieces = pattern.split("."), layer.split(".")
    starts = range(len(pieces) - len(asked) + 1)
    return any(all(map(_same, asked, pieces[start : start + len(asked)])) for start in starts)


def _same(asked: str, piece: str) -> bool:
    if (span := _SPAN.fullmatch(asked)) is None or not piece.isdecimal():
        return asked == piece
    return int(span[1]) <= int(piece) <= int(span[2])


def _precision(value: str, text: str) -> Precision:
    own = GGUF_TYPES.get(value.lower()) or COREML_TYPES.get(value.lower()) or TENSORRT_TYPES.get(value.lower())
    if own is not None:
        return Precision(own.weights, format=own.name)
    weights, colon, group = value.partition(":")
    if weights not in WORDS:
        raise RecipeError(
            f"unknown precision {value!r} in {text!r}: choose of {', '.join(WORDS)}, int4:g64; "
            f"for target gguf also {', '.join(GGUF_TYPES)}; for coreml {', '.join(COREML_TYPES)}; "
            f"for tensorrt {', '.join(TENSORRT_TYPES)}"
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
        whole: Precision = getattr(recipe, PARTS[part])
        for precision in (whole, *(precision for _, precision in whole.rules)):
            if precision.format:
                raise RecipeError(
                    f"target {target!r} has no precision {precision.format!r} for the {PARTS[part]} part: "
                    f"choose of {', '.join(WORDS)}"
                )


def refuse_rules(recipe: Recipe, parts: Iterable[str], target: str) -> None:
    """Raise RecipeError where one of `parts` has rules for single layers, which `target` cannot take."""
    for part in parts:
        precision: Precision = getattr(recipe, PARTS[part])
        if precision.rules:
            raise RecipeError(
                f"target {target!r} takes one precision for the whole {PARTS[part]} part, not {str(precision)!r}: "
                f"leave out ;{';'.join(f'{pattern}={other}' for pattern, other in precision.rules)}"
            )
