"""A recipe for a budget or a quality: sensitivity on some held-out pairs, and the choice measured on others.

The calibration pairs are split by picture. Most of them calibrate; of the rest some find out what each group of layers
costs (round-to-nearest, one group at a time), and others measure whole recipes as an algorithm decides their weights.
All of it is simulated (`vlm_export.simulate`): no target is needed, and none is measured.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export import budget as budgets
from vlm_export.algorithms import STEPS, check_algorithm, rounded_bits
from vlm_export.budget import Point
from vlm_export.decide import decide
from vlm_export.goal import MAX_KL
from vlm_export.quality import HeldOut, Quality, ask, held_out
from vlm_export.sensitivity import Effect, effects, fixed_bytes, groups
from vlm_export.simulate import simulate
from vlm_export.target import Progress, silent
from vlm_models.errors import InputError
from vlm_quant.calibration import Calibration, sample, split
from vlm_quant.recipe import Recipe, parse_recipe

if TYPE_CHECKING:
    from vlm_models.model import Model
    from vlm_models.spec import LanguageSpec

PROBES = 32  # pairs on which groups are tried
CHECKS = 64  # pairs on which recipes are measured
HELD = 0.4  # share of the pictures that calibration does not see
MAX_LOST = 0.01  # of all questions, exact answers that are no more; of few questions that is none
FEWEST = 4  # pictures: intervals need two that are measured on
SPREAD = 5  # recipes of the path that a report measures beside those that the choice needs


_BOTH = parse_recipe("language=int4;self_attn=int8")  # something to do for every algorithm


@dataclass(frozen=True)
class Recommended:
    """What was found: the recipe to take and what it costs, every effect, the path, and the measured points.

    `goal` says what was asked for, `algorithm` and `pairs` how it was measured; all plain values.
    """

    goal: str
    point: Point
    effects: tuple[Effect, ...]
    path: tuple[Point, ...]
    measured: tuple[Point, ...]
    algorithm: Mapping[str, Any]
    pairs: Mapping[str, Any]
    seconds: float

    def plain(self) -> dict[str, Any]:
        """Plain values for a file or a manifest."""
        rows = [
            {"group": e.group.name, "precision": str(e.precision), "bytes": e.bytes, **e.quality.numbers()}
            for e in self.effects
        ]
        return {
            "goal": self.goal,
            "recommended": self.point.plain(),
            "pairs": dict(self.pairs),
            "algorithm": dict(self.algorithm),
            "seconds": self.seconds,
            "groups": rows,
            "measured": [point.plain() for point in self.measured],
            "front": [str(point.recipe) for point in budgets.front(self.measured)],
            "path": [point.plain() for point in self.path],
        }


def recommend(
    model: Model,
    calibration: Calibration | None,
    *,
    budget: str | None = None,
    max_kl: float | None = None,
    algorithm: str = "auto",
    samples: int = 128,
    seed: int = 0,
    spread: int = 0,
    progress: Progress = silent,
) -> Recommended:
    """The smallest recipe with a KL of at most `max_kl` nats per answer token, or the best one within `budget` bytes.

    Without either: KL up to MAX_KL, and no more exact answers lost than MAX_LOST of the questions.
    `budget` is a size as in "120MB" of weights, table and tokenizer together. `spread` measures that many recipes of
    the path beside those that the choice needs. Raises InputError without pairs, for a budget that cannot be met and
    for both goals at once, CheckError where no recipe is good enough.
    """
    began = time.perf_counter()
    if budget is not None and max_kl is not None:
        raise InputError("--budget and --max-kl are two goals: give one of them")
    limit = None if budget is None else budgets.parse_size(budget)
    floor = MAX_KL if max_kl is None else max_kl
    if not floor > 0:
        raise InputError(f"max KL {floor:g} cannot be: give nats above 0, such as {MAX_KL:g}")
    ours, probes, checks = _pairs(calibration, seed)
    check_algorithm(algorithm, model.spec.language, _BOTH, ours, samples)
    probed = held_out(model, probes, progress)
    found, fixed = groups(model), fixed_bytes(model)
    tried = tuple(effects(model, probed, progress))
    path = budgets.path(found, tried, fixed)
    if limit is not None:
        budgets.within_budget(path, limit)
    measure = _Measure(model, path, held_out(model, checks, progress), ours, algorithm, samples, seed, progress)
    if limit is None:
        kl_of = judged(measure, strict=max_kl is None)
        index = budgets.within_kl(path, floor, kl_of)
    else:
        index = path.index(budgets.within_budget(path, limit))
    for i in sorted({round(n * (len(path) - 1) / max(1, spread - 1)) for n in range(spread)} | {index}):
        measure(i)
    measured = tuple(replace(path[i], quality=q) for i, q in sorted(measure.known.items()))
    return Recommended(
        goal=_goal(limit, floor, strict=max_kl is None),
        point=replace(path[index], quality=measure(index)),
        effects=tried,
        path=tuple(path),
        measured=measured,
        algorithm=measure.records[index],
        pairs={
            "calibration": len(ours.pairs),
            "probes": len(probes.pairs),
            "checks": len(checks.pairs),
            "skipped": ours.skipped,
            "seed": seed,
            "checks_sha256": checks.sha256,
        },
        seconds=round(time.perf_counter() - began, 1),
    )


def judged(measure: Callable[[int], Quality], *, strict: bool) -> Callable[[int], float]:
    """The KL of a recipe; infinite where `strict` and it loses more exact answers than MAX_LOST of all questions."""

    def kl_of(index: int) -> float:
        quality = measure(index)
        lost = int(measure(0).exact.sum()) - int(quality.exact.sum()) if strict else 0
        return quality.mean_kl if lost <= MAX_LOST * len(quality.exact) else float("inf")

    return kl_of


def _goal(limit: int | None, floor: float, *, strict: bool) -> str:
    if limit is not None:
        return f"size ≤ {limit / 1e6:g} MB"
    answers = f", at most {MAX_LOST:.0%} of exact answers lost" if strict else ""
    return f"KL ≤ {floor:g} nats per answer token{answers}"


class _Measure:
    """The quality of recipes of a path, each decided and asked once."""

    def __init__(
        self,
        model: Model,
        path: Sequence[Point],
        held: HeldOut,
        calibration: Calibration,
        algorithm: str,
        samples: int,
        seed: int,
        progress: Progress,
    ) -> None:
        self._model, self._path, self._held, self._calibration = model, path, held, calibration
        self._algorithm, self._samples, self._seed, self._progress = algorithm, samples, seed, progress
        self.known: dict[int, Quality] = {}
        self.records: dict[int, Mapping[str, Any]] = {}

    def __call__(self, index: int) -> Quality:
        if index not in self.known:
            recipe = self._path[index].recipe
            with tempfile.TemporaryDirectory(prefix="vlm-export-") as folder:
                decided = decide(
                    self._model,
                    recipe,
                    self._calibration,
                    _fitting(self._algorithm, self._model.spec.language, recipe),
                    folder=Path(folder),
                    samples=self._samples,
                    seed=self._seed,
                    progress=self._progress,
                )
                self.known[index] = ask(simulate(decided.model, recipe), self._held)
            self.records[index] = {k: v for k, v in decided.record.items() if k != "layers"}
            self._progress("recipes", len(self.known), max(len(self.known), len(self._path).bit_length()))
        return self.known[index]


def _fitting(algorithm: str, spec: LanguageSpec, recipe: Recipe) -> str:
    """The algorithms of "awq+gptq" that have something to do for a recipe; "rtn" where none has."""
    if algorithm in ("auto", "rtn"):
        return algorithm
    bits = rounded_bits(spec, recipe)
    return "+".join(step for step in algorithm.split("+") if STEPS[step] & bits) or "rtn"


def _pairs(calibration: Calibration | None, seed: int) -> tuple[Calibration, Calibration, Calibration]:
    """What calibrates, what tries groups, what measures recipes: three sets of pictures."""
    if calibration is None:
        raise InputError("sensitivity is measured on image-text pairs: give --calibration FOLDER or FILE.jsonl")
    pictures = len({pair.image for pair in calibration.pairs})
    if pictures < FEWEST:
        raise InputError(
            f"sensitivity needs pairs of at least {FEWEST} pictures that differ, here are {pictures}: "
            "some calibrate, others are measured on"
        )
    ours, held = split(calibration, HELD, seed)
    enough = len({pair.image for pair in held.pairs}) > FEWEST
    checks, probes = split(held, 1 / 3, seed) if enough else (held, held)
    return ours, sample(probes, PROBES, seed), sample(checks, CHECKS, seed)
