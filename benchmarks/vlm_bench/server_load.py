"""`python -m vlm_bench.server_load BUNDLE`: many clients at once, every answer compared with the one made alone."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from vlm_bench import report
from vlm_bench.memory import family, resident_mb
from vlm_bench.server_client import Client, Said, Talk, metrics, talks_of
from vlm_models.errors import CheckError, InputError

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Load:
    """What the clients saw: each answer, refusals (429), and the server's memory once a second."""

    said: tuple[Said, ...]
    refused: int
    memory_mb: tuple[float, ...]
    seconds: float


def references(
    bundle: Path, talks: Sequence[Talk], threads: int, tokens: int, engine: str | None = None
) -> list[tuple[str, str]]:
    """Both answers of each talk, made one after another without a server, nothing kept in between."""
    from vlm_runtime.prompt import render
    from vlm_runtime.vlm import load

    vlm = load(bundle, threads=threads, engine=engine)
    found = []
    for talk in talks:
        messages: list[Any] = []
        for question in talk.questions:
            parts = [] if messages else [{"type": "image"}]
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
            text = render(messages, vlm.spec.prompt)
            answer = vlm.answer(text, [talk.picture], raw=True, max_new_tokens=tokens)
            messages.append({"role": "assistant", "content": answer.text})
        found.append((messages[1]["content"], messages[3]["content"]))
    return found


@contextlib.contextmanager
def serving(bundle: Path, options: Sequence[object]) -> Iterator[tuple[str, int]]:
    """`vlm-serve BUNDLE` on a free port: its address and process id. Raises InputError when it does not start."""
    code = "from vlm_runtime.server.cli import main; main()"
    command = [sys.executable, "-c", code, str(bundle), "--port", "0", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise InputError(f"vlm-serve does not start on {bundle}: run it by itself to see why")
            yield found[0], process.pid
        finally:
            process.terminate()


async def press(
    url: str,
    talks: Sequence[Talk],
    wanted: Sequence[tuple[str, str]],
    pid: int,
    *,
    clients: int,
    seconds: float,
    tokens: int,
) -> Load:
    """`clients` at once, each with one talk after another for `seconds`; what began is finished."""
    connections = Client(url)
    said: list[Said] = []
    memory: list[float] = []
    refused, start = 0, time.perf_counter()

    async def client(number: int) -> None:
        nonlocal refused
        random = np.random.default_rng(number)
        while time.perf_counter() - start < seconds:
            talk = int(random.integers(len(talks)))
            for turn in (1, 2):
                first = wanted[talk][0]
                while (answer := await connections.ask(talks[talk], talk, turn, first, tokens)) is None:
                    refused += 1
                    await asyncio.sleep(0.2)
                said.append(answer)
                if time.perf_counter() - start >= seconds:
                    break

    async def watch() -> None:
        while True:
            memory.append(resident_mb(family(pid)) or 0.0)
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(client(n) for n in range(clients)))
    took = time.perf_counter() - start
    watching.cancel()
    await connections.close()
    return Load(tuple(said), refused, tuple(memory), took)


