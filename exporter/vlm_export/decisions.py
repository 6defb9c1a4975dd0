"""How the language model is rounded for each target of an export: decided once for each kind of grid."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_export.target import Job, Target
from vlm_runtime.manifest import Part

if TYPE_CHECKING:
    from vlm_export.decide import Decided


def grids_of(builders: Mapping[str, Target], steps: Mapping[str, Collection[str]]) -> dict[str, str]:
    """Target → the grids on which it packs a language model, for those that have one to pack and grids to choose."""
    found = {name: str(builders[name].GRIDS) for name, parts in steps.items() if "language_model" in parts}
    return {name: grids for name, grids in found.items() if grids != "own"}


def decide_all(
    jobs: Mapping[str, Job], grids: Mapping[str, str], scratch: Path, algorithm: str, samples: int, seed: int
) -> dict[str, Decided]:
    """Target → the model that it is to pack, decided once for each kind of grid (target → its kind)."""
    from vlm_export.decide import decide

    made: dict[str, Decided] = {}
    for name, kind in grids.items():
        if kind in made:
            continue
        job, folder = jobs[name], scratch / str(len(made))
        folder.mkdir()
        made[kind] = decide(
            job.model,
            job.recipe,
            job.calibration,
            algorithm,
            symmetric=kind == "symmetric",
            folder=folder,
            samples=samples,
            seed=seed,
            progress=job.progress,
        )
    return {name: made[kind] for name, kind in grids.items()}


def recorded(parts: Mapping[str, Part], decided: Decided | None) -> Mapping[str, Part]:
    """The parts, the language model's details with how it was rounded."""
    if decided is None or not decided.record:
        return parts
    part = parts["language_model"]
    notes = [*part.details.get("notes", ()), *decided.record.get("notes", ())]
    rounding = {key: value for key, value in decided.record.items() if key != "notes"}
    details = {**part.details, "rounding": rounding, **({"notes": notes} if notes else {})}
    return {**parts, "language_model": replace(part, details=details)}
