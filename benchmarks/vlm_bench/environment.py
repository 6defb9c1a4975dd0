"""The machine of a run: what it is, and how hot and fast it is at a moment. Linux tells most; None is not told.

`root` is "/" but in tests. Sources: the kernel's ABI/stable and admin-guide (cpufreq, thermal, thermal_throttle), the
Jetson's nvpmodel and over-current counters, the Raspberry Pi firmware's get_throttled.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

from vlm_bench.results import Condition, Environment

PACKAGES = (
    "vlm-export",
    "numpy",
    "pillow",
    "tokenizers",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "llama-cpp-python",
    "gguf",
    "tensorrt-rtx",
    "torch",
    "transformers",
)
_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "tegra")  # hwmon also has disks and batteries
_PI_NOW, _PI_SINCE_BOOT = 0xF, 0xF0000


def describe(device: str = "this machine", root: Path = Path("/")) -> Environment:
    """Everything but `before` and `after`."""
    processor = _match(root / "proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.processor() or platform.machine()
    board = _text(root / "proc/device-tree/model").strip("\0 ")
    kilobytes = _match(root / "proc/meminfo", r"MemTotal:\s*(\d+)")
    governors = {_text(file) for file in _cpus(root, "cpufreq/scaling_governor")} - {""}
    return Environment(
        processor=f"{board} ({processor})" if board else processor,
        cores=os.cpu_count() or 1,
        memory_gb=round(int(kilobytes) / 1024**2, 1) if kilobytes else None,
        system=platform.platform(),
        python=platform.python_version(),
        packages=_versions(),
        device=device,
        governor=", ".join(sorted(governors)) or None,
        power_mode=_power_mode(root),
    )


def condition(root: Path = Path("/")) -> Condition:
    """The machine now; `throttled` only where its firmware tells that of the moment."""
    zones = [*(root / "sys/class/thermal").glob("thermal_zone*/temp")]
    for folder in (root / "sys/class/hwmon").glob("hwmon*"):
        if _text(folder / "name").startswith(_SENSORS):
            zones += folder.glob("temp*_input")
    degrees = [value / 1000 for value in _numbers(zones) if 0 < value < 150_000]
    clocks = [value / 1000 for value in _numbers(_cpus(root, "cpufreq/scaling_cur_freq"))]
    if not clocks:
        clocks = [float(found) for found in re.findall(r"cpu MHz\s*:\s*([\d.]+)", _text(root / "proc/cpuinfo"))]
    pi = _pi(root)
    return Condition(
        temperature_c=round(max(degrees), 1) if degrees else None,
        frequency_mhz=round(sum(clocks) / len(clocks), 1) if clocks else None,
        throttled=bool(pi & _PI_NOW) if pi is not None else None,
    )


def throttle_events(root: Path = Path("/")) -> int | None:
    """How often the processor held itself back since boot, for the difference of two calls; None where not told."""
    files = [
        *_cpus(root, "thermal_throttle/*_throttle_count"),
        *(root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt"),
    ]
    counts, pi = _numbers(files), _pi(root)
    if pi is not None:
        counts.append(pi & (_PI_SINCE_BOOT | _PI_NOW))
    return int(sum(counts)) if counts else None


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _power_mode(root: Path) -> str | None:
    """The Jetson's nvpmodel by name, or a laptop's platform profile."""
    if mode := _match(root / "var/lib/nvpmodel/status", r"pmode:0*(\d+)"):
        name = _match(root / "etc/nvpmodel.conf", rf"<\s*POWER_MODEL\s+ID={mode}\s+NAME=(\S+)\s*>")
        return name or f"mode {mode}"
    return _text(root / "sys/firmware/acpi/platform_profile") or None


def _pi(root: Path) -> int | None:
    word = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    try:
        return int(word, 16) if word else None
    except ValueError:
        return None


def _cpus(root: Path, pattern: str) -> list[Path]:
    return sorted((root / "sys/devices/system/cpu").glob(f"cpu[0-9]*/{pattern}"))


def _numbers(files: Iterable[Path]) -> list[int]:
    """The whole numbers in these files; sensors that cannot be read are left out."""
    found = []
    for file in files:
        with contextlib.suppress(ValueError):
            found.append(int(_text(file)))
    return found


def _match(file: Path, pattern: str) -> str:
    found = re.search(pattern, _text(file))
    return found[1].strip() if found else ""


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
