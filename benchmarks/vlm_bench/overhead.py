"""`python -m vlm_bench.overhead BUNDLE`: the runtime's own share of a decoded token, everything but engine calls."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vlm_bench import report
from vlm_bench.measure import Rep, interleave
from vlm_bench.stages import QUESTION, noise, open_endless
from vlm_bench.worker import workers
from vlm_models.command import run
from vlm_models.errors import InputError


class Timed:
    """Stands before an engine's session or decoder and adds up the seconds of one of its methods."""

    def __init__(self, inner: Any, method: str) -> None:
        self.inner, self.seconds, call = inner, 0.0, getattr(inner, method)

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments)
            self.seconds += time.perf_counter() - start
            return result

        setattr(self, method, timed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def make(folder: str, threads: int, tokens: int) -> Rep:
    """Answers of `tokens` tokens through the public `generate`, with the time inside the engine taken apart."""
    model = open_endless(folder, None, threads)
    decoder: Any = model.decoder
    if tokens < 8:
        raise InputError("give 8 tokens or more")
    if hasattr(decoder, "_session"):  # ONNX Runtime: only its own run counts as the engine
        clock = decoder._session = Timed(decoder._session, "run_with_iobinding")
    else:
        clock = Timed(decoder, "decode")
        decoder.decode = clock.decode

    def rep(number: int) -> Mapping[str, float]:
        answer = model.generate(QUESTION, [noise(number)], max_new_tokens=tokens)
        next(answer)  # the prefill and the first piece of text
        start, engine = time.perf_counter(), clock.seconds
        for _ in answer:
            pass
        wall, inside = time.perf_counter() - start, clock.seconds - engine
        return {"own_percent": 100 * (1 - inside / wall), "own_us": (wall - inside) / tokens * 1e6}

    return rep


def command(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of each answer.")] = 128,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    idle: Annotated[float, typer.Option(help="Seconds to wait for an idle machine before each repeat.")] = 8.0,
    save: Annotated[bool, typer.Option("--save", help=f"Write the numbers into {report.RESULTS}.")] = False,
) -> None:
    """The share of decoding that is not the engine: lookup, sampling, text, the loop itself."""
    console = Console()
    makers = {bundle.resolve().name: ("vlm_bench.overhead:make", (str(bundle), threads, tokens))}
    with workers(makers, threads) as running:
        results = interleave(running, repeats, idle_s=idle, watch=report.status(console))
    columns = {"own_percent": "own share, %", "own_us": "own µs per token"}
    console.print(report.table(f"greedy answers of {tokens} tokens, {threads} threads; medians", results, columns))
    report.warn_if_loud(console, results)
    if save:
        console.print(str(report.save(report.record("overhead", results, tokens=tokens, threads=threads))))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
