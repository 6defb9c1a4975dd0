"""`vlm-bench --device URL`: the way in."""

from __future__ import annotations

from pathlib import Path

from vlm_bench.devices.address import parse
from vlm_bench.devices.job import Job
from vlm_bench.devices.remote import Keep, measure_over_ssh
from vlm_bench.devices.ssh import Ssh
from vlm_bench.devices.transfer import Say
from vlm_bench.results import Results
from vlm_models.errors import InputError


def measure_on(url: str, job: Job, *, say: Say, keep: Keep, binaries: Path | None = None) -> Results:
    """Measure `job` on the device at `url`; complete results whose environment names it.

    `keep` is called with each partial one as it is brought here, `say` with a line for each thing that happens.
    `binaries` is a folder of llama.cpp's programs for a phone (adb:// only). Raises InputError, DependencyError,
    CheckError, one line each; what was measured until then has gone to `keep`.
    """
    address = parse(url)
    if binaries is not None and address.scheme != "adb":
        raise InputError(f"--device-binaries are for a phone at adb://SERIAL, not for {address}: leave them out")
    with Ssh(address) as ssh:
        return measure_over_ssh(ssh, job, say=say, keep=keep)
