"""Deciding how weights are rounded: a model whose checkpoint holds the decided values, which every target packs.

Scalings and roundings change tensors of the checkpoint, never a target: the new tensors are memory-mapped files in a
scratch folder, each with the grid its values stand on.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vlm_export.algorithms import SAMPLES, check_algorithm, form_of, rounded_bits, steps
from vlm_export.importance import Example, examples
from vlm_export.overlay import Overlay
from vlm_export.rounding import Rounding
from vlm_export.streaming import stream
from vlm_export.target import Progress, silent
from vlm_models.checkpoint import Checkpoint
from vlm_models.model import Model
from vlm_models.vision import Encoder
from vlm_quant.calibration import Calibration, sample
from vlm_quant.recipe import Recipe

_UNCALIBRATED = (
    "int4 without calibration: weights are rounded to nearest; give --calibration with image-text pairs to round them "
    "by what pictures and questions need"
)


@dataclass(frozen=True)
class Decided:
    """The model to pack, and what was done to it as plain values for the manifest.

    `record`: algorithm, samples, of, seed, sha256 of the sample, layers (name → numbers), notes, seconds.
    """

    model: Model
    record: Mapping[str, Any]


def decide(
    model: Model,
    recipe: Recipe,
    calibration: Calibration | None,
    algorithm: str = "auto",
    *,
    symmetric: bool = False,
    folder: Path,
    samples: int = SAMPLES,
    seed: int = 0,
    progress: Progress = silent,
) -> Decided:
    """Decide every weight of the language model that `recipe` rounds, on at most `samples` of the pairs.

    `algorithm`: "auto", "rtn" (to nearest), or one or more of `algorithms.STEPS` as in "awq+gptq". `symmetric`: grids
    around zero, for targets without zero points. `folder` takes the changed tensors (float32) and must live as long as
    the model. Raises InputError for an unknown algorithm, one without pairs, and one that has nothing to do.
    """
    check_algorithm(algorithm, model.spec.language, recipe, calibration, samples, ("symmetric", "zero points"))
    began, bits = time.perf_counter(), rounded_bits(model.spec.language, recipe)
    if not bits:
        return Decided(model, {})
    calibrated, language = calibration is not None, model.spec.language
    chosen = steps(algorithm, language, recipe, calibrated=calibrated, symmetric=symmetric)
    if not chosen or calibration is None:
        missing = algorithm == "auto" and 4 in bits
        return Decided(model, {"algorithm": "rtn", **({"notes": [_UNCALIBRATED]} if missing else {})})
    drawn = sample(calibration, samples, seed)
    shown = examples(model, drawn, progress=progress)
    name = "+".join(sorted(chosen))
    changed, layers = decide_on(model, recipe, shown, name, symmetric=symmetric, folder=folder, progress=progress)
    record = {
        "algorithm": name,
        "samples": len(drawn.pairs),
        "of": len(calibration.pairs),
        "skipped": calibration.skipped,
        "rows": sum(len(example.embeds) for example in shown),
        "seed": seed,
        "sha256": drawn.sha256,
        "layers": layers,
        "seconds": round(time.perf_counter() - began, 1),
    }
    if calibration.skipped:
        record["notes"] = [f"{calibration.skipped} calibration pairs left out: their pictures cannot be opened"]
    return Decided(changed, record)


def decide_on(
    model: Model,
    recipe: Recipe,
    sequences: Sequence[Example],
    algorithm: str,
    *,
    symmetric: bool,
    folder: Path,
    progress: Progress = silent,
) -> tuple[Model, dict[str, dict[str, Any]]]:
    """The model with weights decided on these sequences, and numbers by layer."""
    spec, overlay = model.spec.language, Overlay(model.checkpoint, folder)
    rounding = Rounding(
        overlay,
        spec,
        lambda linear: form_of(recipe.language.at(linear.name), linear.in_features, symmetric=symmetric),
        frozenset(algorithm.split("+")),
        len(sequences),
    )
    done, of = itertools.count(1), (spec.layers + 1) * len(sequences)
    states = [example.embeds for example in sequences]
    stream(overlay.checkpoint, spec, states, rounding.inputs, lambda: progress(algorithm, next(done), of))
    return _Rounded(model, overlay.checkpoint), rounding.record


class _Rounded(Model):
    """The same vision parts, which may be in memory already, before another decoder."""

    def __init__(self, model: Model, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint, model.spec)
        self._model = model

    def vision_encoder(self) -> Encoder:
        return self._model.vision_encoder()

    def projector(self) -> nn.Module:
        return self._model.projector()
