"""`vlm-bench`: how long each stage of each bundle takes, and how much memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlm_bench import report
from vlm_bench.measure import Stat, interleave
from vlm_bench.worker import workers
from vlm_models.command import run
from vlm_models.errors import InputError
from vlm_runtime.manifest import read_manifest

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
COLUMNS = {
    "load_s": "load s",
    "preprocess_ms": "pixels ms",
    "vision_ms": "vision ms",
    "projector_ms": "projector ms",
    "prefill_ms": "prefill ms",
    "decode_tokens_per_s": "decode tok/s",
    "ttft_ms": "TTFT ms",
    "peak_mb": "peak MB",
}


@app.command(no_args_is_help=True)
def command(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle folders; several are measured in turn.")],
    image: Annotated[Path | None, typer.Option(help="A picture (default: noise).")] = None,
    engine: Annotated[str | None, typer.Option(help="As for vlm-run: one name, or vision=onnx,language=gguf.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Cores to pin to, and threads of the engines.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Measured repeats after one to warm up.")] = 5,
    prefill: Annotated[int | None, typer.Option(min=1, help="Rows of the prefill (default: 600 or what fits).")] = None,
    decode: Annotated[int, typer.Option(min=1, help="Tokens decoded after it.")] = 64,
    idle: Annotated[float, typer.Option(help="Seconds to wait for an idle machine before each repeat.")] = 8.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    save: Annotated[bool, typer.Option("--save", help=f"Write them into {report.RESULTS} too.")] = False,
) -> None:
    """Measure bundles: medians of interleaved repeats, each bundle in a process of its own.

    TTFT is the time from question and picture to the first token, everything included but loading. A repeat is quiet
    when other processes used less than 8 % of the cores meanwhile; medians are of quiet repeats where there are three.
    """
    console = Console()
    names = _names(bundles)
    length = prefill or min(600, *(read_manifest(path).max_context - decode for path in bundles))
    arguments = {
        name: (str(path), str(image) if image else None, engine, threads, length, decode)
        for name, path in names.items()
    }
    with workers({name: ("vlm_bench.stages:make", a) for name, a in arguments.items()}, threads) as running:
        results = interleave(running, repeats, idle_s=idle, watch=report.status(console))
        for name, worker in running.items():
            results[name] = {**results[name], "load_s": _once(worker.load_s), "peak_mb": _once(worker.peak_mb())}
    title = f"prefill of {length} rows, {decode} tokens decoded, {threads} threads; medians"
    console.print(report.table(title, results, COLUMNS))
    report.warn_if_loud(console, results)
    data = report.record("bundles", results, threads=threads, prefill_tokens=length, decode_tokens=decode)
    if json_file is not None:
        json_file.write_text(json.dumps(data, indent=2) + "\n", "utf-8")
    if save:
        console.print(str(report.save(data)))


def main() -> None:
    """Entry point of the command."""
    run(app)


def _names(bundles: list[Path]) -> dict[str, Path]:
    """Short names for the table: the folder's own, or its path where two are alike."""
    short = [path.resolve().name for path in bundles]
    if len({path.resolve() for path in bundles}) < len(bundles):
        raise InputError("a bundle is given twice: give each once")
    return {str(path) if short.count(name) > 1 else name: path for name, path in zip(short, bundles, strict=True)}


def _once(value: float) -> Stat:
    return Stat(value, value, value, 1, 1)