def facts(load: Load, wanted: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The numbers of a load: answers, wrong ones, percentiles in ms, memory in MB."""
    wrong = [one for one in load.said if one.text != wanted[one.talk][one.turn - 1]]
    percentiles = {
        name: {f"p{p}": float(np.percentile([getattr(one, name) for one in load.said], p)) for p in PERCENTILES}
        for name in ("queue_ms", "ttft_ms", "total_ms")
    }
    half = load.memory_mb[len(load.memory_mb) // 2 :]
    return {
        "answers": len(load.said),
        "wrong": len(wrong),
        "wrong_examples": [
            {"talk": one.talk, "turn": one.turn, "wanted": wanted[one.talk][one.turn - 1], "got": one.text}
            for one in wrong[:5]
        ],
        "refused_429": load.refused,
        "seconds": load.seconds,
        "answers_per_s": len(load.said) / load.seconds,
        "pieces_per_s": sum(one.pieces for one in load.said) / load.seconds,
        **percentiles,
        "memory_mb": {
            "first": load.memory_mb[0],
            "middle": half[0],
            "last": load.memory_mb[-1],
            "highest": max(load.memory_mb),
            "mb_per_minute_in_second_half": _slope(half),
        },
        "memory_mb_by_second": [round(one, 1) for one in load.memory_mb],
    }


async def turns(url: str, talks: Sequence[Talk], tokens: int) -> dict[str, float]:
    """One client: medians of the time to the first token, on a picture that is new and in the second turn about it."""
    connections = Client(url)
    pairs = [await connections.first_token_ms(talk, tokens) for talk in talks]
    await connections.close()
    first, second = (float(np.median(column)) for column in zip(*pairs, strict=True))
    return {"first_turn_ms": first, "second_turn_ms": second, "times_faster": first / second, "of": len(pairs)}


def _slope(values: Sequence[float]) -> float:
    return float(np.polyfit(np.arange(len(values)), values, 1)[0] * 60) if len(values) > 2 else 0.0


def command(
    bundle: Annotated[Path, typer.Argument(help="A bundle of the trained demo, as vlm-export writes it.")],
    clients: Annotated[int, typer.Option(min=1)] = 64,
    seconds: Annotated[float, typer.Option(min=0.1)] = 60.0,
    pictures: Annotated[int, typer.Option(min=2, help="Different pictures, drawn as the demo's held-out ones.")] = 40,
    conversations: Annotated[int, typer.Option(min=1, help="Of the server: KV caches.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 48,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    engine: Annotated[str | None, typer.Option(help="As for vlm-serve.")] = None,
    save: Annotated[bool, typer.Option("--save", help=f"Write the numbers into {report.RESULTS}.")] = False,
) -> None:
    """Load the server with clients that hold conversations of two turns about pictures; exit code 1 for a wrong answer.

    A third of the talks are kept for one client alone, before the load: each picture is new to the server then.
    """
    console = Console()
    engine_options = () if engine is None else ("--engine", engine)
    alone, crowd = talks_of(pictures)
    wanted = references(bundle, crowd, threads, tokens, engine)
    options = ("--threads", threads, "--queue", clients, "--conversations", conversations, *engine_options)
    with serving(bundle, options) as (url, pid):
        ratio = asyncio.run(turns(url, alone, tokens))
        load = asyncio.run(press(url, crowd, wanted, pid, clients=clients, seconds=seconds, tokens=tokens))
        found, counted = facts(load, wanted), metrics(url)
    _show(console, found, ratio, counted)
    if save:
        data = report.record(
            "server-load",
            bundle=bundle.name,
            clients=clients,
            conversations=conversations,
            threads=threads,
            load=found,
            turns=ratio,
            metrics=counted,
        )
        console.print(str(report.save(data)))
    if found["wrong"]:
        raise CheckError(f"{found['wrong']} of {found['answers']} answers are not those made alone")


def _show(console: Console, found: Mapping[str, Any], ratio: Mapping[str, float], counted: Mapping[str, float]) -> None:
    console.print(
        f"{found['answers']} answers in {found['seconds']:.1f} s ({found['answers_per_s']:.1f}/s), "
        f"{found['wrong']} wrong, {found['refused_429']} refused"
    )
    for name, title in (("queue_ms", "in the queue"), ("ttft_ms", "to the first token"), ("total_ms", "to the end")):
        console.print(f"{title}, ms: " + ", ".join(f"{p} {value:.0f}" for p, value in found[name].items()))
    memory = found["memory_mb"]
    console.print(
        f"memory, MB: {memory['first']:.0f} at first, {memory['middle']:.0f} in the middle, {memory['last']:.0f} at "
        f"last ({memory['mb_per_minute_in_second_half']:+.1f} a minute in the second half)"
    )
    console.print(
        f"one client, ms to the first token: {ratio['first_turn_ms']:.1f} in the first turn, "
        f"{ratio['second_turn_ms']:.1f} in the second: {ratio['times_faster']:.1f} times faster "
        f"(medians of {ratio['of']:.0f})"
    )
    console.print(", ".join(f"{name} {value:.0f}" for name, value in counted.items()))


if __name__ == "__main__":
    from vlm_models.command import run

    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
