"""Results as CSV: a line for each contestant, medians; what was skipped has its reason."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from vlm_bench.columns import COLUMNS, median
from vlm_bench.results import NOT_MEASURED, Results
from vlm_bench.results_file import write_whole

_FACTS = ("name", "kind", "engines", "precision")
_COUNTS = ("image_tokens", "prompt_tokens", "new_tokens", "tiles", "quiet", "of", "noisy")


def write_csv(path: str | Path, results: Results) -> Path:
    """Write the file, whole or not at all. Raises InputError where that cannot be."""
    sets = list(dict.fromkeys(one.set for one in results.accuracy))
    exact = {(one.name, one.set): one.exact for one in results.accuracy}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_FACTS, *(c.key for c in COLUMNS), *_COUNTS, *(f"exact {name}" for name in sets), "skipped"])
    for row in results.rows:
        engines = " ".join(f"{part}={engine}" for part, engine in row.engines.items())
        numbers = [median(column.get(row)) for column in COLUMNS]
        counts = [getattr(row, name) for name in _COUNTS]
        shares = [exact.get((row.name, name)) for name in sets]
        cells = [row.name, row.kind, engines or None, row.precision, *numbers, *counts, *shares]
        writer.writerow([*map(_cell, cells), ""])
    for one in results.skipped:
        blank = [NOT_MEASURED] * (len(_FACTS) - 1 + len(COLUMNS) + len(_COUNTS) + len(sets))
        writer.writerow([one.name, *blank, one.reason])
    return write_whole(path, text.getvalue().encode("utf-8", "replace"))


def _cell(value: object) -> str:
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
