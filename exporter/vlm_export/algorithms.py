"""Which algorithms round a language model, what "auto" stands for, and whether one has something to do. No torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from vlm_export.rules import HEAD, language_layers
from vlm_models.errors import InputError
from vlm_quant.grouped import Form
from vlm_quant.recipe import Precision, Recipe

if TYPE_CHECKING:
    from vlm_models.spec import LanguageSpec
    from vlm_quant.calibration import Calibration

STEPS = {"awq": {4}, "gptq": {4, 8}, "smoothquant": {8}}  # the bits of the layers that each is for
SAMPLES = 128


def steps(algorithm: str, spec: LanguageSpec, recipe: Recipe, *, calibrated: bool, symmetric: bool) -> frozenset[str]:
    """What "auto" stands for, or the algorithms of "awq+gptq"; none of them is rounding to nearest.

    int8 layers are smoothed where their inputs are rounded as well, as on grids with zero points (ONNX Runtime).
    """
    if algorithm == "rtn":
        return frozenset()
    if algorithm != "auto":
        return frozenset(algorithm.split("+"))
    bits = rounded_bits(spec, recipe) if calibrated else set()
    chosen = {"awq", "gptq"} if 4 in bits else set()
    return frozenset(chosen | {"gptq", "smoothquant"} if 8 in bits and not symmetric else chosen)


def check_algorithm(
    algorithm: str,
    spec: LanguageSpec,
    recipe: Recipe,
    calibration: Calibration | None,
    samples: int,
    grids: Collection[str] = ("symmetric",),
) -> None:
    """Raise InputError for an algorithm that is none, that lacks pairs, or that has nothing to do on `grids`."""
    asked = set() if algorithm in ("auto", "rtn") else set(algorithm.split("+"))
    if asked - set(STEPS):
        raise InputError(
            f"unknown algorithm {algorithm!r}: choose one of auto, rtn, {', '.join(STEPS)}, or several as in awq+gptq"
        )
    if samples < 1:
        raise InputError(f"{samples} calibration samples cannot be: give 1 or more")
    if not asked:
        return
    if not grids:
        raise InputError(f"algorithm {algorithm!r} is for none of these targets, which round by types of their own")
    bits = rounded_bits(spec, recipe)
    for step in sorted(asked):
        if not STEPS[step] & bits:
            words = " or ".join(f"int{one}" for one in sorted(STEPS[step]))
            raise InputError(f"algorithm {step!r} has nothing to do: language={recipe.language} has no {words} layers")
    if calibration is None:
        raise InputError(f"algorithm {algorithm!r} needs image-text pairs: give --calibration, or --algorithm rtn")


def changed_copies(
    algorithm: str, spec: LanguageSpec, recipe: Recipe, grids: Collection[str], *, calibrated: bool
) -> int:
    """How many float32 copies of the language model are held on the disk meanwhile: one for each kind of grid."""
    kinds = [kind == "symmetric" for kind in grids]
    return sum(bool(steps(algorithm, spec, recipe, calibrated=calibrated, symmetric=kind)) for kind in kinds)


def rounded_bits(spec: LanguageSpec, recipe: Recipe) -> set[int]:
    """Of the grids that the recipe puts the language model's layers on, the head apart."""
    layers = [name for name in language_layers(spec) if name != HEAD]
    forms = [form_of(recipe.language.at(name), 0, symmetric=True) for name in layers]
    return {form.bits for form in forms if form is not None}


def form_of(precision: Precision, columns: int, *, symmetric: bool) -> Form | None:
    """The grid that a target packs a layer on; None for layers that stay floats or are a target's own type.

    Symmetric int4 takes groups that divide the columns, as Core ML does.
    """
    if precision.format or precision.weights not in ("int8", "int4"):
        return None
    if precision.weights == "int8":
        return Form(8, 0, True)
    if not symmetric:
        return Form(4, precision.group_size, False)
    return Form(4, max(n for n in range(1, precision.group_size + 1) if columns % n == 0), True)
