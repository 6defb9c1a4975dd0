"""Numbers as a report writes them; what was not measured says so."""

from __future__ import annotations

import math

from vlm_bench.measure import Stat
from vlm_bench.results import NOT_MEASURED

_SMALL = 1e-4  # numbers below it are written with an exponent


def number(value: float | Stat | None, unit: str = "", digits: int = 3) -> str:
    """About `digits` significant digits, thousands apart: "1 234 ms", "12.3 ms", "0.123 ms", "1.23e-06"."""
    if isinstance(value, Stat):
        value = value.median
    if value is None:
        return NOT_MEASURED
    if value == int(value):
        text = f"{int(value):,}"
    elif abs(value) < _SMALL:
        text = f"{value:.{digits - 1}e}"
    else:
        text = f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    text = text.replace(",", "\u202f")
    return f"{text} {unit}" if unit else text


def spread(stat: Stat | None, unit: str) -> str:
    """Median, and best to worst: for a tooltip."""
    if stat is None:
        return NOT_MEASURED
    return f"median {number(stat, unit)}, best {number(stat.best)}, worst {number(stat.worst)}, {stat.of} repetitions"


def megabytes(count: float | None) -> str:
    """Of a number of bytes: MB of 2**20."""
    return number(None if count is None else count / 2**20, "MB")


def percent(share: float | None) -> str:
    """Of a share 0 to 1."""
    return NOT_MEASURED if share is None else f"{share:.1%}"


def cosine(value: float | None) -> str:
    """Six decimals, since a cosine of 0.9999 and one of 0.999999 are far apart."""
    return "no number" if value is None else f"{value:.6f}"


def decimals(value: float | None, places: int = 3) -> str:
    """A number that is 0 to 1."""
    return NOT_MEASURED if value is None else f"{value:.{places}f}"


def times(ours: Stat | None, theirs: float) -> str:
    """Ours over theirs: "0.50 ×"."""
    return NOT_MEASURED if ours is None or not theirs else f"{ours.median / theirs:.2f} ×"
