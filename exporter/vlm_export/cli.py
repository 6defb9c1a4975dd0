"""`vlm-export`: the function `export`, its keywords as flags."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlm_export import goal
from vlm_export.algorithms import SAMPLES
from vlm_export.export import export
from vlm_export.goal import MAX_KL
from vlm_export.inspect import show_checkpoint
from vlm_export.result import report, show, written
from vlm_export.table import Stages
from vlm_export.tensorrt.build import build_bundle
from vlm_export.tensorrt.report import engine_table, engines
from vlm_models.checkpoint import Sources
from vlm_models.command import run
from vlm_models.errors import CheckError, InputError

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
* `vlm-export ./checkpoint --target tensorrt -o rtx --precision int4 --device-profile rtx40`
* `vlm-export --build orin-bundle` (on the Jetson: the engines that are missing there)
* then: `vlm-run llava-onnx --image cat.png "What is this?"`

**Exit codes:** 0 done; 1 written, but too far from the checkpoint; 2 bad input, nothing written;
3 a needed package is missing.
"""


_PRECISION, _SINGLE, _SOURCES = "Precision", "Single targets", "Pieces that a checkpoint only names"  # panels of --help
_WEB = typer.Option("--web", rich_help_panel=_SINGLE, help="Write ONNX graphs that are fast in a browser.")


