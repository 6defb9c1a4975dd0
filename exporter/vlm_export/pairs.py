"""The image-text pairs of an export: those that were given, or that the checkpoint brings along."""

from __future__ import annotations

from pathlib import Path

from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import InputError
from vlm_models.model import Model
from vlm_quant.calibration import Calibration, read_pairs, readable, sample
from vlm_runtime.image import open_image

POOL = 1024  # pairs of a larger set that are looked at: each of their pictures is opened once


def pairs_for(model: Model, path: str | Path | None) -> Calibration | None:
    """`calibration_pairs` of a model that can be calibrated. Raises InputError for others where `path` is given."""
    if model.spec.language.both_ways == "none":
        return calibration_pairs(model.checkpoint, path)
    if path is None:
        return None
    raise InputError(
        "calibration is for causal language models, and in this one rows of a prompt see one another both ways: "
        "leave out --calibration"
    )


def calibration_pairs(checkpoint: Checkpoint, path: str | Path | None) -> Calibration | None:
    """Pairs of `path`, by default of the checkpoint's own folder calibration/; None where it has none.

    A larger set is sampled. Pairs whose picture cannot be opened are left out and counted; raises InputError where
    they are more than a tenth, and as `read_pairs` and `readable` do.
    """
    own = checkpoint.folder / "calibration"
    if path is None and not own.is_dir():
        return None
    return readable(sample(read_pairs(own if path is None else path), POOL), open_image)
