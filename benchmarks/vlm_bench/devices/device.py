"""`vlm-bench --device URL`: the way in."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from vlm_bench.devices.adb import Adb
from vlm_bench.devices.address import TERMUX_PORT, Address, parse
from vlm_bench.devices.job import Job
from vlm_bench.devices.phone import measure_with_llamacpp
from vlm_bench.devices.remote import measure_over_ssh
from vlm_bench.devices.ssh import LinkError, Ssh
from vlm_bench.devices.transfer import Keep, Say
from vlm_bench.results import Results
from vlm_models.errors import DependencyError, InputError


def measure_on(url: str, job: Job, *, say: Say, keep: Keep, binaries: Path | None = None) -> Results:
    """Measure `job` on the device at `url`; complete results whose environment names it.

    `keep` is called with each partial one as it is brought here, `say` with a line for each thing that happens.
    `binaries` is a folder of llama.cpp's programs for a phone (adb:// only). Raises InputError, DependencyError,
    CheckError, one line each; what was measured until then has gone to `keep`.
    """
    address = parse(url)
    if binaries is not None and address.scheme != "adb":
        raise InputError(f"--device-binaries are for a phone at adb://SERIAL, not for {address}: leave them out")
    if address.scheme == "ssh":
        with Ssh(address) as ssh:
            return measure_over_ssh(ssh, job, say=say, keep=keep)
    adb = Adb(address.host)
    if binaries is not None:
        return measure_with_llamacpp(adb, job, binaries, say=say, keep=keep)
    return _with_termux(adb, address, job, say, keep)


def _with_termux(adb: Adb, address: Address, job: Job, say: Say, keep: Keep) -> Results:
    """Through the ssh server of Termux: a port here leads to it, and is led there again when the phone was away."""
    there = address.port or TERMUX_PORT
    try:
        local = adb.forward(there)
    except LinkError as error:
        raise DependencyError(f"cannot reach {address} ({error}): 'adb devices' must list it as a device") from None

    def renew() -> None:
        with suppress(LinkError, DependencyError):
            adb.forward(there, local)

    alias = f"adb-{re.sub('[^A-Za-z0-9._-]', '-', address.host)}"  # a port says nothing of who listens there
    try:
        with Ssh(address, dial=("127.0.0.1", local), alias=alias, renew=renew) as ssh:
            return measure_over_ssh(ssh, job, say=say, keep=keep)
    finally:
        with suppress(LinkError, DependencyError):
            adb.end_forward(local)
