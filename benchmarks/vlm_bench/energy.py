"""Joules, where the machine tells them: whole boards by INA3221, processors by RAPL, GPUs by NVML, batteries."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from vlm_bench.nvml import Nvml

_PERIOD_S = 0.05  # between two samples of a source that tells power, not energy


class Source(Protocol):
    """Something that counts energy."""

    name: str

    def joules(self) -> float:
        """Energy so far; differences mean something. Raises OSError when it cannot be read any more."""

    def close(self) -> None:
        """Count no longer."""


class Rapl:
    """Counters in µJ of /sys/class/powercap that begin anew at a highest value."""

    def __init__(self, zones: Sequence[Path], name: str) -> None:
        self.name, self._zones, self._sum = name, tuple(zones), 0.0
        self._ranges = [_number(zone / "max_energy_range_uj") for zone in zones]
        self._last = [_number(zone / "energy_uj") for zone in zones]

    def joules(self) -> float:
        """Of all zones. Must be asked more often than a counter begins anew, which takes minutes."""
        now = [_number(zone / "energy_uj") for zone in self._zones]
        for value, last, whole in zip(now, self._last, self._ranges, strict=True):
            self._sum += (value - last) % (whole + 1) / 1e6
        self._last = now
        return self._sum

    def close(self) -> None:
        """Nothing to end."""


class Sampled:
    """Power in watts, read every 50 ms by a thread and summed up."""

    def __init__(self, watts: Callable[[], float], name: str) -> None:
        self.name, self._watts, self._sum = name, watts, 0.0
        self._then, self._power = time.monotonic(), watts()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def joules(self) -> float:
        """Trapezoids between the samples, up to now."""
        with self._lock:
            power, now = self._watts(), time.monotonic()
            self._sum += (power + self._power) / 2 * (now - self._then)
            self._then, self._power = now, power
            return self._sum

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            with contextlib.suppress(OSError):
                self.joules()


class Meter:
    """The sources of this machine together; `source` names them, None where there are none."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._sources = find_sources(root)
        self.source = "+".join(source.name for source in self._sources) or None

    def joules(self) -> float | None:
        """Energy so far; None where it is not told."""
        try:
            return sum(source.joules() for source in self._sources) if self._sources else None
        except OSError:
            return None

    def close(self) -> None:
        """End what samples."""
        for source in self._sources:
            source.close()


def find_sources(root: Path = Path("/")) -> list[Source]:
    """The sources that together are the device: its board alone, or processors and GPUs, or a battery in use."""
    if board := _there(_ina3221, root):
        return [board]
    chips = [source for find in (_rapl, _nvml) if (source := _there(find, root))]
    return chips or [source for source in (_there(_battery, root),) if source]


def _there(find: Callable[[Path], Source | None], root: Path) -> Source | None:
    try:
        return find(root)
    except OSError:  # RAPL is for root alone on most systems
        return None


def _rapl(root: Path) -> Source | None:
    """psys (the whole board) alone where there is one, else processor packages with their memory."""
    zones = {zone: _text(zone / "name") for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*"))}
    whole = [zone for zone, name in zones.items() if name == "psys"]
    parts = whole or [zone for zone, name in zones.items() if name.startswith("package") or name == "dram"]
    return Rapl(parts, f"rapl:{'+'.join(sorted({zones[zone] for zone in parts}))}") if parts else None


def _nvml(root: Path) -> Source | None:
    gpus = Nvml()
    gpus.joules()
    return gpus


def _ina3221(root: Path) -> Source | None:
    """The Jetson's rail VDD_IN (all of the module), or the sum of its rails. Volts × amperes by hwmon's ABI."""
    rails = {}
    for folder in sorted((root / "sys/bus/i2c/drivers/ina3221").glob("*/hwmon/hwmon*")):
        for label in sorted(folder.glob("in*_label")):
            number, name = label.name.removeprefix("in").removesuffix("_label"), _text(label)
            if name and "sum" not in name.lower() and (folder / f"curr{number}_input").exists():
                rails[name] = (folder / f"in{number}_input", folder / f"curr{number}_input")
    names = ["VDD_IN"] if "VDD_IN" in rails else sorted(rails)
    if not names:
        return None
    files = [rails[name] for name in names]
    return Sampled(
        lambda: sum(_number(volts) * _number(amperes) for volts, amperes in files) / 1e6, f"ina3221:{'+'.join(names)}"
    )


def _battery(root: Path) -> Source | None:
    """A battery while it drains: power_now (µW), or current_now × voltage_now (µA, µV; some phones write mA)."""
    for folder in sorted((root / "sys/class/power_supply").glob("*")):
        if _text(folder / "type") != "Battery" or _text(folder / "status") != "Discharging":
            continue
        if (folder / "power_now").exists():
            return Sampled(lambda file=folder / "power_now": abs(_number(file)) / 1e6, f"battery:{folder.name}")  # type: ignore[misc]
        if (folder / "current_now").exists() and (folder / "voltage_now").exists():
            return Sampled(lambda folder=folder: _battery_watts(folder), f"battery:{folder.name}")  # type: ignore[misc]
    return None


def _battery_watts(folder: Path) -> float:
    current, volts = abs(_number(folder / "current_now")), _number(folder / "voltage_now") / 1e6
    # No device that runs a model draws less than 10 mA: such a number is in mA.
    return current * volts / (1e6 if current >= 10_000 else 1e3)


def _number(file: Path) -> float:
    text = file.read_text().strip()
    try:
        return float(int(text))
    except ValueError:
        raise OSError(f"{file} holds {text!r}") from None


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
