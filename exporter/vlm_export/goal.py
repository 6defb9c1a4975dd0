"""`--sensitivity` and `--precision auto`: what the two ask for, and what is shown. Loads torch only when asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from vlm_export.target import Progress
from vlm_models.checkpoint import Sources
from vlm_models.errors import InputError
from vlm_quant.recipe import Recipe, parse_recipe

if TYPE_CHECKING:
    from vlm_export.recommend import Recommended
    from vlm_models.model import Model
    from vlm_quant.calibration import Calibration

AUTO = "auto"
MAX_KL = 0.05
"""Nats per answer token that a recommended recipe may lose unless something else is asked for."""
_SPREAD = 5  # recipes of the path that a report measures beside those that the choice needs


def asked(precision: str, budget: str | None, max_kl: float | None) -> Recipe | None:
    """The recipe that a user has written, None for "auto". Raises InputError for a goal beside a written one."""
    if precision.strip() == AUTO:
        return None
    if budget is not None or max_kl is not None:
        raise InputError(
            f"--budget and --max-kl choose a precision, and here is one already, {precision!r}: "
            "give them with --precision auto or --sensitivity"
        )
    return parse_recipe(precision)


def recipe(
    model: Model,
    pairs: Calibration | None,
    budget: str | None,
    max_kl: float | None,
    algorithm: str,
    samples: int,
    seed: int,
    progress: Progress,
) -> Recipe:
    """What `--precision auto` stands for. Raises as `vlm_export.recommend.recommend` does."""
    from vlm_export.recommend import recommend

    given = {"algorithm": algorithm, "samples": samples, "seed": seed, "progress": progress}
    return recommend(model, pairs, budget=budget, max_kl=max_kl, **given).point.recipe  # type: ignore[arg-type]


def measured(
    checkpoint: str,
    targets: Sequence[str] | None,
    output: Path | None,
    precision: str,
    calibration: Path | None,
    budget: str | None,
    max_kl: float | None,
    algorithm: str,
    samples: int,
    seed: int,
    sources: Sources,
    progress: Progress,
) -> Recommended:
    """`--sensitivity` on a checkpoint, and its files where `output` is a folder.

    Raises InputError for flags that export something, DependencyError where the picture cannot be drawn.
    """
    from vlm_export import pareto
    from vlm_export.pairs import pairs_for
    from vlm_export.recommend import recommend
    from vlm_models.model import load_model

    if targets:
        raise InputError("--sensitivity exports nothing: leave out --target, or give --precision auto instead")
    if precision.strip() not in (AUTO, "fp16"):
        raise InputError(f"--sensitivity tries every precision: leave out --precision {precision}")
    if output is not None:
        pareto.check_pictures()
        if output.is_file():
            raise InputError(f"{output} is a file: -o takes a folder for {', '.join(pareto.NAMES)}")
    model = load_model(checkpoint, sources)
    found = recommend(
        model,
        pairs_for(model, calibration),
        budget=budget,
        max_kl=max_kl,
        algorithm=algorithm,
        samples=samples,
        seed=seed,
        spread=_SPREAD,
        progress=progress,
    )
    if output is not None:
        pareto.write(found, output.expanduser())
    return found


def show(found: Recommended, output: Path | None, *, as_json: bool, quiet: bool) -> None:
    """The tables and the recommended recipe on stdout, or one JSON object."""
    from vlm_export import pareto

    console = Console()
    if as_json:
        console.file.write(json.dumps(found.plain()) + "\n")
    elif not quiet:
        console.print(pareto.group_table(found))
        console.print(pareto.recipe_table(found))
        for number, point in enumerate(pareto.ordered(found), 1):
            console.print(f"{number}  {point.recipe}", highlight=False, markup=False, soft_wrap=True)
        said = f"{found.goal}: --precision '{found.point.recipe}'"
        written = "" if output is None else f"  ({output}: {', '.join(pareto.NAMES)})"
        console.print(f"{said}{written}, {found.seconds:.0f} s", highlight=False, markup=False, soft_wrap=True)
