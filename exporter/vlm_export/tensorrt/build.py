"""Engines from the graphs of a bundle: one part at a time, each in a process of its own, each checked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_export.target import Progress, silent
from vlm_export.tensorrt import plan
from vlm_export.tensorrt.facts import fp16_bytes, verify
from vlm_export.tensorrt.machine import check_machine
from vlm_export.tensorrt.plan import Step
from vlm_export.tensorrt.process import ask
from vlm_export.write import hash_files
from vlm_models.errors import BundleError, InputError
from vlm_runtime.bundle import open_bundle
from vlm_runtime.manifest import PARTS, Manifest, Part, write_manifest

ENGINE, FOLDER = "tensorrt", "tensorrt"
# Grows with every build, so no manifest lists it; TensorRT-RTX has none.
TIMING_CACHE = f"{FOLDER}/timing.cache"


def build_engines(
    root: Path, parts: Mapping[str, Part], profiles: Sequence[str] = (), progress: Progress = silent
) -> dict[str, Part]:
    """The parts of a bundle that is being written, with engines for `profiles` in files and `details["engines"]`.

    Devices that must build for themselves get a note. Raises InputError, RecipeError, DependencyError, CheckError.
    """
    devices = plan.devices_of(profiles, plan.precisions_of({name: part.precision for name, part in parts.items()}))
    steps, later = plan.steps(devices)
    built = dict(parts)
    for step, name in _order(steps, root, built):
        built[name] = _with_engine(built[name], _build(root, name, built[name], step, progress))
    (root / TIMING_CACHE).unlink(missing_ok=True)
    if later and built:
        names = ", ".join(device.name for device in later)
        note = f"engines for {names} are built there: vlm-export --build BUNDLE, or tensorrt/build.sh in the bundle"
        built = {name: _with_notes(part, [note]) for name, part in built.items()}
    return built


def build_bundle(bundle: str | Path, profiles: Sequence[str] = (), progress: Progress = silent) -> Manifest:
    """Build the engines that a bundle on the disk lacks: for `profiles`, by default for the GPU at hand.

    Each engine is in the manifest before the next is begun, so a build that was stopped goes on where it was.
    Raises BundleError for a bundle without TensorRT parts or with damaged ones, and what `build_engines` raises.
    """
    folder = Path(bundle).expanduser()
    manifest = open_bundle(folder, verify=False).manifest
    names = [name for name in PARTS if ENGINE in manifest.parts[name]]
    if not names:
        raise BundleError(f"{folder} has no TensorRT parts: export them with vlm-export --target tensorrt")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written to: copy the bundle to a place of your own")
    parts = {name: manifest.parts[name][ENGINE] for name in names}
    precisions = plan.precisions_of({name: part.precision for name, part in parts.items()})
    devices = plan.devices_of(profiles, precisions)
    steps, later = plan.steps(devices)
    plan.refuse_later(later)
    if profiles:
        sizes = {name: float(_weights(folder, part)) for name, part in parts.items()}
        io = parts["language_model"].details["io"] if "language_model" in parts else {}
        language, kv = manifest.spec.language, str(io.get("kv", ""))
        at = precisions.get("language_model", next(iter(precisions.values())))
        plan.check_boards(devices, sizes, language, at, manifest.max_context, kv)
    for step, name in _order(steps, folder, parts):
        part = manifest.parts[name][ENGINE]
        _intact(folder, part, manifest)
        manifest = _commit(folder, manifest, name, _without(part, _file(step, name)), step)
        entry = _build(folder, name, part, step, progress)
        manifest = _commit(folder, manifest, name, _with_engine(manifest.parts[name][ENGINE], entry), step)
    return manifest


def _order(steps: Sequence[Step], root: Path, parts: Mapping[str, Part]) -> Iterator[tuple[Step, str]]:
    """Engines that are missing, those of the smallest part first; the largest must find room before any is begun."""
    wanted = [(step, name) for step in steps for name in parts if not plan.covered(step, _engines(parts[name]))]
    wanted.sort(key=lambda one: (one[0].name, _weights(root, parts[one[1]])))
    if wanted:
        name = max((name for _, name in wanted), key=lambda name: _weights(root, parts[name]))
        check_machine(root, name, _weights(root, parts[name]))
    yield from wanted


def _build(root: Path, name: str, part: Part, step: Step, progress: Progress) -> dict[str, Any]:
    """Build one engine into its place; what `details["engines"]` says of it."""
    file, io = _file(step, name), dict(part.details.get("io", {}))
    path, weights = root / file, _weights(root, part)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_machine(root, name, weights)
    partial = path.with_name(f".{path.name}.partial")
    full = step.sdk.name == "tensorrt"
    request = {
        "sdk": step.sdk.name,
        "graph": str((root / part.graph).resolve()),
        "io": io,
        "capabilities": [] if full else step.capabilities,
        "engine": str(partial.resolve()),
        "timing_cache": str((root / TIMING_CACHE).resolve()) if full else None,
    }
    who = f"{step.sdk}: {name} for {step.name}"
    stage = f"{name} engine"
    progress(stage, 0, 100)
    try:
        told = ask(request, stage=stage, who=who, progress=progress)
        notes = verify(who, told, weights, io)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    progress(stage, 100, 100)
    return {
        "file": file,
        "profile": step.name,
        "compute_capabilities": step.capabilities,
        "sdk": step.sdk.name,
        "version": step.sdk.version,
        **told,
        **({"of_fp16": round(told["bytes"] / fp16_bytes(told["weights"]), 3)} if told["weights"] else {}),
        **({"notes": notes} if notes else {}),
    }


def _commit(folder: Path, manifest: Manifest, name: str, part: Part, step: Step) -> Manifest:
    """Put `part` into the manifest on the disk, for all engines that run this graph."""
    engines = manifest.parts[name]
    old = engines[ENGINE]
    if part == old:
        return manifest
    new = {engine: part if one.graph == old.graph else one for engine, one in engines.items()}
    gone = set(old.files) - set(part.files)
    files = {file: entry for file, entry in manifest.files.items() if file not in gone}
    files |= hash_files(folder, set(part.files) - set(files), silent)
    tools = {**manifest.tools, step.sdk.name.replace("_", "-"): step.sdk.version}
    changed = replace(manifest, parts={**manifest.parts, name: new}, files=files, tools=tools)
    write_manifest(folder, changed)
    return changed


def _with_engine(part: Part, entry: Mapping[str, Any]) -> Part:
    engines = [*(one for one in _engines(part) if one["file"] != entry["file"]), dict(entry)]
    files = (*(file for file in part.files if file != entry["file"]), entry["file"])
    with_it = replace(part, files=files, details={**part.details, "engines": engines})
    return _with_notes(with_it, entry.get("notes", ()))


def _without(part: Part, file: str) -> Part:
    """The part before a file of it is built again: a manifest must never list what is being replaced."""
    if file not in part.files:
        return part
    engines = [one for one in _engines(part) if one["file"] != file]
    files = tuple(one for one in part.files if one != file)
    return replace(part, files=files, details={**part.details, "engines": engines})


def _with_notes(part: Part, notes: Sequence[str]) -> Part:
    told = list(dict.fromkeys([*part.details.get("notes", ()), *notes]))
    return replace(part, details={**part.details, "notes": told}) if notes else part


def _engines(part: Part) -> list[Mapping[str, Any]]:
    return list(part.details.get("engines", ()))


def _file(step: Step, name: str) -> str:
    return f"{FOLDER}/engines/{step.name}/{name}.engine"


def _graph_files(part: Part) -> list[str]:
    """The graph that the builder reads, with its weights."""
    return [file for file in part.files if file in (part.graph, f"{part.graph}.data")]


def _weights(root: Path, part: Part) -> int:
    return sum((root / file).stat().st_size for file in _graph_files(part))


def _intact(folder: Path, part: Part, manifest: Manifest) -> None:
    """Raise BundleError where a graph is not the one that was written: an engine would hide it."""
    for file, entry in hash_files(folder, _graph_files(part), silent).items():
        if entry != manifest.files[file]:
            raise BundleError(f"{folder / file} does not match its sha256: the bundle is damaged; export again")
