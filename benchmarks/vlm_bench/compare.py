"""Two runs of the same contestants: what became slower, larger or less right, for people's CI."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vlm_bench.columns import COLUMNS, Column, best, median
from vlm_bench.results import Results, Row
from vlm_models.errors import InputError

_STAGE_SHARE = 0.01  # of the whole answer: a stage that changed by less is no regression, whatever its ratio


@dataclass(frozen=True)
class Change:
    """One number of one contestant in both runs; `worse` by more than the threshold."""

    name: str
    number: str
    old: float
    new: float
    worse: bool

    @property
    def ratio(self) -> float:
        """New over old; infinite where there was nothing."""
        return self.new / self.old if self.old else float("inf")


@dataclass(frozen=True)
class Comparison:
    """All `changes`, contestants that are `gone`, and `notes` on what makes the runs hard to compare."""

    changes: tuple[Change, ...]
    gone: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def regressions(self) -> tuple[str, ...]:
        """A line for each."""
        worse = [f"{c.name}: {c.number} {c.old:.4g} → {c.new:.4g} ({c.ratio:.2f}×)" for c in self.changes if c.worse]
        return (*worse, *(f"{name}: measured before, not any more" for name in self.gone))


def compare(old: Results, new: Results, threshold: float) -> Comparison:
    """`threshold` is a share, 0.1 for 10 %. Times, rates and sizes regress when both median and best are worse by more,
    and a stage only by at least 1 % of the whole answer; accuracy when it falls below the old 95 % interval.

    Load times, p95, p99 and energy are shown elsewhere and not judged: single samples. Raises InputError where the runs
    have no contestant in common.
    """
    before, now = {row.name: row for row in old.rows}, {row.name: row for row in new.rows}
    both = [name for name in before if name in now]
    if not both:
        names = f"{', '.join(before) or 'none'} before, {', '.join(now) or 'none'} now"
        raise InputError(f"the runs have no contestant in common: {names}; give runs of folders with the same names")
    changes = [change for name in both for change in _changes(before[name], now[name], threshold)]
    gone = tuple(name for name in before if name not in now)
    return Comparison((*changes, *_accuracy(old, new)), gone, tuple(_notes(old, new)))


def read_threshold(text: str) -> float:
    """ "10%" or "0.1" as a share. Raises InputError for anything that is no positive number."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1.0
    if not 0 < share < float("inf"):
        raise InputError(f"threshold {text!r}: write it as 10% or 0.1")
    return share


def _changes(old: Row, new: Row, threshold: float) -> Iterator[Change]:
    for column in COLUMNS:
        before, after = median(column.get(old)), median(column.get(new))
        if before is None or after is None or not column.judged:
            continue
        worse = all(
            _worse(column, pick(column.get(old)) or 0.0, pick(column.get(new)) or 0.0, threshold)
            for pick in (median, best)
        )
        if column.key.removesuffix("_ms") in old.stages_ms:
            worse &= after - before > _STAGE_SHARE * old.wall_ms.median
        yield Change(old.name, column.heading, before, after, worse)


def _worse(column: Column, old: float, new: float, threshold: float) -> bool:
    return old > new * (1 + threshold) if column.higher_is_better else new > old * (1 + threshold)


def _accuracy(old: Results, new: Results) -> Iterator[Change]:
    before = {(one.name, one.set): one for one in old.accuracy}
    for one in new.accuracy:
        was = before.get((one.name, one.set))
        if was is None or was.exact is None or one.exact is None:
            continue
        low = was.interval[0] if was.interval else was.exact
        yield Change(one.name, f"exact on {one.set}", was.exact, one.exact, one.exact < low)


def _notes(old: Results, new: Results) -> Iterator[str]:
    for which, results in (("old", old), ("new", new)):
        if not results.complete:
            yield f"the {which} run was cut before its end"
        if loud := [row.name for row in results.rows if row.noisy]:
            yield f"the {which} run was measured beside other work: {', '.join(loud)}"
    for name in ("processor", "cores", "device", "governor", "power_mode"):
        before, now = getattr(old.environment, name), getattr(new.environment, name)
        if before != now:
            yield f"{name.replace('_', ' ')}: {before or 'not told'} before, {now or 'not told'} now"
    for name in ("threads", "max_new_tokens", "prompts", "images"):
        before, now = getattr(old.settings, name), getattr(new.settings, name)
        if before != now:
            yield f"other {name.replace('_', ' ')} were asked for: {before} before, {now} now"
