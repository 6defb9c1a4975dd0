"""Which algorithms round a language model, what "auto" stands for, and whether one has something to do. No torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from vlm_export.rules import HEAD, language_layers
from vlm_models.errors import InputError
from vlm_quant.grouped import Form, symmetric_group
from vlm_quant.recipe import Precision, Recipe

if TYPE_CHECKING:
    from vlm_models.spec import LanguageSpec
    from vlm_quant.calibration import Calibration

STEPS = {"awq": {4}, "gptq": {4, 8}, "smoothquant": {8}}  # the bits of the layers that each is for
SAMPLES = 64


def steps(algorithm: str, spec: LanguageSpec, recipe: Recipe, *, calibrated: bool, symmetric: bool) -> frozenset[str]:
    """What "auto" stands for, or those of "awq+gptq" that have something to do; none of them is rounding to nearest.

    int8 layers are smoothed where their inputs are rounded as well, as w8a8 says, and ONNX Runtime does for all.
    """
    if algorithm == "rtn":
        return frozenset()
    forms = _forms(spec, recipe, symmetric=symmetric)
    if algorithm != "auto":
        return frozenset(step for step in algorithm.split("+") if _serves(step, forms))
    chosen = {step for step in ("awq", "smoothquant") if calibrated and _serves(step, forms)}
    return frozenset({"gptq", *chosen} if chosen else ())


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
    forms = {form for kind in grids for form in _forms(spec, recipe, symmetric=kind == "symmetric")}
    for step in sorted(asked):
        if not _serves(step, forms):
            words = " or ".join(f"int{one}" for one in sorted(STEPS[step]))
            which = f"{words} layers" + (" whose inputs are rounded too" if step == "smoothquant" else "")
            raise InputError(f"algorithm {step!r} has nothing to do: language={recipe.language} has no {which}")
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
    return {form.bits for form in _forms(spec, recipe, symmetric=True)}


def form_of(precision: Precision, columns: int, *, symmetric: bool) -> Form | None:
    """The grid that a target packs a layer on; None for layers that stay floats or are a target's own type.

    Of the targets that round around zero only w8a8 rounds inputs, all by one scale; fp8 is floats, which need no grid.
    Symmetric int4 takes groups that divide the columns, or int8 where only the finest do.
    """
    if precision.format == "w8a8":
        return Form(8, 0, True, "tensor")
    if precision.format or precision.weights not in ("int8", "int4"):
        return None
    if precision.weights == "int8":
        return Form(8, 0, True, "" if symmetric else "row")
    if not symmetric:
        return Form(4, precision.group_size, False)
    group = symmetric_group(precision.group_size, columns)
    return Form(4, group, True) if group else Form(8, 0, True)


def _serves(step: str, forms: Collection[Form]) -> bool:
    """Whether an algorithm has something to do on these grids: smoothing only where inputs are rounded."""
    return any(form.bits in STEPS[step] and (form.inputs or step != "smoothquant") for form in forms)


def _forms(spec: LanguageSpec, recipe: Recipe, *, symmetric: bool) -> set[Form]:
    """Of the layers before the head; groups as they are asked for."""
    layers = [name for name in language_layers(spec) if name != HEAD]
    forms = [form_of(recipe.language.at(name), 0, symmetric=symmetric) for name in layers]
    return {form for form in forms if form is not None}
