"""Timing that means something on a shared machine: an idle gate, interleaved repeats, medians of quiet repeats."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Rep = Callable[[int], Mapping[str, float]]
"""One repeat: takes its number, returns what was measured by name."""
Watch = Callable[[str, int, int], None]
"""Called with (who, done, of) before each repeat."""

QUIET = 0.08  # share of the machine's cores that others may use in a quiet repeat
_ENOUGH = 3  # quiet repeats that a median needs; with fewer all repeats count


@dataclass(frozen=True)
class Stat:
    """Of one number over the repeats: median (of the quiet ones where there are three), best, how many were quiet."""

    median: float
    best: float
    worst: float
    quiet: int
    of: int


def busy_seconds() -> float:
    """CPU seconds that all processes have used since boot; 0 where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return 0.0
    ticks = [int(field) for field in fields]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def wait_idle(limit_s: float) -> bool:
    """Wait until the machine was idle for half a second, `limit_s` at most; says whether it was."""
    end = time.monotonic() + limit_s
    cores = os.cpu_count() or 1
    while time.monotonic() < end:
        before = busy_seconds()
        time.sleep(0.5)
        if busy_seconds() - before < QUIET * 0.5 * cores:
            return True
    return False


def interleave(
    reps: Mapping[str, Rep], repeats: int, *, idle_s: float, watch: Watch = lambda who, done, of: None
) -> dict[str, dict[str, Stat]]:
    """Run each of `reps` once to warm up and then `repeats` times in turn: name → number → Stat.

    Before each repeat the machine must be idle, or `idle_s` has passed.
    """
    taken: dict[str, list[tuple[Mapping[str, float], bool]]] = {name: [] for name in reps}
    cores = os.cpu_count() or 1
    total = len(reps) * (repeats + 1)
    for number in range(repeats + 1):
        for name, rep in reps.items():
            watch(name, sum(map(len, taken.values())), total)
            if number:
                wait_idle(idle_s)
            busy, start, own = busy_seconds(), time.perf_counter(), _children_seconds()
            values = rep(number)
            wall = time.perf_counter() - start
            others = busy_seconds() - busy - (_children_seconds() - own)
            taken[name].append((values, others < QUIET * cores * wall))
    watch("", total, total)
    return {name: _stats(runs[1:]) for name, runs in taken.items()}


def ratio(results: Mapping[str, Mapping[str, Stat]], ours: str, theirs: str, number: str) -> float:
    """Our median over theirs."""
    return results[ours][number].median / results[theirs][number].median


def _stats(runs: list[tuple[Mapping[str, float], bool]]) -> dict[str, Stat]:
    quiet = [values for values, was_quiet in runs if was_quiet]
    counted = quiet if len(quiet) >= _ENOUGH else [values for values, _ in runs]
    stats = {}
    for name in counted[0]:
        numbers = sorted(values[name] for values in counted)
        middle = len(numbers) // 2
        median = numbers[middle] if len(numbers) % 2 else (numbers[middle - 1] + numbers[middle]) / 2
        # Rates are better when higher, times and sizes when lower.
        low, high = numbers[0], numbers[-1]
        best, worst = (high, low) if name.endswith("_per_s") else (low, high)
        stats[name] = Stat(median, best, worst, len(quiet), len(runs))
    return stats


def _children_seconds() -> float:
    """CPU seconds of this process and of its living children."""
    pid, total = os.getpid(), time.process_time()
    tick = os.sysconf("SC_CLK_TCK")
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return total
    for child in children:
        try:
            fields = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / tick
    return total
