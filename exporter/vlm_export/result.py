"""What `vlm-export` says at its end: a bundle's parity, size and time, for people or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from vlm_export.table import notes, parity_table, size
from vlm_models.errors import BundleError, CheckError
from vlm_runtime.manifest import Manifest, read_manifest


def written(output: Path, targets: list[str], error: CheckError) -> Manifest:
    """The manifest of a bundle that missed parity; raises `error` again where nothing was written."""
    try:
        manifest = read_manifest(output.expanduser())
    except BundleError:
        raise error from None
    if any(target not in manifest.parity for target in targets):
        raise error
    return manifest


def report(output: Path, manifest: Manifest, targets: list[str], seconds: dict[str, float]) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "output": str(output.absolute()),
        "targets": targets,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "files": {name: entry.bytes for name, entry in manifest.files.items()},
        "seconds": seconds,
        "parity": {name: manifest.parity.get(name) for name in targets},
    }


def show(console: Console, output: Path, manifest: Manifest, targets: list[str], seconds: dict[str, float]) -> None:
    """How far each target is from the checkpoint, what there is to know about it, and what was written."""
    for name in targets:
        if name in manifest.parity:
            console.print(parity_table(name, manifest.parity[name]))
            for note in notes(manifest, name):
                console.print(note, highlight=False, markup=False, soft_wrap=True)
        else:
            console.print(f"{name}: parity: not measured")
    total = sum(entry.bytes for entry in manifest.files.values())
    recipe = ", ".join(f"{name}: {manifest.recipes[name]}" for name in targets)
    console.print(
        f"{output}  {size(total)}, {recipe}, {seconds['total']:.0f} s", highlight=False, markup=False, soft_wrap=True
    )
