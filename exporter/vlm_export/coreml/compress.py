"""Fewer bits for the weights of a converted model: every weight of a linear layer or convolution, none passed over.

coremltools' own int4 leaves a layer whose columns the block does not divide in fp16 and only logs it, rounds in fp16,
and takes tables of constants for weights. So integers are ours here: blocks that fit each layer, rounded in float32,
and a record of whatever was kept. Palettes and rounded activations are coremltools'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_export.coreml.activations import Observe, Samples, round_activations
from vlm_export.coreml.layers import SMALL, Constants, Layer, constants
from vlm_export.coreml.sdk import coremltools, quiet
from vlm_export.rules import check_rules, kept
from vlm_export.target import Progress, silent
from vlm_models.errors import CheckpointError, RecipeError
from vlm_models.grid import Grid
from vlm_quant.blockwise import quantize_blocks
from vlm_quant.coreml_types import CoreMLType, check_coreml, coreml_type
from vlm_quant.grid import pack_blocks, regrouped
from vlm_quant.grouped import FINEST, symmetric_group
from vlm_quant.recipe import Precision

_TINY = float(np.finfo(np.float16).smallest_normal)


Named = tuple[str, Grid | None]
"""What rules call the layer of a constant, and the values on which its weight has been put already."""


@dataclass
class Tally:
    """What became of a function's weights: layers by precision, other blocks than asked for, whatever was kept."""

    layers: Counter[str] = field(default_factory=Counter)
    reblocked: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    subnormal: int = 0
    grids: int = 0
    rounded_again: list[str] = field(default_factory=list)

    def details(self) -> dict[str, Any]:
        """Plain values for `Part.details`."""
        details: dict[str, Any] = {"linears": dict(self.layers), "kept": dict(self.kept)}
        if self.reblocked:
            details["reblocked"] = dict(self.reblocked)
        if self.subnormal:
            details["subnormal_scales"] = self.subnormal
        if self.grids or self.rounded_again:
            details |= {"grids": self.grids, "rounded_again": list(self.rounded_again)}
        return details


def compress(
    mlmodel: Any,
    precision: Precision,
    *,
    part: str = "language_model",
    layers: Mapping[str, Named] | None = None,
    samples: Samples = (),
    observe: Observe | None = None,
    progress: Progress = silent,
) -> tuple[Any, dict[str, Any]]:
    """The ML program `mlmodel` (one function, float weights) at `precision`, and plain values for `Part.details`.

    int8 takes one scale a row; int4 one scale for `precision.group_size` columns or, where they do not divide a row,
    for as many as `symmetric_group` says, each layer by the rules for it; "pal4" and "pal6" one palette a weight;
    "w8a8" int8 weights and inputs of layers rounded to int8 over the ranges that `observe` (by default our executor)
    sees while it runs `samples`. Weights of linear layers, convolutions and products with a constant are compressed;
    every other float constant is named in `kept`. `layers` says what rules call them, by their constants.

    Raises RecipeError for a precision that `part` cannot take, for rules that fit no layer, and for "w8a8" without
    samples.
    """
    check_coreml(precision, part)
    type = coreml_type(precision, part)
    if type.activations and not samples:
        raise RecipeError(
            f"precision {type.name!r} rounds activations by what pictures make of them: "
            "give --calibration a folder of image-text pairs"
        )
    found, tally = constants(mlmodel.get_spec()), Tally()
    named = {name: (layers or {}).get(name.removesuffix("_to_fp16"), (name, None)) for name in found.layers}
    check_rules(precision, [layer for layer, _ in named.values()], part)
    if type.weights in ("fp16", "fp32") and not precision.rules:
        tally.layers[type.name] = len(found.layers)
        return mlmodel, tally.details()
    if type.weights not in ("fp16", "fp32"):
        tally.kept |= found.others
    if type.activations:
        mlmodel = round_activations(mlmodel, samples, observe)
    if type.palette:
        mlmodel = _palettize(mlmodel, type, found, tally, part, progress)
    else:
        mlmodel = _integers(mlmodel, precision, found, named, tally, part, progress)
    details = tally.details()
    if type.warning:
        details["warning"] = type.warning
    if type.activations:
        details["calibration_samples"] = len(samples)
    return mlmodel, details


def _integers(
    mlmodel: Any,
    precision: Precision,
    found: Constants,
    named: Mapping[str, Named],
    tally: Tally,
    part: str,
    progress: Progress,
) -> Any:
    done = 0

    def change(const: Any) -> None:
        nonlocal done
        layer = found.layers[const.outputs[0].name]
        called, grid = named[layer.name]
        chosen = precision.at(called)
        if chosen.weights in ("fp16", "fp32"):
            tally.layers[chosen.weights] += 1
            if reason := kept(precision, chosen):
                tally.kept[layer.name] = reason
        else:
            block = _block(layer, chosen.group_size, tally) if chosen.weights == "int4" else 0
            tally.layers[f"int4:g{block}" if block else chosen.format or "int8"] += 1
            _replace(const, layer, block, grid, tally)
        done += 1
        progress(f"{part}: {precision}", done, len(found.layers))

    return _apply(mlmodel, found, change)


