"""What the machine tells of itself: energy, heat, clocks and memory, from files laid out as kernels lay them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlm_bench import energy, environment, measure, memory, nvml


def lay(root: Path, files: dict[str, object]) -> Path:
    """Write files under `root`."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def rapl(number: str, name: str, energy_uj: int) -> dict[str, object]:
    zone = f"sys/class/powercap/intel-rapl:{number}"
    return {f"{zone}/name": name, f"{zone}/energy_uj": energy_uj, f"{zone}/max_energy_range_uj": 999_999_999}


def test_rapl_adds_packages_and_memory_and_survives_a_counter_that_begins_anew(tmp_path: Path) -> None:
    lay(tmp_path, rapl("0", "package-0", 999_000_000) | rapl("1", "package-1", 5_000_000) | rapl("0:0", "core", 7))
    lay(tmp_path, rapl("0:1", "dram", 1_000_000))
    meter = energy.Meter(tmp_path)
    assert meter.source == "rapl:dram+package-0+package-1"
    start = meter.joules()
    lay(tmp_path, rapl("0", "package-0", 1_000_000) | rapl("1", "package-1", 5_500_000) | rapl("0:0", "core", 900_000))
    lay(tmp_path, rapl("0:1", "dram", 1_250_000))
    end = meter.joules()
    assert start is not None
    assert end is not None
    assert end - start == pytest.approx(2.0 + 0.5 + 0.25)


def test_the_whole_board_is_taken_alone(tmp_path: Path) -> None:
    lay(tmp_path, rapl("0", "package-0", 1) | rapl("1", "psys", 1))
    assert energy.Meter(tmp_path).source == "rapl:psys"


def test_counters_for_root_alone_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, rapl("0", "package-0", 1))

    def refuse(zone: Path) -> float:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(energy, "_number", refuse)
    meter = energy.Meter(tmp_path)
    assert (meter.source, meter.joules()) == (None, None)


def test_a_jetson_sums_up_the_power_of_its_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    lay(tmp_path, {f"{folder}/in1_label": "VDD_IN", f"{folder}/in1_input": 5000, f"{folder}/curr1_input": 2000})
    lay(tmp_path, {f"{folder}/in2_label": "VDD_CPU", f"{folder}/in2_input": 5000, f"{folder}/curr2_input": 800})
    lay(tmp_path, {f"{folder}/in7_label": "Sum of shunt voltages", f"{folder}/in7_input": 5000})
    lay(tmp_path, rapl("0", "package-0", 1))
    clock = iter(range(1000))
    monkeypatch.setattr(energy, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    monkeypatch.setattr(energy, "_PERIOD_S", 1000.0)
    meter = energy.Meter(tmp_path)
    assert meter.source == "ina3221:VDD_IN"
    assert meter.joules() == pytest.approx(10.0)  # 5 V × 2 A × 1 s
    lay(tmp_path, {f"{folder}/curr1_input": 4000})
    assert meter.joules() == pytest.approx(10.0 + 15.0)  # from 10 W to 20 W in a second
    meter.close()


def test_a_sampled_source_counts_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "_PERIOD_S", 0.001)
    asked = []
    source = energy.Sampled(lambda: asked.append(1) or 3.0, "made up")  # type: ignore[func-returns-value]
    end = time.monotonic() + 10
    while len(asked) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    source.close()
    assert len(asked) >= 5
    assert source.joules() > 0


@pytest.mark.parametrize(
    ("files", "watts"),
    [
        ({"power_now": 7_500_000}, 7.5),
        ({"current_now": -1_500_000, "voltage_now": 4_000_000}, 6.0),
        ({"current_now": -1500, "voltage_now": 4_000_000}, 6.0),  # a phone that tells mA
    ],
)
def test_a_battery_tells_watts_while_it_drains(tmp_path: Path, files: dict[str, int], watts: float) -> None:
    folder = "sys/class/power_supply/BAT0"
    lay(tmp_path, {f"{folder}/type": "Battery", f"{folder}/status": "Discharging"})
    lay(tmp_path, {f"{folder}/{name}": value for name, value in files.items()})
    (source,) = energy.find_sources(tmp_path)
    assert isinstance(source, energy.Sampled)
    assert source.name == "battery:BAT0"
    assert source._watts() == pytest.approx(watts)
    source.close()
    lay(tmp_path, {f"{folder}/status": "Charging"})
    assert energy.find_sources(tmp_path) == []


def test_nvml_tells_energy_and_the_memory_of_our_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = [SimpleNamespace(pid=7, usedGpuMemory=3 << 20), SimpleNamespace(pid=8, usedGpuMemory=1 << 30)]
    fake = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda number: f"gpu{number}",
        nvmlDeviceGetTotalEnergyConsumption=lambda device: 12_500,
        nvmlDeviceGetComputeRunningProcesses=lambda device: processes,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    lay(tmp_path, rapl("0", "package-0", 1))
    meter = energy.Meter(tmp_path)
    assert meter.source == "rapl:package-0+nvml"
    assert meter.joules() == pytest.approx(12.5)
    gpus = nvml.Nvml()
    assert gpus.used_mb([7]) == 3.0
    assert gpus.used_mb([9]) is None
    processes[0].usedGpuMemory = None  # a driver in a container does not tell
    assert gpus.used_mb([7]) is None
    fake.nvmlDeviceGetCount = lambda: 0
    with pytest.raises(OSError, match="no GPU"):
        nvml.Nvml()


