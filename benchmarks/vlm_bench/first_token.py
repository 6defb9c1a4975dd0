"""Picture to first token in stages, of graphs as they are written now and as an earlier version wrote them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from vlm_bench.report import Results
from vlm_models.errors import InputError
from vlm_runtime.bundle import Bundle

BEFORE = " before"  # the name of a precision, as an earlier version wrote it
STAGES = (("vision ", "vision"), ("vision ", "projector"), ("", "prefill"))


@contextlib.contextmanager
def kept(folder: Path | None) -> Iterator[Path]:
    """A folder for graphs: the new one asked for, which stays, or a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="int8-speed-") as scratch:
            yield Path(scratch)
        return
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: name a new folder for --keep")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def earlier(bundles: Mapping[str, Bundle], folder: Path | None) -> dict[str, Bundle]:
    """The same graphs out of the folder that an earlier version kept, those that it holds."""
    if folder is None:
        return {}
    found = {f"{name}{BEFORE}": replace(bundle, folder=folder / bundle.folder.name) for name, bundle in bundles.items()}
    found = {name: bundle for name, bundle in found.items() if bundle.folder.is_dir()}
    if not found:
        names = ", ".join(bundle.folder.name for bundle in bundles.values())
        raise InputError(f"{folder} holds none of {names}: give the folder that --keep named")
    return found


def first_token(results: Results) -> dict[str, dict[str, float]]:
    """Medians in ms of the stages of a precision and their sum, by wall time and by CPU time of all threads."""
    found = {}
    for name in results:
        if f"vision {name}" not in results:
            continue
        for unit in ("ms", "cpu_ms"):
            stages = {stage: results[f"{part}{name}"][f"{stage}_{unit}"].median for part, stage in STAGES}
            found[f"{name}, {unit}"] = {**stages, "sum": sum(stages.values())}
    return found
