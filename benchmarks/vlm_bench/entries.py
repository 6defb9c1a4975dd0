"""Who takes part in a run: bundles with the engines asked for, and peers, each as a contestant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_bench.contestant import Contestant, python_argv
from vlm_bench.results import Skipped, readable
from vlm_models.errors import DependencyError, InputError
from vlm_runtime.bundle import Bundle, open_bundle
from vlm_runtime.engine import choose_engines, engine_names


@dataclass(frozen=True)
class Chosen:
    """A bundle that takes part: its name in the results, and engines as `vlm_runtime.load` takes them."""

    name: str
    folder: Path
    engine: str
    contestant: Contestant


def choose_bundles(bundles: Sequence[Path], engines: Sequence[str], threads: int) -> tuple[list[Chosen], list[Skipped]]:
    """Each bundle with each of `engines` that it holds (none given: its own choice).

    Raises InputError for a bundle given twice, or with none of the engines; BundleError for what is no bundle. An
    engine that a bundle has, but that this machine lacks, is skipped with the reason.
    """
    if len({path.resolve() for path in bundles}) < len(bundles):
        raise InputError("a bundle is given twice: give each once")
    for path in bundles:
        if any("\ud800" <= c <= "\udfff" for c in str(path.resolve())):  # bytes that are no text
            raise InputError(f"{readable(path)}: the folder's name is not UTF-8, which engines cannot open: rename it")
    names = short_names(bundles)
    found: list[Chosen] = []
    skipped: list[Skipped] = []
    for path, name in zip(bundles, names, strict=True):
        bundle, refused, usable = open_bundle(path, verify=False), list[Exception](), 0
        wanted: Sequence[str | None] = engines or [None]
        for engine in wanted:
            title = name if engine is None or len(engines) == 1 else f"{name} ({engine})"
            try:
                chosen = choose_engines(bundle, engine)
            except DependencyError as error:
                skipped.append(Skipped(title, readable(str(error))))
                usable += 1
            except InputError as error:
                if "=" not in str(engine) and engine not in engine_names():
                    raise
                skipped.append(Skipped(title, readable(str(error))))
                refused.append(error)
            else:
                usable += 1
                found.append(_chosen(title, bundle, chosen, threads))
        if not usable:
            raise InputError(readable(f"{path}: {refused[0]}"))
    return found, skipped


def short_names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its own, its path where two are alike, with a number where even these are."""
    own = [readable(path.resolve().name) for path in folders]
    names: list[str] = []
    for path, name in zip(folders, own, strict=True):
        name = readable(path) if own.count(name) > 1 else name
        names.append(name if name not in names else f"{name} {len(names) + 1}")
    return names


def _chosen(name: str, bundle: Bundle, engines: dict[str, str], threads: int) -> Chosen:
    manifest = bundle.manifest
    files = {manifest.tokenizer, manifest.embedding.file, manifest.embedding.scales} - {None}
    for part, engine in engines.items():
        files |= set(bundle.part(part, engine).files)
    words = ",".join(f"{part}={engine}" for part, engine in engines.items())
    arguments = {"folder": str(bundle.folder), "engine": words, "threads": threads}
    contestant = Contestant(
        name=name,
        kind="bundle",
        argv=python_argv("vlm_bench.stages:serve_bundle", arguments),
        files=tuple(str(bundle.path(file)) for file in sorted(filter(None, files))),
        bytes_on_disk=sum(manifest.files[file].bytes for file in files if file),
    )
    return Chosen(name, bundle.folder, words, contestant)
