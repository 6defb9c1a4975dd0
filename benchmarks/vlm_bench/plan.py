"""What a command asks for, and the doing of it: measure, ask, compare stages, write everything that was wished."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vlm_bench import tables
from vlm_bench.csv_file import write_csv
from vlm_bench.entries import Chosen, choose_bundles
from vlm_bench.peer import peer_contestants
from vlm_bench.pictures import find_pictures
from vlm_bench.quality import with_accuracy, with_drift
from vlm_bench.report import RESULTS
from vlm_bench.results import Results, Settings, readable
from vlm_bench.results_file import write_results
from vlm_bench.run import measure
from vlm_bench.stages import QUESTION
from vlm_models.errors import InputError
from vlm_runtime.engine import Options, thread_count

NOISE = "noise"
_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class Plan:
    """The options of the command, by their names there; `drift` None is as its help says."""

    bundles: tuple[Path, ...]
    images: tuple[Path, ...] = ()
    prompts: Path | None = None
    engines: tuple[str, ...] = ()
    runs: int = 5
    threads: int | None = None
    max_new_tokens: int = 64
    idle_s: float = 8.0
    peers: tuple[str, ...] = ()
    peer_cache: Path | None = None
    checkpoint: Path | None = None
    questions: str | None = None
    drift: bool | None = None
    device: str | None = None
    device_binaries: Path | None = None
    json_file: Path | None = None
    html_file: Path | None = None
    csv_file: Path | None = None
    save: bool = False


def bench(plan: Plan, console: Console) -> Results:
    """Carry out the plan. JSON is written from the start on; Ctrl-C leaves a valid partial file and shows it."""
    _check(plan)
    latest: list[Results] = []

    def keep(results: Results) -> None:
        latest[:] = [results]
        if plan.json_file is not None:
            write_results(plan.json_file, results)

    try:
        results = _on_device(plan, console, keep) if plan.device else _here(plan, console, keep)
    except KeyboardInterrupt:
        if latest and latest[0].rows:
            console.print(tables.report(latest[0]))
        raise
    keep(results)
    console.print(tables.report(results))
    if plan.csv_file is not None:
        write_csv(plan.csv_file, results)
    if plan.html_file is not None:
        from vlm_bench import html

        html.write_html(plan.html_file, results)
    if plan.save:
        RESULTS.mkdir(parents=True, exist_ok=True)
        console.print(str(write_results(RESULTS / f"bundles-{results.created[:10]}.json", results)))
    return results


def read_prompts(file: Path | None) -> tuple[str, ...]:
    """The lines of a UTF-8 file that are not blank; the usual question where there is no file. Raises InputError."""
    if file is None:
        return (QUESTION,)
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise InputError(f"{file} is larger than {_MAX_BYTES >> 20} MiB: give one question a line")
        text = file.read_text("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {readable(file)}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{readable(file)} is not UTF-8: give one question a line, in UTF-8") from None
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise InputError(f"{readable(file)} holds no questions: write one a line")
    return lines


def _check(plan: Plan) -> None:
    """What can be refused before anything takes time."""
    for file in (plan.json_file, plan.html_file, plan.csv_file):
        if file is not None and not file.absolute().parent.is_dir():
            raise InputError(f"cannot write {readable(file)}: its folder does not exist")
        if file is not None and file.is_dir():
            raise InputError(f"cannot write {readable(file)}: it is a folder")
    if plan.device and (plan.peers or plan.checkpoint or plan.drift):
        raise InputError("--peer, --checkpoint and --drift need this machine: leave them out with --device")
    if plan.device_binaries and not plan.device:
        raise InputError("--device-binaries are for a phone: give --device adb://SERIAL too")
    if plan.checkpoint is not None and not (plan.checkpoint / "config.json").is_file():
        raise InputError(f"{readable(plan.checkpoint)} has no config.json: give a checkpoint folder")
    if plan.html_file is not None:
        from vlm_bench import html

        html.require()


def _here(plan: Plan, console: Console, keep: Callable[[Results], None]) -> Results:
    from vlm_bench.questions import read_questions

    threads = plan.threads if plan.threads is not None else thread_count(Options())
    prompts, images = read_prompts(plan.prompts), find_pictures(plan.images)
    questions = read_questions(plan.questions) if plan.questions is not None else None
    chosen, skipped = choose_bundles(plan.bundles, plan.engines, threads)
    peers, absent = peer_contestants(plan.peers, plan.checkpoint, threads, plan.peer_cache, _say(console))
    settings = Settings(
        threads=threads,
        runs=plan.runs,
        max_new_tokens=plan.max_new_tokens,
        images=tuple(map(readable, images)) or (NOISE,),
        prompts=prompts,
        engines=plan.engines,
        idle_s=plan.idle_s,
    )
    results = measure(
        [*(one.contestant for one in chosen), *peers],
        images,
        prompts,
        settings,
        command=_typed(),
        skipped=[*skipped, *absent],
        save=keep,
        watch=_watch(console),
    )
    able = [one for one in chosen if any(row.name == one.name for row in results.rows)]
    if questions is not None:
        results = with_accuracy(results, able, questions, plan.checkpoint, _watch(console))
        keep(results)
    if _wants_drift(plan, able):
        results = with_drift(results, able, images, prompts, plan.checkpoint, _watch(console))
    return dataclasses.replace(results, complete=True)


def _wants_drift(plan: Plan, able: Sequence[Chosen]) -> bool:
    if plan.drift is not None:
        return plan.drift
    return plan.checkpoint is not None or (plan.html_file is not None and len(able) > 1)


def _on_device(plan: Plan, console: Console, keep: Callable[[Results], None]) -> Results:
    from vlm_bench.devices.device import measure_on
    from vlm_bench.devices.job import Job

    assert plan.device is not None
    job = Job(
        bundles=plan.bundles,
        images=plan.images,
        prompts=plan.prompts,
        questions=plan.questions,
        engines=plan.engines,
        runs=plan.runs,
        max_new_tokens=plan.max_new_tokens,
        threads=plan.threads,
        idle_s=plan.idle_s,
        typed=_typed(),
    )
    return measure_on(plan.device, job, say=_say(console), keep=keep, binaries=plan.device_binaries)


def _typed() -> str:
    """The line that was typed."""
    return readable(shlex.join(["vlm-bench", *sys.argv[1:]]))


def _say(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(Text(line, "dim"))


def _watch(console: Console) -> Callable[[str, int, int], None]:
    """Says on a terminal what is running; a line each, as a spinner would take part in what is measured."""

    def watch(who: str, done: int, of: int) -> None:
        if who and console.is_terminal:
            console.print(Text(f"{done}/{of} {who}", "dim"))

    return watch
