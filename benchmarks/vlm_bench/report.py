"""What a measurement leaves: a table on the console, and a JSON file with the machine it was made on."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlm_bench import environment
from vlm_bench.measure import Stat, Watch

RESULTS = Path("benchmarks/results")
Results = Mapping[str, Mapping[str, Stat]]


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system, versions, and the time."""
    place = environment.describe()
    names = ("processor", "cores", "memory_gb", "system", "python", "packages")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**{name: getattr(place, name) for name in names}, "date": now}


def record(name: str, results: Results | None = None, **rest: Any) -> dict[str, Any]:
    """One measurement as plain values: `results` by contestant and number, and whatever else belongs to it."""
    plain = {
        who: {number: dataclasses.asdict(stat) for number, stat in numbers.items()}
        for who, numbers in (results or {}).items()
    }
    return {"benchmark": name, "machine": machine(), **rest, **({"results": plain} if plain else {})}


def save(data: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write folder/<benchmark>-<date>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{data['benchmark']}-{data['machine']['date'][:10]}.json"
    path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")
    return path


def table(title: str, results: Results, columns: Mapping[str, str]) -> Table:
    """Contestants down, numbers across: medians. `columns`: number → heading."""
    out = Table(title=title)
    out.add_column("")
    for heading in columns.values():
        out.add_column(heading, justify="right")
    out.add_column("quiet", justify="right")
    for who, numbers in results.items():
        first = next(iter(numbers.values()))
        cells = [_cell(numbers[number]) if number in numbers else "not measured" for number in columns]
        out.add_row(who, *cells, f"{first.quiet} of {first.of}")
    return out


def warn_if_loud(console: Console, results: Results) -> None:
    """Say so when other processes used the machine too much for the numbers to mean anything."""
    if any(stat.quiet < min(3, stat.of) for numbers in results.values() for stat in numbers.values()):
        console.print("[yellow]other processes were busy during most repeats: do not trust these times[/yellow]")


def status(console: Console) -> Watch:
    """A watcher for `interleave` that says on the console what is running."""

    def watch(who: str, done: int, of: int) -> None:
        if who and console.is_terminal:
            console.print(f"[dim]{done + 1}/{of} {who}[/dim]")

    return watch


def _cell(stat: Stat) -> str:
    return f"{stat.median:.{0 if stat.median >= 100 else 1 if stat.median >= 10 else 2}f}"
