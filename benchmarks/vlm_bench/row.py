"""From the replies of a contestant to its row: a mean for each repetition, medians over repetitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from vlm_bench.contestant import Contestant
from vlm_bench.measure import Stat, Taken, counted, noisy, stats
from vlm_bench.results import STAGES, Energy, LoadTimes, Percentiles, Row

_COUNTS = ("image_tokens", "prompt_tokens", "new_tokens", "tiles")
_JOULES = "joules"


@dataclass(frozen=True)
class Repetition(Taken):
    """One answer for each case: means in `values`, milliseconds of all tokens."""

    token_ms: tuple[float, ...]


@dataclass(frozen=True)
class Facts:
    """What is known of a contestant beside its repetitions, as in Row."""

    engines: Mapping[str, str]
    precision: str | None
    bytes_on_disk: int | None
    load_ms: LoadTimes
    peak_rss_mb: float | None = None
    gpu_mb: float | None = None
    bytes_read: int | None = None
    notes: tuple[str, ...] = ()


def means(replies: Sequence[Mapping[str, Any]], joules: Sequence[float | None]) -> dict[str, float]:
    """The numbers of one repetition: a mean over its answers (`replies` of the protocol) of whatever all of them have.

    Stages are "stage NAME", with "stage other" as what is left of the wall time; "tokens_per_s" is of the tokens after
    the first.
    """
    found: dict[str, float] = {}
    for name in ("wall_ms", "ttft_ms", *_COUNTS):
        found |= _mean(name, [reply.get(name) for reply in replies])
    stages = [reply.get("stages_ms") or {} for reply in replies]
    for name in STAGES[:-1]:
        found |= _mean(f"stage {name}", [stage.get(name) for stage in stages])
    known = [value for name, value in found.items() if name.startswith("stage ")]
    if known:
        found["stage other"] = found["wall_ms"] - sum(known)
    times = [time for reply in replies for time in reply.get("token_ms") or ()]
    if times and sum(times) > 0:
        found["tokens_per_s"] = len(times) / sum(times) * 1e3
    return found | _mean(_JOULES, joules)


def make_row(contestant: Contestant, facts: Facts, repetitions: Sequence[Repetition], source: str | None) -> Row:
    """The row of at least one repetition. `source` is that of the energy."""
    found = _stats(repetitions)
    tokens = [time for repetition in counted(repetitions) for time in repetition.token_ms]
    new_tokens = found["new_tokens"].median
    joules = found[_JOULES].median if source and _JOULES in found else None
    counts = {name: found[name].median if name in found else None for name in _COUNTS}
    return Row(
        name=contestant.name,
        kind=contestant.kind,
        engines=facts.engines,
        precision=facts.precision,
        bytes_on_disk=facts.bytes_on_disk,
        stages_ms={name: found[f"stage {name}"] for name in STAGES if f"stage {name}" in found},
        ttft_ms=found.get("ttft_ms"),
        token_ms=Percentiles(*map(float, np.percentile(tokens, (50, 95, 99)))) if tokens else None,
        tokens_per_s=found.get("tokens_per_s"),
        wall_ms=found["wall_ms"],
        load_ms=facts.load_ms,
        peak_rss_mb=facts.peak_rss_mb,
        gpu_mb=facts.gpu_mb,
        bytes_read=facts.bytes_read,
        energy=Energy(joules, joules / new_tokens, source) if joules and source else None,
        noisy=noisy(repetitions),
        quiet=sum(repetition.quiet for repetition in repetitions),
        of=len(repetitions),
        image_tokens=counts["image_tokens"],
        prompt_tokens=counts["prompt_tokens"],
        new_tokens=new_tokens,
        tiles=counts["tiles"],
        notes=(*contestant.notes, *facts.notes),
    )


def _stats(repetitions: Sequence[Repetition]) -> dict[str, Stat]:
    """Medians are those of one repetition, that of the median wall time (of two, their mean): so stages add up."""
    order = sorted((one.values for one in counted(repetitions)), key=lambda values: values["wall_ms"])
    middle = order[(len(order) - 1) // 2 : len(order) // 2 + 1]
    return {
        name: replace(stat, median=fmean(values[name] for values in middle))
        for name, stat in stats(repetitions).items()
    }


def _mean(name: str, values: Sequence[float | None]) -> dict[str, float]:
    numbers = [float(value) for value in values if value is not None]
    return {name: fmean(numbers)} if values and len(numbers) == len(values) else {}