def test_nothing_is_told_of_an_empty_machine(tmp_path: Path) -> None:
    meter = energy.Meter(tmp_path)
    assert (meter.source, meter.joules()) == (None, None)
    place = environment.describe(root=tmp_path)
    assert (place.memory_gb, place.governor, place.power_mode) == (None, None, None)
    assert environment.condition(tmp_path) == environment.Condition(None, None, None)
    assert environment.throttle_events(tmp_path) is None


def test_the_environment_of_a_laptop(tmp_path: Path) -> None:
    cpu = "sys/devices/system/cpu"
    files: dict[str, object] = {
        "proc/cpuinfo": "model name\t: A processor @ 2 GHz",
        "proc/meminfo": "MemTotal:       16777216 kB",
        f"{cpu}/cpu0/cpufreq/scaling_governor": "powersave",
        f"{cpu}/cpu1/cpufreq/scaling_governor": "performance",
        f"{cpu}/cpu0/cpufreq/scaling_cur_freq": 1_200_000,
        f"{cpu}/cpu1/cpufreq/scaling_cur_freq": 2_400_000,
        f"{cpu}/cpu0/thermal_throttle/core_throttle_count": 3,
        f"{cpu}/cpu0/thermal_throttle/package_throttle_count": 4,
        "sys/firmware/acpi/platform_profile": "quiet",
        "sys/class/thermal/thermal_zone0/temp": 54_000,
        "sys/class/thermal/thermal_zone1/temp": -273_000,  # a sensor that is off
        "sys/class/hwmon/hwmon0/name": "coretemp",
        "sys/class/hwmon/hwmon0/temp1_input": 61_500,
        "sys/class/hwmon/hwmon1/name": "nvme",
        "sys/class/hwmon/hwmon1/temp1_input": 80_000,
    }
    lay(tmp_path, files)
    place = environment.describe("ssh://host", tmp_path)
    assert (place.processor, place.memory_gb) == ("A processor @ 2 GHz", 16.0)
    assert (place.governor, place.power_mode, place.device) == ("performance, powersave", "quiet", "ssh://host")
    assert environment.condition(tmp_path) == environment.Condition(61.5, 1800.0, None)
    assert environment.throttle_events(tmp_path) == 7
    assert place.packages["numpy"]


def test_the_power_mode_of_a_jetson_has_its_name(tmp_path: Path) -> None:
    lay(tmp_path, {"var/lib/nvpmodel/status": "pmode:0002", "proc/device-tree/model": "Jetson Orin Nano\0"})
    assert environment.describe(root=tmp_path).power_mode == "mode 2"
    lay(tmp_path, {"etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=2 NAME=15W >"})
    place = environment.describe(root=tmp_path)
    assert place.power_mode == "15W"
    assert place.processor.startswith("Jetson Orin Nano (")


def test_a_raspberry_pi_tells_that_it_is_throttled_now(tmp_path: Path) -> None:
    word = "sys/devices/platform/soc/soc:firmware/get_throttled"
    lay(tmp_path, {word: "0"})
    before = environment.throttle_events(tmp_path)
    assert environment.condition(tmp_path).throttled is False
    lay(tmp_path, {word: "50005"})
    assert environment.condition(tmp_path).throttled is True
    assert before is not None
    assert (environment.throttle_events(tmp_path) or 0) > before


def test_memory_and_cpu_time_of_grandchildren_count() -> None:
    waste = "data = bytearray(64 << 20)\nfor _ in range(3_000_000): pass\nprint('done', flush=True)\ninput()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {waste!r}])"
    before = measure.own_seconds()
    with subprocess.Popen([sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"done\n"
        family = memory.family(process.pid)
        assert len(family) == 2
        assert (memory.peak_mb(family) or 0) > 64 + (memory.peak_mb([process.pid]) or 0) - 1
        living = measure.own_seconds() - before
        process.stdin.write(b"\n")
    assert living > 0.05
    assert measure.own_seconds() - before >= living - 0.02  # the dead are counted too
    assert memory.peak_mb([process.pid]) is None
    assert memory.bytes_read([process.pid]) is None


def test_files_are_dropped_from_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"x" * 4096)
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, start, length, advice: advised.append((length, advice)))
    assert memory.drop_from_cache([str(file)])
    assert advised == [(0, os.POSIX_FADV_DONTNEED)]
    assert not memory.drop_from_cache([])
    assert not memory.drop_from_cache([str(tmp_path / "none")])
    monkeypatch.delattr(os, "posix_fadvise")
    assert not memory.drop_from_cache([str(file)])
