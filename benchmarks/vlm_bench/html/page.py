"""The page: results through a template, with charts and pictures inside, nothing to load and no script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_bench.html import answers, numbers
from vlm_bench.results import NOT_MEASURED, STAGES, Accuracy, Drift, Results, Row
from vlm_bench.results_file import write_whole
from vlm_export.parity import STAGES as PARITY_STAGES
from vlm_export.target import not_installed

if TYPE_CHECKING:
    from jinja2 import Environment

    from vlm_bench.html.charts import Point

STAGE_LABELS = {
    "preprocess": "pixels",
    "vision": "vision",
    "projector": "projector",
    "splice": "splice",
    "prefill": "prefill",
    "first_token": "first token",
    "decode": "decode",
    "other": "other",
}
_OPTIONAL = {"GPU memory": "gpu_mb", "energy": "energy"}
DRIFT_LABELS = dict(zip(PARITY_STAGES, ("pixels", "vision", "projector", "splice", "logits"), strict=True))


def require() -> None:
    """Raises DependencyError where matplotlib is not installed: to be called before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise not_installed(error, "--html", "bench") from error


def write_html(path: str | Path, results: Results) -> Path:
    """Write the page, whole or not at all. Raises DependencyError without matplotlib, InputError where it cannot be."""
    return write_whole(path, render(results).encode("utf-8", "replace"))


def render(results: Results) -> str:
    """The page as text; the pictures that paths name are read now."""
    require()
    asked, cases = answers.of_accuracy(results.accuracy), answers.of_drift(results.drift)
    page = _templates().get_template("page.html.jinja")
    return page.render(
        results=results,
        stages=STAGES,
        stage_labels=STAGE_LABELS,
        peers=best_peers(results.rows),
        absent=_absent(results.rows),
        charts=_charts(results),
        disputed=answers.by_picture(one for one in asked[: answers.LIMIT] if one.disputed),
        agreed=answers.by_picture(one for one in asked[: answers.LIMIT] if not one.disputed),
        asked=len(asked),
        cases=answers.by_picture(cases[: answers.LIMIT]),
        compared=len(cases),
        limit=answers.LIMIT,
        kinds=sorted({kind for one in results.accuracy for kind in one.kinds}),
        drift_labels=_drift_labels(results.drift),
        drift=drift_summary(results.drift),
        not_measured=NOT_MEASURED,
    )


def best_peers(rows: Sequence[Row]) -> dict[str, float]:
    """The lowest TTFT (ms) and the highest tokens/s of all peers, as far as there are any."""
    peers = [row for row in rows if row.kind == "peer"]
    first = [row.ttft_ms.median for row in peers if row.ttft_ms is not None]
    rates = [row.tokens_per_s.median for row in peers if row.tokens_per_s is not None]
    return {**({"ttft": min(first)} if first else {}), **({"rate": max(rates)} if rates else {})}


def _absent(rows: Sequence[Row]) -> list[str]:
    """What was measured of no contestant: a sentence says so, in place of a column."""
    return [name for name, field in _OPTIONAL.items() if all(getattr(row, field) is None for row in rows)]


def drift_summary(drift: Sequence[Drift]) -> dict[str, dict[str, Any]]:
    """By contestant: worst cosine of each stage, first stage that drifted, how many cases did and how many agree."""
    several = len({one.reference for one in drift}) > 1
    cases: dict[str, list[Drift]] = {}
    for one in drift:
        cases.setdefault(f"{one.name} beside {one.reference}" if several else one.name, []).append(one)
    return {name: _summary(mine) for name, mine in cases.items()}


def _summary(cases: Sequence[Drift]) -> dict[str, Any]:
    stages = list(dict.fromkeys(stage for case in cases for stage in case.stages))
    values = {stage: [case.stages[stage].cosine for case in cases if stage in case.stages] for stage in stages}
    # A stage without a number in one case has none at all: it is worse than any.
    worst = {
        stage: None if None in found else min(v for v in found if v is not None) for stage, found in values.items()
    }
    firsts = [stage for stage in stages if any(case.first == stage for case in cases)]
    return {
        "worst": worst,
        "first": firsts[0] if firsts else None,
        "in": sum(case.first is not None for case in cases),
        "of": len(cases),
        "equal": sum(case.answer == case.reference_answer for case in cases),
    }


def _drift_labels(drift: Sequence[Drift]) -> dict[str, str]:
    """Stages of the drift report in order, with what they are called."""
    stages = dict.fromkeys(stage for one in drift for stage in one.stages)
    return {stage: DRIFT_LABELS.get(stage, stage) for stage in stages}


def _charts(results: Results) -> dict[str, Any]:
    """Charts by name, each {"wide": …, "narrow": …}; none where nothing was measured that it could show."""
    from vlm_bench.drift import LIMIT
    from vlm_bench.html import charts

    made: dict[str, Any] = {}
    if any(row.ttft_ms is not None for row in results.rows):
        made["ttft"] = charts.first_token(results.rows)
    if any(row.tokens_per_s is not None for row in results.rows):
        made["decode"] = charts.decoding(results.rows)
    if points := _points(results):
        made["scatter"] = charts.scatter(points)
    if results.drift:
        worst = {name: one["worst"] for name, one in drift_summary(results.drift).items()}
        made["drift"] = charts.drifting(worst, _drift_labels(results.drift), LIMIT)
    return made


def _points(results: Results) -> list[Point]:
    """One for each row with a size, its accuracy from the set that most contestants were asked."""
    from vlm_bench.html.charts import Point

    sets = [one.set for one in results.accuracy]
    common = max(sets, key=sets.count, default=None)
    known: dict[str, Accuracy] = {one.name: one for one in results.accuracy if one.set == common}
    points = []
    for row in results.rows:
        if row.bytes_on_disk is not None:
            one = known.get(row.name)
            exact, interval = (one.exact, one.interval) if one is not None else (None, None)
            ttft = row.ttft_ms.median if row.ttft_ms is not None else None
            points.append(Point(row.name, row.bytes_on_disk / 2**20, ttft, exact, interval))
    return points


def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vlm_bench", "html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("number", "spread", "megabytes", "percent", "cosine", "decimals", "times")
    environment.filters |= {name: getattr(numbers, name) for name in names}
    return environment
