"""Whether this machine can build an engine: memory and disk, looked at before each one.

A builder holds the weights several times; a Jetson whose memory runs out freezes rather than fails.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from vlm_export.table import size
from vlm_models.errors import InputError

_MEMORY_BASE, _MEMORY_FACTOR = 700 << 20, 3.0
_DISK_BASE, _DISK_FACTOR = 64 << 20, 1.15
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def memory_needed(weights: float) -> float:
    """Bytes that a builder takes at most for a graph with that many bytes of weights."""
    return _MEMORY_BASE + _MEMORY_FACTOR * weights


def disk_needed(weights: float) -> float:
    """Bytes of the engine at most."""
    return _DISK_BASE + _DISK_FACTOR * weights


def check_machine(folder: Path, part: str, weights: int) -> None:
    """Raise InputError where memory (with swap) or disk are too small for an engine of `weights` bytes."""
    check_memory(part, weights)
    space = shutil.disk_usage(folder).free
    if space < disk_needed(weights):
        raise InputError(
            f"building the {part} engine takes {size(disk_needed(weights))} of disk in {folder}, "
            f"which has {size(space)} free: make room there"
        )


def check_memory(part: str, weights: float) -> None:
    """Raise InputError where memory with swap is too small to build an engine of `weights` bytes."""
    free = memory_free()
    if free is not None and free < memory_needed(weights):
        raise InputError(
            f"building the {part} engine takes about {size(memory_needed(weights))} of memory, "
            f"{size(free)} with swap are free: close other programs (Jetson: sudo init 3), add swap, or take fewer bits"
        )


def memory_free() -> int | None:
    """Bytes of memory and swap that can be had: of the system, or of the container; None where nobody says."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        free = sum(int(lines[key].split()[0]) * 1024 for key in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):
        return None
    limit = _container()
    return free if limit is None else min(free, limit)


def _container() -> int | None:
    """What a container's limit leaves; file pages that it would give back are counted as free."""
    try:
        most = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat: Mapping[str, str] = dict(
            line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines() if line
        )
        return None if most == "max" else int(most) - used + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return None
