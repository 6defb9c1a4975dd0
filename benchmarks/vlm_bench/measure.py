"""Timing that means something on a shared machine: an idle gate, interleaved repeats, medians of quiet repeats."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

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


@dataclass(frozen=True)
class Taken:
    """What one repeat measured, and whether the machine was quiet meanwhile."""

    values: Mapping[str, float]
    quiet: bool


Run = TypeVar("Run", bound=Taken)


def take(rep: Rep, number: int) -> Taken:
    """Run one repeat and watch what other processes use of the machine."""
    cores = os.cpu_count() or 1
    busy, start, own = busy_seconds(), time.perf_counter(), own_seconds()
    values = rep(number)
    wall = time.perf_counter() - start
    others = busy_seconds() - busy - (own_seconds() - own)
    return Taken(values, others < QUIET * cores * wall)


def interleave(
    reps: Mapping[str, Rep], repeats: int, *, idle_s: float, watch: Watch = lambda who, done, of: None
) -> dict[str, dict[str, Stat]]:
    """Run each of `reps` once to warm up and then `repeats` times in turn: name → number → Stat.

    Before each repeat the machine must be idle, or `idle_s` has passed.
    """
    taken: dict[str, list[Taken]] = {name: [] for name in reps}
    total = len(reps) * (repeats + 1)
    for number in range(repeats + 1):
        for name, rep in reps.items():
            watch(name, sum(map(len, taken.values())), total)
            if number:
                wait_idle(idle_s)
            taken[name].append(take(rep, number))
    watch("", total, total)
    return {name: stats(runs[1:]) for name, runs in taken.items()}


def ratio(results: Mapping[str, Mapping[str, Stat]], ours: str, theirs: str, number: str) -> float:
    """Our median over theirs."""
    return results[ours][number].median / results[theirs][number].median


def counted(runs: Sequence[Run]) -> list[Run]:
    """The repeats that count: the quiet ones where there are three, else all."""
    quiet = [run for run in runs if run.quiet]
    return quiet if len(quiet) >= _ENOUGH else list(runs)


def stats(runs: Sequence[Taken]) -> dict[str, Stat]:
    """Number → Stat over at least one repeat."""
    values, quiet = [run.values for run in counted(runs)], sum(run.quiet for run in runs)
    found = {}
    for name in values[0]:
        numbers = sorted(one[name] for one in values)
        # Rates are better when higher, times and sizes when lower.
        low, high = numbers[0], numbers[-1]
        best, worst = (high, low) if name.endswith("_per_s") else (low, high)
        found[name] = Stat(statistics.median(numbers), best, worst, quiet, len(runs))
    return found


def noisy(runs: Sequence[Taken]) -> bool:
    """Whether too few repeats were quiet for their numbers to mean anything."""
    return sum(run.quiet for run in runs) < min(_ENOUGH, len(runs))


def own_seconds() -> float:
    """CPU seconds of this process and of all that it started, directly or not."""
    ended = os.times()
    total = time.process_time() + ended.children_user + ended.children_system
    tick = os.sysconf("SC_CLK_TCK")
    for pid in descendants(os.getpid()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rsplit(")", 1)[1].split()
        except OSError:
            continue
        # Its own, and of those of its children that have ended.
        total += sum(map(int, fields[11:15])) / tick
    return total


def descendants(pid: int) -> list[int]:
    """The living processes that `pid` started, and theirs; none where the system does not tell."""
    found = []
    for file in Path("/proc").glob(f"{pid}/task/*/children"):
        try:
            children = [int(child) for child in file.read_text().split()]
        except OSError:
            continue
        found += [one for child in children for one in (child, *descendants(child))]
    return found
