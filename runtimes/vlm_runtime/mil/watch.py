"""Looking into a run: the ranges of its values, and where it first leaves a reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm_runtime.mil.executor import Executor, State
from vlm_runtime.mil.package import open_package
from vlm_runtime.mil.values import Array

_PRECISION = ("_cast_fp16", "_cast_fp32", "_to_fp16", "_promoted")  # what coremltools adds to a name it casts


@dataclass(frozen=True)
class Drift:
    """The first value that left the reference: its name, the operation that gave it, the relative L2 between them."""

    name: str
    op: str
    relative_l2: float


def ranges(
    package: str | Path, samples: Iterable[Mapping[str, Array]], *, function: str | None = None
) -> dict[str, tuple[float, float]]:
    """Least and largest value of each float input and result over all samples; a state starts anew for each.

    Values that are no numbers, and a mask's infinities, are left out.
    """
    executor = Executor(open_package(package))
    found: dict[str, tuple[float, float]] = {}

    def see(op: str, name: str, value: Array) -> None:
        if value.dtype.kind != "f" or not value.size:
            return
        low, high = float(value.min()), float(value.max())
        if not np.isfinite((low, high)).all():
            finite = value[np.isfinite(value)]
            if not finite.size:
                return
            low, high = float(finite.min()), float(finite.max())
        before = found.get(name, (low, high))
        found[name] = min(low, before[0]), max(high, before[1])

    for sample in samples:
        executor.run(sample, executor.new_state(function), function=function, observer=see)
    return found


def values(
    executor: Executor, feeds: Mapping[str, Array], state: State | None = None, *, function: str | None = None
) -> dict[str, Array]:
    """A copy of every float value that a run computes, by name in order: a reference for `first_drift`."""
    found: dict[str, Array] = {}

    def see(op: str, name: str, value: Array) -> None:
        if value.dtype.kind == "f" and op != "input":
            found[name] = np.array(value, np.float32)

    executor.run(feeds, state, function=function, observer=see)
    return found


def first_drift(
    executor: Executor,
    feeds: Mapping[str, Array],
    reference: Mapping[str, Array],
    state: State | None = None,
    *,
    function: str | None = None,
    limit: float = 1e-2,
) -> Drift | None:
    """The first result farther than `limit` (relative L2) from the reference's value of the same name and shape.

    `reference` is `values` of the same program run exactly or of its float32 twin, or what hooks in another framework
    gave; suffixes that coremltools adds for a precision do not count. None: all that could be compared agree.
    """
    wanted = {plain(name): value for name, value in reference.items()}
    found: list[Drift] = []

    def see(op: str, name: str, value: Array) -> None:
        want = wanted.get(plain(name))
        if found or op == "input" or want is None or want.shape != value.shape or value.dtype.kind != "f":
            return
        distance = relative_l2(value, want)
        if not distance <= limit:
            found.append(Drift(name, op, distance))

    executor.run(feeds, state, function=function, observer=see)
    return found[0] if found else None


def relative_l2(value: Array, want: Array) -> float:
    """‖value - want‖ / ‖want‖ in float64."""
    size = float(np.linalg.norm(want.astype(np.float64)))
    return float(np.linalg.norm(value.astype(np.float64) - want.astype(np.float64))) / (size or 1.0)


def plain(name: str) -> str:
    """A value's name without what a change of precision added to it."""
    while True:
        shorter = name
        for ending in _PRECISION:
            shorter = shorter.removesuffix(ending)
        if shorter == name:
            return name
        name = shorter
