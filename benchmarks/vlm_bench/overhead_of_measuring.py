"""`python -m vlm_bench.overhead_of_measuring BUNDLE`: the same answers with vlm-bench's clocks and without."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console

from vlm_bench import report
from vlm_bench.energy import Meter
from vlm_bench.measure import Rep, interleave
from vlm_bench.pictures import Pictures
from vlm_bench.stages import QUESTION, Clock, open_endless
from vlm_bench.worker import workers
from vlm_models.command import run


def make(folder: str, work: str, threads: int, tokens: int, pairs: int) -> Rep:
    """`pairs` answers each way in one process: the medians of both, and of the ratio within each pair, in percent."""
    model = open_endless(folder, None, threads)
    pictures = Pictures([], Path(work))

    def plain(number: int) -> float:
        image = str(pictures.files(number)[0])
        start = time.perf_counter()
        model.answer(QUESTION, [image], max_new_tokens=tokens)
        return (time.perf_counter() - start) * 1e3

    def measured(number: int) -> float:
        image, clock, meter = str(pictures.files(number)[0]), Clock(model), Meter()
        try:
            meter.joules()
            clock.fit(QUESTION, image, tokens)
            wall = float(clock.answer(QUESTION, image, tokens)["wall_ms"])
            meter.joules()
            return wall
        finally:
            meter.close()
            clock.remove()

    def rep(number: int) -> Mapping[str, float]:
        without, within = [], []
        for pair in range(pairs):
            first = 2 * (number * pairs + pair)
            if pair % 2:  # neither is always the second of a pair
                within.append(measured(first))
                without.append(plain(first + 1))
            else:
                without.append(plain(first))
                within.append(measured(first + 1))
        ratios = [100 * (a / b - 1) for a, b in zip(within, without, strict=True)]
        return {"without_ms": median(without), "with_ms": median(within), "added_percent": median(ratios)}

    return rep


def command(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 32,
    pairs: Annotated[int, typer.Option(min=1, help="Answers each way in one repeat.")] = 8,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    idle: Annotated[float, typer.Option(help="Seconds to wait for an idle machine before each repeat.")] = 8.0,
    save: Annotated[bool, typer.Option("--save", help=f"Write the numbers into {report.RESULTS}.")] = False,
) -> None:
    """What measuring adds to what is measured: whole answers with the clocks of every stage, and without any."""
    console = Console()
    name = bundle.resolve().name
    with TemporaryDirectory(prefix="vlm-bench-") as work:
        makers = {name: ("vlm_bench.overhead_of_measuring:make", (str(bundle), work, threads, tokens, pairs))}
        with workers(makers, threads) as running:
            results = interleave(running, repeats, idle_s=idle, watch=report.status(console))
    columns = {"without_ms": "without, ms", "with_ms": "with, ms", "added_percent": "added, %"}
    console.print(report.table(f"answers of {tokens} tokens, {threads} threads; medians", results, columns))
    report.warn_if_loud(console, results)
    if save:
        facts = {"tokens": tokens, "pairs": pairs, "threads": threads}
        console.print(str(report.save(report.record("overhead-of-measuring", results, **facts))))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
