"""How the language model is rounded for each target of an export: decided once for each kind of grid."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_export.target import Job, find_target
from vlm_runtime.manifest import Part

if TYPE_CHECKING:
    from vlm_export.decide import Decided


def grids_of(steps: Mapping[str, Collection[str]]) -> set[str]:
    """On which grids language models are to be decided."""
    return {str(find_target(name).GRIDS) for name, parts in steps.items() if "language_model" in parts} - {"own"}


def decide_all(jobs: Mapping[str, Job], scratch: Path, algorithm: str, samples: int, seed: int) -> dict[str, Decided]:
    """Target → the model that it is to pack, decided once for each kind of grid."""
    from vlm_export.decide import decide

    made: dict[str, Decided] = {}
    decided: dict[str, Decided] = {}
    for name, job in jobs.items():
        for grids in grids_of({name: job.parts}):
            if grids not in made:
                folder = scratch / str(len(made))
                folder.mkdir()
                made[grids] = decide(
                    job.model,
                    job.recipe,
                    job.calibration,
                    algorithm,
                    symmetric=grids == "symmetric",
                    folder=folder,
                    samples=samples,
                    seed=seed,
                    progress=job.progress,
                )
            decided[name] = made[grids]
    return decided


def recorded(parts: Mapping[str, Part], decided: Decided | None) -> Mapping[str, Part]:
    """The parts, the language model's details with how it was rounded."""
    if decided is None or not decided.record:
        return parts
    part = parts["language_model"]
    notes = [*part.details.get("notes", ()), *decided.record.get("notes", ())]
    rounding = {key: value for key, value in decided.record.items() if key != "notes"}
    details = {**part.details, "rounding": rounding, **({"notes": notes} if notes else {})}
    return {**parts, "language_model": replace(part, details=details)}
