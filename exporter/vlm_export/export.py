"""The line: checkpoint → model → targets → bundle → parity. `export` is the command `vlm-export`."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm_export import goal, golden, parity, preflight, shared, write
from vlm_export.algorithms import SAMPLES, changed_copies, check_algorithm
from vlm_export.decisions import decide_all, grids_of, recorded
from vlm_export.pairs import pairs_for
from vlm_export.reference import compute_reference, prompt_ids
from vlm_export.reference_prompt import question_text
from vlm_export.target import Job, Progress, Target, find_target, not_installed, silent
from vlm_export.tensorrt import plan
from vlm_models.checkpoint import NO_SOURCES, Sources
from vlm_models.errors import CheckError, InputError
from vlm_quant.recipe import PARTS as RECIPE_PARTS
from vlm_quant.recipe import Recipe
from vlm_runtime.bundle import Bundle
from vlm_runtime.engine import find_engine
from vlm_runtime.manifest import Manifest, Part

if TYPE_CHECKING:
    from vlm_models.model import Model

_TENSORRT = "tensorrt"
_TOOLS = (
    *("vlm-export", "torch", "transformers", "onnx", "onnxruntime", "gguf", "llama-cpp-python"),
    *("coremltools", "coreai-core", "coreai-torch", "numpy", "tensorrt", "tensorrt-rtx"),
)


def export(
    checkpoint: str | Path,
    targets: str | Sequence[str],
    output: str | Path,
    *,
    precision: str = "fp16",
    max_context: int | None = None,
    check: bool = True,
    greedy_tokens: int = 32,
    calibration: str | Path | None = None,
    algorithm: str = "auto",
    calibration_samples: int = SAMPLES,
    seed: int = 0,
    budget: str | None = None,
    max_kl: float | None = None,
    gguf_tokenizer: Literal["checked", "none"] = "checked",
    coreml_kv: Literal["state", "io"] = "state",
    coreml_layout: Literal["plain", "ane"] = "plain",
    tensorrt_kv: Literal["concat", "scatter"] = "concat",
    device_profiles: Sequence[str] = (),
    web: bool = False,
    sources: Sources = NO_SOURCES,
    tell: Callable[[str], None] = lambda note: None,
    progress: Progress = silent,
) -> Manifest:
    """Export a checkpoint to a bundle folder for each of `targets`, and check it against the checkpoint.

    `checkpoint`: a Hugging Face folder or hub id. `output`: a new folder, or a bundle of the same checkpoint to which
    targets are added. `precision`: "fp32", "fp16", "int8", "int4", parts as in "language=int4:g128,vision=int8", or a
    target's own type as in "language=q4_k_m"; "auto" takes what `recommend` finds for `budget` or `max_kl`.
    `max_context`: positions of prompt and answer together (by default the model's, up to 4096). `check` runs
    `greedy_tokens` tokens beside the checkpoint. `calibration`: image-text pairs (`vlm_quant.calibration.read_pairs`),
    by default the checkpoint's own folder calibration/ where it has one. `algorithm` (see `vlm_export.decide`)
    rounds the language model on at most `calibration_samples` of them, drawn by `seed`. `gguf_tokenizer` "none" leaves
    the vocabulary out of a GGUF; `coreml_kv` "io" gives Core ML the KV cache as input and output instead of a state,
    `coreml_layout` "ane" puts channels first; `tensorrt_kv` "scatter" gives TensorRT a cache of fixed size, written in
    place; `device_profiles` ("rtx40", "rtx40:24" with 24 GB) are what its engines are built for, by default the GPU at
    hand, else RTX 30, 40 and 50. `web` writes ONNX graphs that are fast in a browser. `sources` say where pieces lie
    that the checkpoint only names (a LoRA's base model, a vision tower); `tell` is called with each note on what was
    found and chosen there, `progress(stage, done, of)` all along.

    Raises InputError (nothing is left behind), DependencyError, or CheckError when parity is missed: the bundle is
    then written all the same, with `passed: false` in its manifest.
    """
    chosen = {name: find_target(name) for name in ([targets] if isinstance(targets, str) else targets)}
    asked, output = goal.asked(precision, budget, max_kl), Path(output).expanduser()
    for what, given, allowed in (
        ("GGUF tokenizer", gguf_tokenizer, ("checked", "none")),
        ("Core ML KV cache", coreml_kv, ("state", "io")),
        ("Core ML layout", coreml_layout, ("plain", "ane")),
        ("TensorRT KV cache", tensorrt_kv, ("concat", "scatter")),
    ):
        if given not in allowed:
            raise InputError(f"unknown {what} {given!r}: choose one of {', '.join(allowed)}")
    if device_profiles and _TENSORRT not in chosen:
        raise InputError(
            f"device profiles are for target {_TENSORRT!r}: add it with --target {_TENSORRT}, or leave them"
        )
    model = _load(checkpoint, sources, output, chosen)
    for note in model.checkpoint.notes:
        tell(note)
    pairs = pairs_for(model, calibration)
    recipe = asked or goal.recipe(model, pairs, budget, max_kl, algorithm, calibration_samples, seed, progress)
    base = write.existing_bundle(output, model.spec.fingerprint, list(chosen), max_context)
    if web and ("onnx" not in chosen or base):
        raise InputError("--web is for target 'onnx' in a new bundle: add --target onnx, or choose another -o")
    context = base.max_context if base else preflight.context_of(model.spec, max_context)
    steps = _steps(chosen, recipe, base)
    builders = {name: find_target(name) for name in steps}
    for name, builder in builders.items():
        builder.requires(recipe, model.spec, steps[name], context)
    engines = 0.0
    if _TENSORRT in steps:
        engines = plan.check(device_profiles, model, recipe, steps[_TENSORRT], context, tensorrt_kv)
    for engine in {e for target in chosen.values() for e in target.ENGINES.values()} if check else ():
        find_engine(engine).available()
    prompt = _golden_prompt(model, context, greedy_tokens) if check else ""
    grids, language = grids_of(builders, steps), model.spec.language
    kinds = set(grids.values())
    check_algorithm(algorithm, language, recipe, pairs, calibration_samples, kinds)
    copies = changed_copies(algorithm, language, recipe, kinds, calibrated=pairs is not None)
    held = copies * 4 * preflight.weights(model, "language_model") + math.ceil(engines)
    preflight.disk(output, preflight.bytes_needed(model, recipe, steps, base is not None) + held)
    preflight.finite(model.checkpoint, progress)

    with write.draft(output) as folder:
        manifest = _with_base(base, output, folder) if base else _with_shared(model, context, recipe, folder, progress)
        job = Job(
            model,
            recipe,
            folder,
            context,
            parts=(),
            calibration=pairs,
            gguf_tokenizer=gguf_tokenizer,
            coreml_kv=coreml_kv,
            coreml_layout=coreml_layout,
            tensorrt_kv=tensorrt_kv,
            device_profiles=tuple(device_profiles),
            web=web,
            progress=progress,
        )
        jobs = {name: replace(job, parts=p, progress=_named(progress, name, len(steps))) for name, p in steps.items()}
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            decided = decide_all(jobs, grids, Path(scratch), algorithm, calibration_samples, seed)
            for name, one in jobs.items():
                builder = builders[name]
                built = builder.build(replace(one, model=decided[name].model) if name in decided else one)
                manifest = _with_parts(manifest, builder.RUN_BY, recorded(built, decided.get(name)))
        manifest = replace(manifest, recipes={**manifest.recipes, **dict.fromkeys(chosen, str(recipe))})
        if check:
            manifest = _checked(manifest, chosen, jobs, recipe, prompt, greedy_tokens)
        new = write.files_in(folder) - set(manifest.files)
        manifest = replace(manifest, files={**manifest.files, **write.hash_files(folder, new, progress)})
        write.publish(folder, output, manifest)
    for name in chosen if check else ():
        if (problem := parity.failure(manifest.parity[name], recipe)) is not None:
            raise CheckError(f"{problem} (the bundle is written to {output})")
    return manifest


def _steps(chosen: Mapping[str, Target], recipe: Recipe, base: Manifest | None) -> dict[str, list[str]]:
    """Target → the parts it has to build, each once and none that the bundle holds already.

    Raises InputError where the bundle holds a part at another precision than is asked for now.
    """
    steps: dict[str, list[str]] = {}
    if base and (base.embedding.dtype == "I8") != (recipe.embedding is not None):
        table = "embedding=int8" if base.embedding.dtype == "I8" else f"{base.embedding.dtype}, without embedding=int8"
        raise InputError(f"the bundle holds the embedding table at {table}: ask for the same, or choose another -o")
    for name, target in chosen.items():
        for part, engine in target.ENGINES.items():
            builder = name if engine in target.RUN_BY else engine
            held = base.parts.get(part, {}).get(engine) if base else None
            asked = str(getattr(recipe, RECIPE_PARTS[part]))
            if held is not None and held.precision != asked:
                word = RECIPE_PARTS[part]
                raise InputError(
                    f"the bundle holds the {part} for {engine} at {held.precision}, not {asked}: "
                    f"add {word}={held.precision} to --precision, or choose another -o"
                )
            if held is None and part not in steps.setdefault(builder, []):
                steps[builder].append(part)
    return {name: parts for name, parts in steps.items() if parts}


def _load(checkpoint: str | Path, sources: Sources, output: Path, chosen: Mapping[str, Target]) -> Model:
    from vlm_models.model import load_model

    if not chosen:
        raise InputError("no target given: name at least one")
    if Path(checkpoint).expanduser().is_dir():
        write.check_output(output, Path(checkpoint).expanduser())
    try:
        model = load_model(checkpoint, sources)
    except ModuleNotFoundError as error:
        raise not_installed(error, "reading a checkpoint", "export") from error
    write.check_output(output, model.checkpoint.folder)
    return model


def _golden_prompt(model: Model, context: int, tokens: int) -> str:
    """The prompt of the check as the checkpoint writes it, which must fit the context together with its answer."""
    prompt = question_text(model, golden.QUESTION)
    rows = len(prompt_ids(model, prompt, [golden.picture()]))
    if tokens < 1:
        raise InputError(f"greedy tokens {tokens} cannot be: the check needs at least 1 (or --no-check)")
    if rows + tokens > context:
        raise InputError(
            f"max context {context} is too short for the check, a prompt of {rows} and {tokens} greedy tokens; "
            f"raise --max-context, lower --greedy-tokens, or give --no-check"
        )
    return prompt


def _with_shared(model: Model, context: int, recipe: Recipe, folder: Path, progress: Progress) -> Manifest:
    """A manifest of no target yet, with the files that all targets share."""
    return Manifest(
        format="vlm-bundle",
        version=1,
        created=_now(),
        spec=model.spec,
        max_context=context,
        embedding=shared.write_embedding(
            model.checkpoint, model.spec, folder, progress, int8=recipe.embedding is not None
        ),
        tokenizer=shared.write_tokenizer(model.checkpoint, folder),
        files={},
        parts={},
        recipes={},
        parity={},
        golden=None,
        tools=_tools(),
        image_newline=shared.write_newline(model.checkpoint, model.spec, folder),
        notes=model.checkpoint.notes,
    )


def _with_base(base: Manifest, output: Path, folder: Path) -> Manifest:
    """The manifest of the bundle at `output`, its files put into `folder`."""
    write.reuse(output, base.files, folder)
    return replace(base, created=_now(), tools=_tools())


def _with_parts(manifest: Manifest, engines: Sequence[str], parts: Mapping[str, Part]) -> Manifest:
    known = manifest.parts
    new = {name: {**known.get(name, {}), **dict.fromkeys(engines, part)} for name, part in parts.items()}
    return replace(manifest, parts={**known, **new})


def _checked(
    manifest: Manifest,
    chosen: Mapping[str, Target],
    jobs: Mapping[str, Job],
    recipe: Recipe,
    prompt: str,
    tokens: int,
) -> Manifest:
    """The manifest with the parity of each target, and the golden vectors beside it."""
    job = next(iter(jobs.values()))
    model, folder, progress = job.model, job.root, job.progress
    bundle, picture = Bundle(folder.resolve(), manifest), golden.write_picture(folder)
    asked = golden.prompt(bundle.spec.prompt)
    runners = {name: parity.Runner(bundle, target.ENGINES, picture, asked) for name, target in chosen.items()}
    draft = next(iter(runners.values())).draft
    reference = compute_reference(model, picture, prompt, tokens=tokens, draft=draft, progress=progress)
    measured: dict[str, Any] = {}
    for name, runner in runners.items():
        measured[name] = parity.measure(runner, reference, recipe, _named(progress, name, len(runners)))
        written = {part: manifest.parts[part][engine] for part, engine in chosen[name].ENGINES.items()}
        measured[name] |= chosen[name].checks(jobs.get(name, job), written, reference)
    if manifest.golden is None:
        golden.write_vectors(folder, reference)
    return replace(manifest, golden=golden.VECTORS, parity={**manifest.parity, **measured})


def _named(progress: Progress, target: str, targets: int) -> Progress:
    """Stages carry their target's name where there are several."""
    return progress if targets == 1 else lambda stage, done, of: progress(f"{target} {stage}", done, of)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _tools() -> dict[str, str]:
    """Versions of what the bundle was made with."""
    versions = {"python": platform.python_version()}
    for tool in _TOOLS:
        try:
            versions[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
