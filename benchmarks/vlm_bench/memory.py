"""Memory and storage of processes, as Linux tells them in /proc, and files dropped from its page cache."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from vlm_bench.measure import descendants


def family(pid: int) -> list[int]:
    """The process and all that it started."""
    return [pid, *descendants(pid)]


def peak_mb(pids: Iterable[int]) -> float | None:
    """Sum of the processes' peak resident sizes so far, mapped files included; None where not told."""
    peaks = [size for pid in pids if (size := _field(pid, "status", "VmHWM"))]
    return sum(peaks) / 1024 if peaks else None


def resident_mb(pids: Iterable[int]) -> float | None:
    """Sum of what the processes have in memory now, mapped files included; None where not told."""
    sizes = [size for pid in pids if (size := _field(pid, "status", "VmRSS"))]
    return sum(sizes) / 1024 if sizes else None


def bytes_read(pids: Iterable[int]) -> int | None:
    """Bytes that these processes had fetched from storage; None where not told.

    Zero is None too: file systems that do not count (some network and container ones) say so.
    """
    return sum(_field(pid, "io", "read_bytes") for pid in pids) or None


def available_mb() -> float | None:
    """Memory that new processes may take without swapping; None where not told."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 1024
    return None


def drop_from_cache(files: Sequence[str]) -> bool:
    """Let the page cache forget these files; False where the system cannot, or there are none.

    Pages that another process maps stay.
    """
    if not files or not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        try:
            handle = os.open(file, os.O_RDONLY)
        except OSError:
            return False
        try:
            os.fsync(handle)  # what is not on storage yet cannot be dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            return False
        finally:
            os.close(handle)
    return True


def _field(pid: int, file: str, name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    return 0
