"""The smallest recipe that is good enough, or the best that is small enough.

Starting at fp16 one group of layers after the other is made coarser, always the one that loses least for each byte it
saves, until all are at their smallest: a path of recipes. What single groups lose is added up to find the path; which
of its recipes is taken is measured, with the weights as an algorithm decides them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_export.goal import MAX_KL
from vlm_export.quality import Quality
from vlm_export.sensitivity import Choice, Effect, Group, recipe_of
from vlm_models.errors import CheckError, InputError
from vlm_quant.recipe import Recipe

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Point:
    """One recipe of the path: its bytes, the bytes that one decoded token reads, and the KL that its groups add up to.

    `quality` is what was measured, None where nothing was.
    """

    recipe: Recipe
    bytes: int
    read: int
    predicted: float
    quality: Quality | None = None

    def plain(self) -> dict[str, Any]:
        """Plain values for a report."""
        told = {"recipe": str(self.recipe), "bytes": self.bytes, "bytes_read_per_token": self.read}
        return {**told, "predicted_kl": self.predicted, **({} if self.quality is None else self.quality.numbers())}


Measure = Callable[[Recipe], Quality]


def parse_size(text: str) -> int:
    """Bytes of "120MB", "1.5 GiB", "90000000". Raises InputError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or found[2].upper() not in _UNITS or not float(found[1]):
        raise InputError(f"budget {text!r} is no size: write it as 120MB, 1.5GB, 100MiB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def path(found: Sequence[Group], effects: Sequence[Effect], fixed: int) -> list[Point]:
    """From all groups at their finest to all at their smallest, one group coarser at each step."""
    lost = {(e.group, e.precision): e.quality.mean_kl for e in effects}
    lost |= {(group, group.steps[0]): 0.0 for group in found}
    choice = {group: group.steps[0] for group in found}
    points = [_point(choice, lost, fixed)]
    while True:
        best: tuple[float, Group, int] | None = None
        for group in found:
            here = choice[group]
            for i, step in enumerate(group.steps[group.steps.index(here) + 1 :], group.steps.index(here) + 1):
                saved = group.bytes(here) - group.bytes(step)
                if saved > 0:
                    rate = (lost[group, step] - lost[group, here]) / saved
                    if best is None or rate < best[0]:
                        best = rate, group, i
        if best is None:
            return points
        _, group, i = best
        choice = {**choice, group: group.steps[i]}
        points.append(_point(choice, lost, fixed))


def within_budget(points: Sequence[Point], budget: int) -> Point:
    """The first recipe of the path that fits. Raises InputError saying the smallest size there is."""
    fitting = [point for point in points if point.bytes <= budget]
    if not fitting:
        least = min(points, key=lambda point: point.bytes)
        raise InputError(
            f"budget {budget / 1e6:g} MB cannot be met: the smallest that this model can be is "
            f"{math.ceil(least.bytes / 1e4) / 100:g} MB, with --precision '{least.recipe}'"
        )
    return fitting[0]


def within_kl(points: Sequence[Point], max_kl: float, measure: Callable[[int], float]) -> int:
    """The index of the smallest recipe whose measured KL is at most `max_kl`, by halving the path.

    `measure` takes an index. Raises CheckError where not even the first is good enough.
    """
    if not max_kl > 0:
        raise InputError(f"max KL {max_kl:g} cannot be: give nats above 0, such as {MAX_KL:g}")
    last = len(points) - 1
    if measure(last) <= max_kl:
        return last
    good, bad = -1, last
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if measure(middle) <= max_kl else (good, middle)
    if good < 0:
        raise CheckError(f"no recipe keeps KL at {max_kl:g}: {points[0].recipe} has {measure(0):.2g}; raise --max-kl")
    return good


def front(points: Sequence[Point]) -> list[Point]:
    """Of the measured points those that no other one beats in both size and KL, smallest first."""
    best, kept = float("inf"), []
    for point in sorted((p for p in points if p.quality is not None), key=lambda p: (p.bytes, _kl(p))):
        if _kl(point) < best:
            best = _kl(point)
            kept.append(point)
    return kept


def _kl(point: Point) -> float:
    return point.predicted if point.quality is None else point.quality.mean_kl


def _point(choice: Choice, lost: dict[tuple[Group, Any], float], fixed: int) -> Point:
    total = fixed + sum(group.bytes(precision) for group, precision in choice.items())
    read = sum(group.bytes(precision) for group, precision in choice.items() if group.part == "language")
    return Point(recipe_of(choice), total, read, sum(lost[item] for item in choice.items()))
