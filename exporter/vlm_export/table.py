"""What the console shows: one progress bar per stage, and the parity table."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from vlm_export.parity import AT_LEAST, missed
from vlm_runtime.manifest import Manifest

_METRICS = {"cosine": "cosine", "max_abs": "max abs", "relative_l2": "rel. l2", "kl": "kl", "top1": "top 1"}


class Stages:
    """A bar for each stage that reports progress; `seconds` is how long each took. Use as a context manager."""

    def __init__(self, console: Console, shown: bool) -> None:
        columns = (TextColumn("{task.description:<16}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._bars = Progress(
            *columns, console=console, disable=not (shown and console.is_terminal), refresh_per_second=4
        )
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._running = ""
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> Stages:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self._finish()
        self._bars.stop()

    def __call__(self, stage: str, done: int, of: int) -> None:
        if stage not in self._tasks:
            self._finish()
            self._running = stage
            self._tasks[stage] = self._bars.add_task(stage, total=of)
            self._started[stage] = time.perf_counter()
        self.seconds[stage] = round(time.perf_counter() - self._started[stage], 3)
        self._bars.update(self._tasks[stage], completed=done, total=of)

    def _finish(self) -> None:
        """Stages follow one another: what ran until now is done."""
        if self._running:
            self.seconds[self._running] = round(time.perf_counter() - self._started[self._running], 3)
        for task in self._bars.tasks:
            self._bars.update(task.id, completed=task.total)


def parity_table(target: str, parity: Mapping[str, Any]) -> Table:
    """Stages down, metrics across, red where a threshold is missed."""
    table = Table(
        box=None, padding=(0, 1, 0, 0), header_style="bold underline", title_justify="left", caption_justify="left"
    )
    table.title = f"{target}: the bundle against the checkpoint"
    table.add_column("stage", no_wrap=True)
    for name in _METRICS.values():
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("allowed", no_wrap=True)
    table.add_column("", no_wrap=True)
    for stage, numbers in parity["stages"].items():
        bad = missed(numbers)
        cells = [_cell(numbers, metric, metric in bad) for metric in _METRICS]
        table.add_row(stage, *cells, _limits(numbers["threshold"]), "[red]FAIL[/]" if bad else "[green]ok[/]")
    greedy = parity["greedy"]
    table.caption = f"greedy tokens equal: {greedy['equal']} of {greedy['of']}; reference: {parity['reference']}"
    return table


def notes(manifest: Manifest, target: str) -> list[str]:
    """What a target has to say beyond its numbers: the notes of its parts, and of its own checks."""
    engines = [engine for part in manifest.parts.values() for engine in part.items()]
    told = [note for engine, part in engines if engine == target for note in part.details.get("notes", ())]
    checks = [check for check in manifest.parity[target].values() if isinstance(check, Mapping)]
    told += [check["note"] for check in checks if "note" in check]
    return [f"{target}: {note}" for note in dict.fromkeys(told)]


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _cell(numbers: Mapping[str, Any], metric: str, bad: bool) -> str:
    if metric not in numbers:
        return ""
    value = numbers[metric]
    text = "nan" if value is None or value != value else _digits(metric, value)
    return f"[red]{text}[/]" if bad else text


def _limits(threshold: Mapping[str, float]) -> str:
    signs = ((metric, "≥" if metric in AT_LEAST else "≤", limit) for metric, limit in threshold.items())
    return "\n".join(f"{_METRICS[metric]} {sign} {limit:g}" for metric, sign, limit in signs)


def _digits(metric: str, value: float) -> str:
    return f"{value:.6f}" if metric == "cosine" else f"{value:.0%}" if metric == "top1" else f"{value:.2g}"
