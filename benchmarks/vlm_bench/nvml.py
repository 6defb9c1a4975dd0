"""NVIDIA's management library, where `pynvml` (package nvidia-ml-py) and a driver are there: energy and memory."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from typing import Any


class Nvml:
    """All GPUs of the machine. Raises OSError where there is no library, driver or GPU."""

    name = "nvml"

    def __init__(self) -> None:
        try:
            self._library: Any = importlib.import_module("pynvml")
            self._library.nvmlInit()
            count = self._library.nvmlDeviceGetCount()
            self._devices = [self._library.nvmlDeviceGetHandleByIndex(n) for n in range(count)]
        except Exception as error:  # its own classes, which cannot be named without it
            raise OSError(str(error)) from None
        if not self._devices:
            raise OSError("no GPU")

    def joules(self) -> float:
        """Energy of all GPUs since the driver was loaded. Raises OSError where a GPU does not count it."""
        try:
            return float(sum(map(self._library.nvmlDeviceGetTotalEnergyConsumption, self._devices))) / 1000
        except self._library.NVMLError as error:
            raise OSError(str(error)) from None

    def close(self) -> None:
        """Nothing to end: the library serves the whole process."""

    def used_mb(self, pids: Collection[int]) -> float | None:
        """GPU memory of these processes now; None where the driver does not tell it by process."""
        try:
            used = [
                process.usedGpuMemory
                for device in self._devices
                for process in self._library.nvmlDeviceGetComputeRunningProcesses(device)
                if process.pid in pids
            ]
        except self._library.NVMLError:
            return None
        return sum(used) / 2**20 if used and None not in used else None
