"""The numbers of a row by name, for everything that lists or compares them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlm_bench.measure import Stat
from vlm_bench.results import STAGES, Row

Value = Stat | float | None


@dataclass(frozen=True)
class Column:
    """One number: `key` in CSV, `heading` for people, how to `get` it; `judged` by --compare."""

    key: str
    heading: str
    get: Callable[[Row], Value]
    judged: bool = True
    higher_is_better: bool = False


def _stage(name: str) -> Column:
    return Column(f"{name}_ms", f"{name.replace('_', ' ')} ms", lambda row: row.stages_ms.get(name))


def _part(field: str, name: str) -> Callable[[Row], Value]:
    def get(row: Row) -> Value:
        value = getattr(row, field)
        found: Value = None if value is None else getattr(value, name)
        return found

    return get


COLUMNS = (
    *map(_stage, STAGES),
    Column("wall_ms", "whole answer ms", lambda row: row.wall_ms),
    Column("ttft_ms", "TTFT ms", lambda row: row.ttft_ms),
    Column("tokens_per_s", "decode tok/s", lambda row: row.tokens_per_s, higher_is_better=True),
    Column("token_p50_ms", "token p50 ms", _part("token_ms", "p50")),
    Column("token_p95_ms", "token p95 ms", _part("token_ms", "p95"), judged=False),
    Column("token_p99_ms", "token p99 ms", _part("token_ms", "p99"), judged=False),
    Column("load_cold_ms", "load, cold ms", lambda row: row.load_ms.cold, judged=False),
    Column("load_warm_ms", "load, warm ms", lambda row: row.load_ms.warm, judged=False),
    Column("peak_rss_mb", "peak RSS MB", lambda row: row.peak_rss_mb),
    Column("gpu_mb", "GPU MB", lambda row: row.gpu_mb),
    Column("disk_mb", "on disk MB", lambda row: None if row.bytes_on_disk is None else row.bytes_on_disk / 2**20),
    Column(
        "read_mb", "read cold MB", lambda row: None if row.bytes_read is None else row.bytes_read / 2**20, judged=False
    ),
    Column("joules", "energy J", _part("energy", "joules"), judged=False),
    Column("joules_per_token", "J per token", _part("energy", "per_token"), judged=False),
)


def median(value: Value) -> float | None:
    """The number to show of a value."""
    return value.median if isinstance(value, Stat) else value


def best(value: Value) -> float | None:
    """The number least disturbed by other processes."""
    return value.best if isinstance(value, Stat) else value


def written(number: float | None) -> str:
    """Three significant digits, whole from 100 on."""
    if number is None:
        return "not measured"
    return f"{number:.{0 if abs(number) >= 100 else 1 if abs(number) >= 10 else 2}f}"
