"""`vlm-export`: the function `export`, its keywords as flags."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vlm_export import goal
from vlm_export.algorithms import SAMPLES
from vlm_export.export import export
from vlm_export.goal import MAX_KL
from vlm_export.table import Stages, notes, parity_table, size
from vlm_models.command import run
from vlm_models.errors import BundleError, CheckError, InputError
from vlm_runtime.manifest import Manifest, read_manifest

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

_HELP = """Export a trained LLaVA checkpoint to a bundle that runs on a device, and check it against the checkpoint.

The bundle is a folder: the vision encoder, the projector and the language model for each target, with tokenizer,
embedding table and manifest.json. Afterwards every stage of it, from pixels to 32 tokens of an answer, is compared with
the checkpoint; a table shows how far apart they are, and the exit code is 1 when that is too far.

**Examples**

* `vlm-export llava-1.5-7b-hf --target onnx -o llava-onnx` (a folder or a hub id)
* `vlm-export ./checkpoint --target onnx -o small --precision int4`
* `vlm-export ./checkpoint --target onnx -o mixed --precision language=int4:g128,vision=int8`
* `vlm-export ./checkpoint --target gguf -o phone --precision language=q4_k_m --calibration pictures/`
* `vlm-export ./checkpoint --sensitivity --budget 120MB -o report` (which layers can take fewer bits)
* then: `vlm-run llava-onnx --image cat.png "What is this?"`

**Exit codes:** 0 done; 1 written, but too far from the checkpoint; 2 bad input, nothing written;
3 a needed package is missing.
"""


@app.command(help=_HELP, no_args_is_help=True)
def command(
    checkpoint: Annotated[
        str, typer.Argument(help="The model: a Hugging Face folder with config.json, or a hub id like org/model.")
    ],
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help="What to export to (onnx, gguf); repeat for several in one bundle."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="A new folder, or a bundle of the same checkpoint that gets the target too."
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="fp32, fp16, int8, int4, or by part: language=int4:g128,vision=int8,projector=fp16; "
            "for gguf also its own types: language=q4_k_m; auto: what --sensitivity recommends."
        ),
    ] = "fp16",
    calibration: Annotated[
        Path | None,
        typer.Option(
            show_default="CHECKPOINT/calibration, if there",
            help="Image-text pairs that weigh what matters: a folder of pictures with prompts (cat.png, cat.txt), "
            "JSONL with image and prompt, or LLaVA-format JSON.",
        ),
    ] = None,
    algorithm: Annotated[
        str,
        typer.Option(
            help="How the language model is rounded: rtn (to nearest), or by calibration pairs awq (int4), gptq (int4, "
            "int8), smoothquant (int8), several as in awq+gptq; auto takes what the precision needs."
        ),
    ] = "auto",
    calibration_samples: Annotated[int, typer.Option(help="How many of the pairs are taken at most.")] = SAMPLES,
    seed: Annotated[int, typer.Option(help="Which of them.")] = 0,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Export nothing: measure every group of layers at every precision and recommend a recipe; "
            "tables, JSON and a picture go to -o.",
        ),
    ] = False,
    budget: Annotated[
        str | None, typer.Option(help="For --sensitivity and --precision auto: the best within a size, as 120MB.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            show_default=f"{MAX_KL:g}",
            help="For --sensitivity and --precision auto: the smallest that loses at most so many nats a token.",
        ),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(
            show_default="the model's, up to 4096",
            help="Positions of prompt and answer together; one picture takes 576 in LLaVA-1.5.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Compare the bundle with the checkpoint (minutes for large models)."),
    ] = True,
    greedy_tokens: Annotated[int, typer.Option(help="Tokens of the answer to compare.")] = 32,
    gguf_tokenizer: Annotated[
        str, typer.Option(help="checked, or none: a GGUF without vocabulary, for vlm-run but not for llama-server.")
    ] = "checked",
    coreml_kv: Annotated[
        str, typer.Option(help="The KV cache of Core ML: a state, or io: input and output, which the caller keeps.")
    ] = "state",
    coreml_layout: Annotated[
        str, typer.Option(help="plain, or ane: 1×1 convolutions with channels first, as the Neural Engine likes them.")
    ] = "plain",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, and no progress bars.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")] = False,
) -> None:
    console, began = Console(stderr=True), time.perf_counter()
    if sensitivity:
        with Stages(console, shown=not (as_json or quiet)) as stages:
            found = goal.measured(
                checkpoint, target, output, precision, calibration, budget, max_kl, algorithm, calibration_samples,
                seed, stages,
            )  # fmt: skip
        goal.show(found, output, as_json=as_json, quiet=quiet)
        return
    if not target or output is None:
        raise InputError(f"{'no target' if not target else 'no output folder'} given: --target NAME -o FOLDER")
    missed: CheckError | None = None
    with Stages(console, shown=not (as_json or quiet)) as stages:
        try:
            manifest = export(
                checkpoint,
                target,
                output,
                precision=precision,
                max_context=max_context,
                check=check,
                greedy_tokens=greedy_tokens,
                calibration=calibration,
                algorithm=algorithm,
                calibration_samples=calibration_samples,
                seed=seed,
                budget=budget,
                max_kl=max_kl,
                gguf_tokenizer=gguf_tokenizer,  # type: ignore[arg-type]  # refused there
                coreml_kv=coreml_kv,  # type: ignore[arg-type]
                coreml_layout=coreml_layout,  # type: ignore[arg-type]
                progress=stages,
            )
        except CheckError as error:
            missed, manifest = error, _written(output, target, error)
    seconds = {**stages.seconds, "total": round(time.perf_counter() - began, 3)}
    if as_json:
        typer.echo(json.dumps(_report(output, manifest, target, seconds)))
    elif not quiet:
        _show(Console(), output, manifest, target, seconds)
    if missed is not None:
        raise missed


def main() -> None:
    """Entry point of the command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its remarks on old configs are not the user's concern
    run(app)


def _written(output: Path, targets: list[str], error: CheckError) -> Manifest:
    """The manifest of a bundle that missed parity; raises `error` again where nothing was written."""
    try:
        manifest = read_manifest(output.expanduser())
    except BundleError:
        raise error from None
    if any(target not in manifest.parity for target in targets):
        raise error
    return manifest


def _report(output: Path, manifest: Manifest, targets: list[str], seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "output": str(output.absolute()),
        "targets": targets,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "files": {name: entry.bytes for name, entry in manifest.files.items()},
        "seconds": seconds,
        "parity": {name: manifest.parity.get(name) for name in targets},
    }


def _show(console: Console, output: Path, manifest: Manifest, targets: list[str], seconds: dict[str, float]) -> None:
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
