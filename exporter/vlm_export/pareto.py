"""What `vlm-export --sensitivity` shows and writes: tables, a JSON file, and the front of size, quality and latency."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from vlm_export.budget import Point, front
from vlm_export.recommend import Recommended
from vlm_export.target import not_installed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = ("sensitivity.json", "sensitivity.png", "recipe.txt")
_SMALLEST = 1e-6  # nats: below it a logarithmic axis shows rounding of float32


def check_pictures() -> None:
    """Raise DependencyError where matplotlib is not installed, before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise not_installed(error, "the picture of --sensitivity", "sensitivity") from error


def group_table(found: Recommended) -> Table:
    """Groups down, precisions across: KL of the group alone at that precision, and its size there."""
    table = _table("every group of layers alone, the rest as it is: KL in nats per answer token (size)")
    groups = list(dict.fromkeys(effect.group for effect in found.effects))
    precisions = list(dict.fromkeys(str(effect.precision) for effect in found.effects))
    table.add_column("group", no_wrap=True)
    for heading in (*precisions, "same token"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in groups:
        mine = {str(e.precision): e for e in found.effects if e.group is group}
        cells = [f"{mine[p].quality.mean_kl:.5f} ({_mb(mine[p].bytes)})" if p in mine else "" for p in precisions]
        worst = min(effect.quality.top1 for effect in mine.values())
        table.add_row(group.name, *cells, f"{worst:.1%}")
    table.caption = (
        f"measured on {found.pairs['probes']} held-out pairs, round-to-nearest; same token: the worst of all"
    )
    return table


def recipe_table(found: Recommended) -> Table:
    """The measured recipes, smallest first; those that no other one beats are marked."""
    table = _table("whole recipes, measured on other held-out pairs")
    for heading in ("", "#", "size", "read a token", "KL", "95 %", "same token", "exact answers"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    best = {str(point.recipe) for point in front(found.measured)}
    for number, point in enumerate(ordered(found), 1):
        assert point.quality is not None
        numbers = point.quality.numbers()
        low, high = numbers["kl_interval"]  # type: ignore[misc]
        mark = "→" if point.recipe == found.point.recipe else "·" if str(point.recipe) in best else ""
        cells = [_mb(point.bytes), _mb(point.read), f"{point.quality.mean_kl:.5f}", f"{low:.5f}–{high:.5f}"]
        shares = [f"{point.quality.top1:.1%}", f"{point.quality.accuracy:.1%}"]
        table.add_row(mark, str(number), *cells, *shares)
    table.caption = (
        f"{found.pairs['checks']} pairs, algorithm {found.algorithm['algorithm']}; → recommended, · on the front; "
        "read a token: bytes of weights, an estimate of decoding time, not a measurement"
    )
    return table


def ordered(found: Recommended) -> list[Point]:
    """The measured recipes, smallest first."""
    return sorted(found.measured, key=lambda point: point.bytes)


def write(found: Recommended, folder: Path) -> list[Path]:
    """sensitivity.json, sensitivity.png and recipe.txt, which holds what --precision takes."""
    check_pictures()
    folder.mkdir(parents=True, exist_ok=True)
    data, picture, recipe = (folder / name for name in NAMES)
    data.write_text(json.dumps(found.plain(), indent=1, ensure_ascii=False) + "\n", "utf-8")
    recipe.write_text(f"{found.point.recipe}\n", "utf-8")
    _draw(found, picture)
    return [data, picture, recipe]


def _draw(found: Recommended, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _front(left, found, "bytes", "weights, table and tokenizer, MB")
    _front(right, found, "read", "weights read for one token, MB (an estimate of decoding time)")
    left.set_ylabel("KL to the checkpoint, nats per answer token")
    left.legend(frameon=False)
    figure.suptitle(f"{found.goal}: {found.point.recipe}", fontsize=8, wrap=True)
    figure.savefig(path, dpi=150)


def _front(axes: Axes, found: Recommended, across: str, label: str) -> None:
    """One panel: the predicted path, measured recipes with their intervals, the front, and what is recommended."""

    def at(point: Any) -> float:
        return float(getattr(point, across)) / 1e6

    points, best = list(found.measured), front(found.measured)
    numbers = [point.quality.numbers() for point in points if point.quality is not None]
    kl: list[Any] = [max(n["kl"], _SMALLEST) for n in numbers]
    ends: Any = [n["kl_interval"] for n in numbers]
    low, high = ([abs(k - max(e[i], _SMALLEST)) for k, e in zip(kl, ends, strict=True)] for i in (0, 1))
    axes.plot(
        [at(p) for p in found.path],
        [max(p.predicted, _SMALLEST) for p in found.path],
        color="0.7",
        linewidth=1,
        label="single groups added up",
    )
    axes.errorbar([at(p) for p in points], kl, (low, high), fmt="o", color="tab:blue", capsize=2, label="measured")
    shown = [max(p.quality.mean_kl, _SMALLEST) for p in best if p.quality is not None]
    axes.step([at(p) for p in best], shown, where="post", color="tab:blue", linewidth=1, label="front")
    if found.point.quality is not None:
        chosen = max(found.point.quality.mean_kl, _SMALLEST)
        axes.plot(at(found.point), chosen, "*", color="tab:red", markersize=14, label="recommended")
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


def _mb(count: int) -> str:
    """As budgets are given."""
    return f"{count / 1e6:.2f} MB"


def _table(title: str) -> Table:
    return Table(
        box=None,
        padding=(0, 1, 0, 0),
        title=title,
        header_style="bold underline",
        title_justify="left",
        caption_justify="left",
    )
