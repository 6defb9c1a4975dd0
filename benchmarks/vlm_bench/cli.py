"""`vlm-bench`: bundles and peers side by side: stages, memory, energy, accuracy and drift, here or on a device."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlm_bench import tables
from vlm_bench.compare import compare, read_threshold
from vlm_bench.plan import Plan, bench
from vlm_bench.report import RESULTS
from vlm_bench.results_file import read_results
from vlm_models.command import run
from vlm_models.errors import CheckError, InputError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
_OUT, _WHAT, _WHERE = "What it writes", "What is asked", "Where it runs"


@app.command(
    no_args_is_help=True,
    epilog="Exit codes: 0 done, 1 --compare found regressions, 2 bad input, 3 an engine or a device is missing.",
)
def command(
    bundles: Annotated[
        list[Path] | None, typer.Argument(metavar="BUNDLE…", help="Bundle folders; measured in turns.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR|FILE", help="Pictures, or folders of them (default: one of noise).", rich_help_panel=_WHAT
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Questions, one a line; each about each picture.", rich_help_panel=_WHAT),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", "--decode", metavar="N", help="Length of each answer.", rich_help_panel=_WHAT),
    ] = 64,
    questions: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Accuracy on a .jsonl or LLaVA .json of questions and answers, or on demo, demo:N.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    drift: Annotated[
        bool | None,
        typer.Option(
            "--drift/--no-drift",
            help="The first stage that drifts, beside --checkpoint or the first bundle (default: with --checkpoint or "
            "--html).",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    runs: Annotated[
        int, typer.Option("--runs", "--repeats", metavar="N", help="Repetitions after one to warm up.")
    ] = 5,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="As for vlm-run: onnx, or vision=onnx,language=gguf; repeat to compare several.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Cores, and threads of each engine (default: the physical ones).", rich_help_panel=_WHERE
        ),
    ] = None,
    idle: Annotated[float, typer.Option(metavar="S", help="Wait as long for an idle machine, then mark noisy.")] = 8.0,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:PRECISION][=PYTHON]",
            help="transformers, llamacpp, onnxruntime-genai or openvino-genai on the weights of --checkpoint, here "
            "or in PYTHON's environment; repeats.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    peer_cache: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where peers' conversions are kept.", rich_help_panel=_WHERE),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="What peers run, and what accuracy and drift refer to.", rich_help_panel=_WHERE
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="URL", help="ssh://USER@HOST:PORT or adb://SERIAL.", rich_help_panel=_WHERE)
    ] = None,
    device_binaries: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="llama.cpp's programs for an adb:// phone.", rich_help_panel=_WHERE),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Kept up to date while it runs.", rich_help_panel=_OUT),
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="A page with charts.", rich_help_panel=_OUT)
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="One line for each.", rich_help_panel=_OUT)
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help=f"JSON into {RESULTS} too, by date.", rich_help_panel=_OUT)
    ] = False,
    old_and_new: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="OLD NEW", help="Two JSON files: regressions, and exit code 1 for any."),
    ] = None,
    threshold: Annotated[str, typer.Option(metavar="SHARE", help="How much worse is a regression.")] = "10%",
) -> None:
    """Measure bundles and peers side by side: medians of interleaved repetitions, each in a process of its own.

    **Two bundles:**  vlm-bench bundle-int8 bundle-int4 --html report.html

    **On a device:**  vlm-bench bundle --device ssh://jetson --json jetson.json

    **In CI:**  vlm-bench --compare main.json branch.json --threshold 10%

    TTFT is the time from question and picture to the first token, everything but loading. A repetition is quiet when
    other processes used less than 8 % of the cores meanwhile; medians are of quiet ones where there are three.
    """
    with contextlib.suppress(AttributeError):  # characters that the terminal cannot show must not end the run
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    console = Console()
    if old_and_new is not None:
        if bundles:
            raise InputError("--compare reads two JSON files and measures nothing: leave the bundles out")
        _compare(console, *old_and_new, read_threshold(threshold))
        return
    if not bundles:
        raise InputError("give at least one bundle, or --compare OLD NEW")
    plan = Plan(
        bundles=tuple(bundles),
        images=tuple(image or ()),
        prompts=prompts,
        engines=tuple(engine or ()),
        runs=runs,
        threads=threads,
        max_new_tokens=max_new_tokens,
        idle_s=idle,
        peers=tuple(peer or ()),
        peer_cache=peer_cache,
        checkpoint=checkpoint,
        questions=questions,
        drift=drift,
        device=device,
        device_binaries=device_binaries,
        json_file=json_file,
        html_file=html_file,
        csv_file=csv_file,
        save=save,
    )
    bench(plan, console)


def main() -> None:
    """Entry point of the command."""
    run(app)


def _compare(console: Console, old: Path, new: Path, threshold: float) -> None:
    found = compare(read_results(old), read_results(new), threshold)
    console.print(tables.comparison(found, threshold))
    if lines := found.regressions:
        more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
        raise CheckError(f"{lines[0]}{more}: worse than {old} by more than {threshold:.0%}")


if __name__ == "__main__":
    main()
