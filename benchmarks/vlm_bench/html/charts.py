"""The charts of a report, each as a wide and a narrow SVG: latency by stage, decoding, size and accuracy, drift."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_bench.html.drawing import (
    BLUE,
    DASHES,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SIZES,
    SKY,
    YELLOW,
    Size,
    figure,
    key,
    look,
    short,
    svg,
)
from vlm_bench.results import NOT_MEASURED, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stage → how it is drawn and called; patterns tell neighbours apart without colour.
FIRST_TOKEN: Mapping[str, tuple[str, str, str]] = {
    "preprocess": (SKY, "", "pixels"),
    "vision": (BLUE, "////", "vision"),
    "projector": (YELLOW, "...", "projector"),
    "splice": (PURPLE, "xxx", "splice"),
    "prefill": (ORANGE, "", "prefill"),
    "first_token": (GREEN, "\\\\\\\\", "first token"),
}
SMALLEST = 1e-9  # of 1 - cosine: below it is rounding of float64 sums
_UNTOLD = 0.02  # share of a TTFT that its stages may leave without a word
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_BAR = 46  # CSS pixels of one contestant: a line of text and a bar


@dataclass(frozen=True)
class Point:
    """One contestant of the scatter: MB on disk, TTFT in ms, share of exact answers with its interval."""

    name: str
    size_mb: float
    ttft_ms: float | None
    exact: float | None
    interval: tuple[float, ...] | None


def first_token(rows: Sequence[Row]) -> dict[str, str]:
    """Stacked bars: the stages from picture to first token, one bar a contestant, the measured TTFT beside it."""

    def draw(axes: Axes, size: Size) -> None:
        for at, row in enumerate(rows):
            left = 0.0
            for stage, (color, hatch, _) in FIRST_TOKEN.items():
                if (stat := row.stages_ms.get(stage)) is not None:
                    axes.barh(at, stat.median, 0.5, left, color=color, hatch=hatch, edgecolor=INK, linewidth=0.5)
                    left += stat.median
            whole = row.ttft_ms.median if row.ttft_ms is not None else left
            if whole - left > _UNTOLD * whole:
                axes.barh(at, whole - left, 0.5, left, color="none", edgecolor=INK, linewidth=1, linestyle="--")
            text = NOT_MEASURED if row.ttft_ms is None else f"{_round(row.ttft_ms.median)} ms"
            _label(axes, at, max(left, whole), text)
        axes.set_xlabel("ms from question and picture to the first token")
        _legend(axes, size)

    return _bars("ttft", [row.name for row in rows], draw)


def decoding(rows: Sequence[Row]) -> dict[str, str]:
    """Bars: tokens per second, with the 50th and 99th percentile of the time between tokens."""
    known = [row for row in rows if row.tokens_per_s is not None]

    def draw(axes: Axes, size: Size) -> None:
        for at, row in enumerate(known):
            assert row.tokens_per_s is not None
            rate, times = row.tokens_per_s.median, row.token_ms
            axes.barh(at, rate, 0.5, color=BLUE, edgecolor=INK, linewidth=0.5)
            spread = f" (p99 {_round(times.p99)} ms)" if times is not None else ""
            _label(axes, at, rate, f"{_round(rate)}{spread}")
        axes.set_xlabel("tokens per second after the first")

    return _bars("decode", [row.name for row in known], draw)


def scatter(points: Sequence[Point]) -> dict[str, str]:
    """Accuracy over size and over latency, of those that have one; latency over size where none has."""
    asked = any(point.exact is not None for point in points)
    points = [point for point in points if (point.exact if asked else point.ttft_ms) is not None]
    panels = [("size_mb", "MB on disk"), ("ttft_ms", "ms to the first token")] if asked else [("size_mb", "MB on disk")]
    charts = {}
    for size in SIZES:
        beside = size.name == "wide"
        rows, columns = (1, len(panels)) if beside else (len(panels), 1)
        lines = math.ceil(len(points) / (3 if beside else 1))
        with figure(size, 270 * rows + 20 * lines + 20) as drawn:
            axes = drawn.subplots(rows, columns, squeeze=False, sharey=beside).ravel()
            for panel, (across, label) in zip(axes, panels, strict=True):
                for number, point in enumerate(points):
                    _point(panel, point, number, across, "exact" if asked else "ttft_ms")
                panel.set_xlabel(label)
                reach = max((getattr(point, across) or 0 for point in points), default=0)
                panel.set_xlim(0, 1.12 * reach or 1)
                panel.margins(y=0.12)
                panel.grid(linewidth=0.5)
                if panel is axes[0] or not beside:
                    panel.set_ylabel("exact answers, %" if asked else "ms to the first token")
            key(axes[0], 3 if beside else 1, [_handle(point.name, i) for i, point in enumerate(points)])
            charts[size.name] = svg(drawn, f"scatter-{size.name}")
    return charts


def drifting(
    worst: Mapping[str, Mapping[str, float | None]], labels: Mapping[str, str], limit: float
) -> dict[str, str]:
    """Lines: 1 - cosine by stage, the worst of all cases. `worst`: contestant → stage → cosine."""
    from matplotlib.ticker import NullLocator

    stages = list(labels)
    charts = {}
    for size in SIZES:
        columns = 3 if size.name == "wide" else 1
        with figure(size, 300 + 20 * math.ceil((len(worst) + 1) / columns)) as drawn:
            axes = drawn.subplots()
            for number, (name, cosines) in enumerate(worst.items()):
                known = [(at, cosines[stage]) for at, stage in enumerate(stages) if cosines.get(stage) is not None]
                axes.plot(
                    [at for at, _ in known],
                    [max(SMALLEST, 1 - value) for _, value in known if value is not None],
                    linestyle=DASHES[number % len(DASHES)],
                    label=short(name),
                    **look(number),
                )
            axes.axhline(1 - limit, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="limit of fp16 rounding")
            axes.set_yscale("log")
            axes.set_ylim(SMALLEST / 2, 2)
            axes.yaxis.set_major_formatter(lambda value, _: _power(value))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_xticks(range(len(stages)), [labels[stage] for stage in stages])
            if size.name == "narrow":
                axes.tick_params("x", rotation=35)
            axes.set_xlim(-0.2, len(stages) - 0.8)
            axes.set_ylabel("1 − cosine to the reference")
            axes.grid(axis="y", linewidth=0.5)
            key(axes, columns)
            charts[size.name] = svg(drawn, f"drift-{size.name}")
    return charts


def _bars(name: str, names: Sequence[str], draw: Any) -> dict[str, str]:
    """Horizontal bars, each under the name of its contestant, the first on top."""
    charts = {}
    for size in SIZES:
        with figure(size, _BAR * len(names) + 100) as drawn:
            axes = drawn.subplots()
            draw(axes, size)
            axes.set_yticks([])
            axes.set_ylim(len(names) - 0.6, -0.75)
            axes.spines["left"].set_visible(False)
            axes.margins(x=0)
            axes.set_xlim(0, axes.get_xlim()[1] * (1.16 if size.name == "wide" else 1.4))
            axes.grid(axis="x", linewidth=0.5)
            axes.set_axisbelow(True)
            for at, one in enumerate(names):
                axes.annotate(
                    short(one), (0, at - 0.25), (0, 3), textcoords="offset points", va="bottom", annotation_clip=False
                )
            charts[size.name] = svg(drawn, f"{name}-{size.name}")
    return charts


def _label(axes: Axes, at: int, x: float, text: str) -> None:
    axes.annotate(text, (x, at), (5, 0), textcoords="offset points", va="center", annotation_clip=False)


def _legend(axes: Axes, size: Size) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=color, hatch=hatch, edgecolor=INK, linewidth=0.5, label=label)
        for color, hatch, label in FIRST_TOKEN.values()
    ]
    key(axes, len(handles) if size.name == "wide" else 3, handles)


def _point(axes: Axes, point: Point, number: int, across: str, up: str) -> None:
    x, y = getattr(point, across), getattr(point, up)
    if x is None or y is None:
        return
    scale = 100 if up == "exact" else 1
    if up == "exact" and point.interval is not None:
        low, high = (abs(y - end) * scale for end in point.interval)
        axes.errorbar(x, y * scale, [[low], [high]], fmt="none", ecolor=FAINT, elinewidth=1.5, zorder=1)
    axes.plot(x, y * scale, linestyle="none", zorder=2, **look(number))
    axes.annotate(str(number + 1), (x, y * scale), (7, 5), textcoords="offset points")


def _handle(name: str, number: int) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", label=f"{number + 1} {short(name, 30)}", **look(number))


def _power(value: float) -> str:
    """A power of ten: 10⁻⁴."""
    return f"10{str(round(math.log10(value))).translate(_RAISED)}"


def _round(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
