"""Numbers as a report writes them; what was not measured says so."""

from __future__ import annotations

from vlm_bench.measure import Stat
from vlm_bench.results import NOT_MEASURED


def number(value: float | Stat | None, unit: str = "", digits: int = 3) -> str:
    """About `digits` significant digits, thousands apart: "1 234 ms", "12.3 ms", "0.123 ms"."""
    if isinstance(value, Stat):
        value = value.median
    if value is None:
        return NOT_MEASURED
    if value == int(value) and abs(value) < 10**digits:
        text = str(int(value))
    else:
        whole = len(str(int(abs(value)))) if abs(value) >= 1 else 1
        text = f"{value:,.{max(0, digits - whole)}f}".replace(",", "\u202f")
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


def ratio(ours: float | Stat | None, theirs: float | Stat | None) -> float | None:
    """Ours over theirs; None where one is not measured or is 0."""
    a, b = (value.median if isinstance(value, Stat) else value for value in (ours, theirs))
    return a / b if a is not None and b else None