def _block(layer: Layer, asked: int, tally: Tally) -> int:
    """Columns that share an int4 scale; 0 for a layer that has to take int8. Anything but `asked` is written down."""
    columns = layer.shape[layer.columns]
    block = symmetric_group(asked, columns)
    if not block:
        tally.kept[layer.name] = f"int8: {columns} columns have no divisor from {FINEST} to {asked}"
    elif block != asked:
        tally.reblocked[layer.name] = f"blocks of {block}: {columns} columns are no multiple of {asked}"
    return block


def _replace(const: Any, layer: Layer, block: int, grid: Grid | None, tally: Tally) -> None:
    """Put integers and scales in the place of a constant."""
    mil = coremltools("converters.mil.mil")
    last = layer.columns if block else layer.rows  # int8 has one scale a row: all else of it counts as columns
    weight = const.outputs[0].val
    turned = np.moveaxis(weight, last, -1 if block else 0)
    matrix = turned.reshape(-1, turned.shape[-1]) if block else turned.reshape(len(turned), -1)
    size, bits = block or matrix.shape[1], 4 if block else 8
    on_grid = None if grid is None else _on_grid(matrix, size, bits, grid)
    values, scales = quantize_blocks(matrix, size, bits) if on_grid is None else on_grid
    if on_grid is not None:
        tally.grids += 1
    elif grid is not None:
        tally.rounded_again.append(layer.name)
    shape = (*turned.shape[:-1], -1) if block else (-1, *[1] * (weight.ndim - 1))
    dtype = mil.types.nptype_from_builtin(mil.types.string_to_builtin("int4" if block else "int8"))
    new = mil.Builder.constexpr_blockwise_shift_scale(
        data=np.ascontiguousarray(np.moveaxis(values.reshape(turned.shape), -1 if block else 0, last)).astype(dtype),
        scale=np.ascontiguousarray(np.moveaxis(scales.reshape(shape), -1 if block else 0, last)),
        before_op=const,
        name=f"{const.name}_quantized",
    )
    owner = const.enclosing_block
    owner.replace_uses_of_var_after_op(anchor_op=const, old_var=const.outputs[0], new_var=new, no_check_var_types=True)
    owner.remove_ops([const])
    tally.subnormal += int(np.count_nonzero(scales < _TINY)) if scales.dtype == np.float16 else 0


def _on_grid(matrix: NDArray[Any], block: int, bits: int, grid: Grid) -> tuple[NDArray[np.int8], NDArray[Any]] | None:
    """Integers and scales of a quantizer; None where Core ML has no such form, or fp16 has moved the weights off it."""
    fits = grid.bits == bits and grid.zeros is None and matrix.shape[0] == len(grid.scales)
    found = regrouped(grid, block, matrix.shape[1]) if fits else None
    if found is None:
        return None
    try:
        return pack_blocks(matrix, found, matrix.dtype)
    except CheckpointError:
        return None


def _apply(mlmodel: Any, found: Constants, change: Callable[[Any], None]) -> Any:
    """The model with `change` done to every constant that is a layer's weight."""
    base = coremltools("converters.mil.mil.passes.graph_pass").AbstractGraphPass
    scope = coremltools("converters.mil.mil.passes.helper").block_context_manager
    apply_pass = coremltools("models.utils")._apply_graph_pass

    def apply(self: Any, program: Any) -> None:
        def visit(self: Any, block: Any) -> None:
            for op in list(block.operations):
                if op.op_type == "const" and op.outputs[0].name in found.layers:
                    change(op)

        for block in program.functions.values():
            scope(visit)(self, block)

    with quiet():
        return apply_pass(mlmodel, type("weights", (base,), {"apply": apply})())


def _palettize(mlmodel: Any, type: CoreMLType, found: Constants, tally: Tally, part: str, progress: Progress) -> Any:
    """One palette of 2^bits values a weight, by exact one-dimensional k-means."""
    optimize = coremltools("optimize.coreml")
    one = optimize.OpPalettizerConfig(
        mode="kmeans", nbits=type.palette, granularity="per_tensor", weight_threshold=SMALL - 1
    )
    progress(f"{part}: {type.name}", 0, 1)
    with quiet():
        config = optimize.OptimizationConfig(op_name_configs=dict.fromkeys(found.layers, one))
        mlmodel = optimize.palettize_weights(mlmodel, config)
    progress(f"{part}: {type.name}", 1, 1)
    missed = set(found.layers) & set(constants(mlmodel.get_spec()).layers)
    tally.kept |= dict.fromkeys(missed, "fp16: coremltools did not palettize it")
    tally.layers[type.name] = len(found.layers) - len(missed)
    return mlmodel