@app.command(help=_HELP, no_args_is_help=True)
def command(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            show_default=False, help="The model: a Hugging Face folder with config.json, or a hub id like org/model."
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            help="What to export to (onnx, gguf, coreml, coreai, tensorrt); repeat for several in one bundle.",
        ),
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
            rich_help_panel=_PRECISION,
            help="fp32, fp16, int8, int4, or by part: language=int4:g128,vision=int8,projector=fp16; "
            "for gguf also its own types: language=q4_k_m; auto: what --sensitivity recommends.",
        ),
    ] = "fp16",
    calibration: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_PRECISION,
            show_default="CHECKPOINT/calibration, if there",
            help="Image-text pairs that weigh what matters: a folder of pictures with prompts (cat.png, cat.txt), "
            "JSONL with image and prompt, or LLaVA-format JSON.",
        ),
    ] = None,
    algorithm: Annotated[
        str,
        typer.Option(
            rich_help_panel=_PRECISION,
            help="How the language model is rounded: rtn (to nearest), or by calibration pairs awq (int4), gptq (int4, "
            "int8), smoothquant (int8), several as in awq+gptq; auto takes what the precision needs.",
        ),
    ] = "auto",
    calibration_samples: Annotated[
        int, typer.Option(rich_help_panel=_PRECISION, help="How many of the pairs are taken at most.")
    ] = SAMPLES,
    seed: Annotated[int, typer.Option(rich_help_panel=_PRECISION, help="Which of them.")] = 0,
    inspect: Annotated[
        bool,
        typer.Option(
            "--inspect",
            help="Export nothing: say what the checkpoint is, how it is asked, and what each target would need.",
        ),
    ] = False,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            rich_help_panel=_PRECISION,
            help="Export nothing: measure every group of layers at every precision and recommend a recipe; "
            "tables, JSON and a picture go to -o.",
        ),
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_PRECISION, help="For --sensitivity and --precision auto: the best within a size, as 120MB."
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_PRECISION,
            show_default=f"{MAX_KL:g}",
            help="For --sensitivity and --precision auto: the smallest that loses at most so many nats a token.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_SOURCES,
            show_default="what the adapter names",
            help="The model that a LoRA folder was trained on: a folder or hub id.",
        ),
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_SOURCES,
            show_default="the checkpoint's own weights, else what it names",
            help="The vision tower of a checkpoint in LLaVA's original layout: a folder or hub id.",
        ),
    ] = None,
    conversation: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_SOURCES,
            show_default="found by the checkpoint's name",
            help="The conversation template it was trained with: llava_v1, mistral_instruct, chatml, …",
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
        str,
        typer.Option(
            rich_help_panel=_SINGLE,
            help="checked, or none: a GGUF without vocabulary, for vlm-run but not for llama-server.",
        ),
    ] = "checked",
    coreml_kv: Annotated[
        str,
        typer.Option(
            rich_help_panel=_SINGLE,
            help="The KV cache of Core ML: a state, or io: input and output, which the caller keeps.",
        ),
    ] = "state",
    coreml_layout: Annotated[
        str,
        typer.Option(
            rich_help_panel=_SINGLE,
            help="plain, or ane: 1×1 convolutions with channels first, as the Neural Engine likes them.",
        ),
    ] = "plain",
    tensorrt_kv: Annotated[
        str,
        typer.Option(
            rich_help_panel=_SINGLE,
            help="The KV cache of TensorRT: concat, which grows, or scatter: of fixed size, written in place.",
        ),
    ] = "concat",
    web: Annotated[bool, _WEB] = False,
    device_profile: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=_SINGLE,
            show_default="the GPU at hand, else rtx30, rtx40, rtx50",
            help="What TensorRT engines are for: rtx40, orin, …; rtx40:24 is a board of 24 GB. Repeat for several.",
        ),
    ] = None,
    build: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_SINGLE,
            help="Build the TensorRT engines that this bundle lacks, on the device it is for; it goes on where it was.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, and no progress bars.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")] = False,
) -> None:
    console, began = Console(stderr=True), time.perf_counter()
    if build is not None:
        _refuse_beside_build({"a CHECKPOINT": checkpoint, "--target": target, "--output": output})
        return _build(build, device_profile or (), console, as_json, quiet)
    sources = Sources(base, vision_tower, conversation)
    if inspect:
        return show_checkpoint(checkpoint, sources, precision, max_context, as_json=as_json)
    if sensitivity:
        if checkpoint is None:
            raise InputError("missing CHECKPOINT: --sensitivity measures a checkpoint")
        with Stages(console, shown=not (as_json or quiet)) as stages:
            found = goal.measured(
                checkpoint, target, output, precision, calibration, budget, max_kl, algorithm, calibration_samples,
                seed, sources, stages,
            )  # fmt: skip
        return goal.show(found, output, as_json=as_json, quiet=quiet)
    if checkpoint is None or not target or output is None:
        names = ("CHECKPOINT", checkpoint), ("--target", target), ("--output", output)
        missing = ", ".join(name for name, given in names if not given)
        raise InputError(f"missing {missing}: give CHECKPOINT --target NAME -o OUT, or --build BUNDLE; see --help")
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
                tensorrt_kv=tensorrt_kv,  # type: ignore[arg-type]
                device_profiles=device_profile or (),
                web=web,
                sources=sources,
                tell=lambda note: None if quiet else console.print(note, highlight=False, markup=False, soft_wrap=True),
                progress=stages,
            )
        except CheckError as error:
            missed, manifest = error, written(output, target, error)
    seconds = {**stages.seconds, "total": round(time.perf_counter() - began, 3)}
    if as_json:
        typer.echo(json.dumps(report(output, manifest, target, seconds)))
    elif not quiet:
        show(Console(), output, manifest, target, seconds)
    if missed is not None:
        raise missed
    return None


def main() -> None:
    """Entry point of the command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its remarks on old configs are not the user's concern
    run(app)


def _refuse_beside_build(given: Mapping[str, object]) -> None:
    if others := [name for name, value in given.items() if value]:
        raise InputError(f"--build takes no {', '.join(others)}: it finishes a bundle that is there")


def _build(bundle: Path, profiles: Sequence[str], console: Console, as_json: bool, quiet: bool) -> None:
    """`--build`: the engines that a bundle lacks, and a table of those that it has then."""
    with Stages(console, shown=not (as_json or quiet)) as stages:
        manifest = build_bundle(bundle, profiles, stages)
    found = engines(manifest)
    if as_json:
        typer.echo(json.dumps({"output": str(bundle.absolute()), "seconds": stages.seconds, "engines": found}))
    elif not quiet:
        Console().print(engine_table(found))
