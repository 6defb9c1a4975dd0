"""Results on the console: numbers down, contestants across, ratios to the first; accuracy, drift, what was skipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vlm_bench.columns import COLUMNS, Column, median, written
from vlm_bench.compare import Comparison
from vlm_bench.results import Drift, Results, Row

_SHORT = {"pixel_values": "pixels", "image_features": "vision", "image_embeds": "projector", "inputs_embeds": "splice"}
_ACROSS = 5  # contestants in one table; more go into further ones


def report(results: Results) -> Group:
    """Everything there is to say of a run. Names come from folders and are shown as they are, not as markup."""
    parts: list[RenderableType] = []
    for start in range(0, len(results.rows), _ACROSS):
        parts.append(_numbers(results, results.rows[start : start + _ACROSS]))
    if results.accuracy:
        parts.append(_accuracy(results))
    if results.drift:
        parts.append(_drift(results.drift))
    return Group(*parts, *(Text(line, style) for line, style in _lines(results)))


def comparison(found: Comparison, threshold: float) -> Group:
    """What changed by more than a hundredth, regressions marked."""
    table = Table("", "number", "old", "new", "new / old", "", title=f"regressions beyond {threshold:.0%}")
    for change in found.changes:
        if change.worse or abs(change.ratio - 1) > 0.01:
            style = "bold red" if change.worse else ""
            cells = change.name, change.number, f"{change.old:.4g}", f"{change.new:.4g}", f"{change.ratio:.2f}×"
            table.add_row(*(Text(cell) for cell in cells), "worse" if change.worse else "", style=style)
    lines = [Text(f"{name}: measured before, not any more", "bold red") for name in found.gone]
    return Group(table, *lines, *(Text(f"note: {note}", "yellow") for note in found.notes))


def _numbers(results: Results, rows: Sequence[Row]) -> Table:
    asked = results.settings
    title = f"{asked.max_new_tokens} tokens an answer, {asked.threads} threads; medians of {asked.runs} repetitions"
    table = Table(title=title)
    table.add_column("")
    for row in rows:
        table.add_column(Text(row.name), justify="right", overflow="fold")
    table.add_row("engines", *(Text(_engines(row)) for row in rows))
    table.add_row("precision", *(Text((row.precision or "not told").replace(",", "\n")) for row in rows))
    first = results.rows[0]
    if len(results.rows) > 1:
        table.caption = Text(f"×: times that of {first.name}", "dim")
    for column in COLUMNS:
        if any(median(column.get(row)) is not None for row in results.rows):
            table.add_row(column.heading, *(_cell(column, row, first) for row in rows))
    counts = (f"{row.prompt_tokens or 0:.0f} + {row.new_tokens:.0f}" if row.prompt_tokens else "—" for row in rows)
    table.add_row("tokens in + out", *counts)
    table.add_row("quiet", *(Text(f"{row.quiet} of {row.of}", "yellow" if row.noisy else "") for row in rows))
    return table


def _cell(column: Column, row: Row, first: Row) -> str:
    number, base = median(column.get(row)), median(column.get(first))
    if number is None:
        return "not measured"
    ratio = f"  {number / base:.2f}×" if base and row is not first else ""
    return f"{written(number)}{ratio}"


def _engines(row: Row) -> str:
    """One word where all parts share an engine."""
    names = list(row.engines.values())
    if len(set(names)) == 1:
        return names[0]
    return "\n".join(f"{part}={name}" for part, name in row.engines.items()) or "not told"


def _accuracy(results: Results) -> Table:
    table = Table("", "set", "asked", "exact", "95 %", "contains", "ANLS", "KL, nats", title="accuracy")
    for column in table.columns:
        column.overflow = "fold"
    for one in results.accuracy:
        interval = "–".join(f"{end:.3f}" for end in one.interval) if one.interval else "not measured"
        shares = (written_share(value) for value in (one.exact, one.contains, one.anls))
        exact, contains, anls = shares
        kl = "not measured" if one.kl is None else f"{one.kl:.4f} to {one.kl_reference}"
        cells = one.name, one.set, str(one.questions), exact, interval, contains, anls, kl
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _drift(drift: Sequence[Drift]) -> Table:
    """The worst cosine of each stage over the cases."""
    stages = list(dict.fromkeys(stage for one in drift for stage in one.stages))
    headings = [_SHORT.get(stage, stage) for stage in stages]
    title = Text(f"beside {drift[0].reference}: worst cosines")
    table = Table("", *headings, "drifts at", "same", title=title)
    for name in dict.fromkeys(one.name for one in drift):
        mine = [one for one in drift if one.name == name]
        cells = []
        for stage in stages:
            cosines = [one.stages[stage].cosine for one in mine if stage in one.stages]
            known = [cosine for cosine in cosines if cosine is not None]
            cells.append(f"{min(known):.5f}" if known and len(known) == len(cosines) else "not measured")
        first = next((_SHORT.get(stage, stage) for stage in stages if any(one.first == stage for one in mine)), "none")
        same = sum(one.answer == one.reference_answer for one in mine)
        table.add_row(*(Text(cell) for cell in (name, *cells, first, f"{same} of {len(mine)}")))
    return table


def _lines(results: Results) -> Iterator[tuple[str, str]]:
    for one in results.skipped:
        yield f"{one.name}: not measured: {one.reason}", "yellow"
    yield from ((f"{row.name}: {note}", "dim") for row in results.rows for note in row.notes)
    if loud := [row.name for row in results.rows if row.noisy]:
        names = ", ".join(loud)
        yield f"other processes were busy during most repetitions of {names}: do not trust these times", "yellow"
    place = results.environment
    facts = [place.processor, f"{place.cores} cores", place.device]
    facts += [f"governor {place.governor}"] if place.governor else []
    facts += [f"power mode {place.power_mode}"] if place.power_mode else []
    if place.before.temperature_c is not None and place.after.temperature_c is not None:
        facts.append(f"{place.before.temperature_c:.0f} °C before, {place.after.temperature_c:.0f} °C after")
    yield ", ".join(facts), "dim"
    if place.after.throttled:
        yield "the processor held itself back (throttled) during the run: times are those of a hot machine", "bold red"
    if not results.complete:
        yield "cut before its end: these are the repetitions until then", "bold yellow"


def written_share(value: float | None) -> str:
    """A share with three decimals."""
    return "not measured" if value is None else f"{value:.3f}"
