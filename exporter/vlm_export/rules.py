"""Rules for single layers: each must fit a layer, and what a part keeps coarser or finer than asked is written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

from vlm_models.errors import RecipeError
from vlm_models.spec import LanguageSpec
from vlm_quant.recipe import PARTS, Precision

HEAD = "lm_head"
_TOLD = 3  # reasons on the console
_PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def language_layers(spec: LanguageSpec) -> list[str]:
    """Names of the linear layers as `vlm_models.language.walk` gives them."""
    return [f"layers.{layer}.{name}" for layer in range(spec.layers) for name in _PROJECTIONS] + [HEAD]


def check_rules(precision: Precision, layers: Collection[str], part: str) -> None:
    """Raise RecipeError where a rule of `part` ("language_model", …) fits none of its linear layers."""
    for pattern, other in precision.rules:
        alone = Precision("fp32", rules=((pattern, other),))
        if not any(alone.rule(layer) for layer in layers):
            examples = [*layers][-2:]
            raise RecipeError(
                f"rule {pattern}={other} fits no linear layer of the {PARTS[part]} part: "
                f"its layers are named as in {' and '.join(examples) or 'no model, since it has none'}"
            )


def kept(asked: Precision, layer: Precision) -> str:
    """Why a layer of a part of integers stays in floats by a rule; empty where it does not."""
    whole = asked.weights in ("int8", "int4", "int3", "int2")
    return f"{layer}: asked for by a rule" if whole and layer.weights in ("fp32", "fp16") else ""


def kept_note(part: str, precision: Precision, kept: Mapping[str, str]) -> list[str]:
    """One line for the console on what is not as the recipe's word says, and why; none where everything is."""
    if not kept:
        return []
    reasons = Counter(kept.values())
    told = [f"{count} {reason}" for reason, count in reasons.most_common(_TOLD)]
    more = f"; {len(reasons) - _TOLD} more reasons in manifest.json" if len(reasons) > _TOLD else ""
    whole = replace(precision, rules=())
    return [f"{part}: {len(kept)} tensor{'s are' if len(kept) > 1 else ' is'} not {whole}: {'; '.join(told)}{more}"]
