"""vlm-bench on a device: what is needed is copied there, the run survives a lost link, its results come back."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vlm_bench.devices import transfer
from vlm_bench.devices.address import Address
from vlm_bench.devices.job import Job, inputs
from vlm_bench.devices.ssh import LinkError, Ssh
from vlm_bench.devices.transfer import Keep, Say, copy, given_up, insist, local_file, runtime
from vlm_bench.results import Results, readable
from vlm_bench.results_file import read_results
from vlm_models.errors import BundleError, CheckError, DependencyError, VLMError

_LOG = 100_000  # last characters of a run's log that are kept
STOP_S = 20.0  # seconds that an interrupted run has to write what it measured
# Import name → what pip calls it: all that the copied sources need beside an engine.
NEEDED = {
    "numpy": "numpy",
    "PIL": "pillow",
    "tokenizers": "tokenizers",
    "jinja2": "jinja2",
    "typer": "typer",
    "rich": "rich",
}


def measure_over_ssh(ssh: Ssh, job: Job, *, say: Say, keep: Keep) -> Results:
    """Run `job` on the device that `ssh` reaches; its results, stamped with the address. `keep` gets each partial one.

    A lost link is tried again for `transfer.PATIENCE_S`; the run goes on meanwhile, and the same call takes it up
    later. Ctrl-C stops the run there. Raises what vlm-bench raised there, DependencyError for a device that cannot be
    reached or lacks what is needed, InputError for one without room.
    """
    address = ssh.address
    found = _probe(ssh)
    ssh.address = address = replace(address, folder=found["folder"])
    paths = inputs(job)
    files = {name: local_file(path) for name, path in paths.items()}
    sources = runtime() if address.runtime == "copied" else None
    wanted = {file.sha256: file for file in (*files.values(), *([sources] if sources else []))}
    copy(ssh, wanted, say)
    command = [*job.command(), "--json", "results.json"]
    laid = {name: file.sha256 for name, file in files.items()}
    request: dict[str, Any] = {"files": laid, "command": command, "runtime": sources.sha256 if sources else None}
    run = hashlib.sha256(json.dumps([request, address.python]).encode()).hexdigest()[:16]
    # The first request of a run may have arrived although its reply was lost: then it is not started again.
    started = insist(lambda: ssh.ask("start", run=run, **request)[0]["started"], ssh, say)
    where = "sources copied from here" if sources else "vlm-export installed there"
    say(f"{'running' if started else 'taking up the run'} on {address}, {found['executable']}, {where}")

    def bring(results: Results) -> None:
        keep(_stamped(results, address, paths, job))

    try:
        results, code, log = _follow(ssh, run, say, bring)
    except KeyboardInterrupt:
        with suppress(VLMError, LinkError):
            ssh.ask("stop", run=run, patience=STOP_S)
            _follow(ssh, run, say, bring)
            ssh.ask("forget", run=run)
        raise
    with suppress(LinkError):
        ssh.ask("forget", run=run)
    return _stamped(_ended(results, code, log, address), address, paths, job)


def _probe(ssh: Ssh) -> Mapping[str, Any]:
    """What is there. Raises DependencyError where it is too little."""
    address = ssh.address
    modules = {**NEEDED, **({"vlm_bench": "vlm-export"} if address.runtime == "installed" else {})}
    try:
        found = ssh.ask("probe", modules=list(modules))[0]
    except LinkError as error:
        raise DependencyError(
            f"cannot reach {address} ({error}): check that it is on, in this network, and that its ssh server listens"
        ) from None
    except IndexError:
        raise DependencyError(f"{address} answers, but its shell ran no {address.python}: see what it prints") from None
    version = tuple(int(part) for part in found["python"].split(".")[:2])
    if version < (3, 11):
        raise DependencyError(
            f"{address.python} on {address} is Python {found['python']}, 3.11 or newer is needed: "
            f"name another: {address}?python=/path/to/python3"
        )
    if found["missing"]:
        packages = " ".join(modules[name] for name in found["missing"])
        raise DependencyError(
            f"{found['executable']} on {address} lacks {packages}: run there {found['executable']} -m pip install "
            f"{packages} (and an engine, such as onnxruntime), or name another Python: {address}?python=…"
        )
    return found


def _follow(ssh: Ssh, run: str, say: Say, bring: Keep) -> tuple[Results | None, int | None, str]:
    """Until the run has ended: its results, exit code (None: it was killed there) and log."""
    results, end, told = None, math.inf, ""
    with TemporaryDirectory(prefix="vlm-") as folder:
        file = Path(folder) / "results.json"
        while True:
            reason, log = "it was closed", ""
            try:
                for reply in ssh.follow("watch", run=run):
                    end, told = math.inf, ""
                    log = (log + reply.get("log", ""))[-_LOG:]
                    if "results" in reply:
                        file.write_text(reply["results"], "utf-8")
                        results = read_results(file)
                        bring(results)
                        done = max((row.of for row in results.rows), default=0)
                        say(f"{ssh.address}: {done} of {results.settings.runs} repetitions")
                    if "rc" in reply:
                        return results, reply["rc"], log
            except LinkError as error:
                reason = str(error)
            end = min(end, time.monotonic() + transfer.PATIENCE_S)
            if time.monotonic() >= end:
                raise given_up(ssh.address, reason)
            if told != reason:
                say(f"lost the link to {ssh.address} ({reason}): the run goes on there, trying again")
                told = reason
            ssh.hang_up()
            time.sleep(transfer.RETRY_S)


def _ended(results: Results | None, code: int | None, log: str, address: Address) -> Results:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said = next((line[7:] for line in reversed(lines) if line.startswith("error: ")), None)
    if said is not None and code in (1, 2, 3):
        raise {1: CheckError, 2: BundleError, 3: DependencyError}[code](f"on {address}: {said}")
    if code is None:
        raise CheckError(f"the run on {address} was killed there (restarted, or out of memory?): run it again")
    if results is None or code:
        last = lines[-1] if lines else "nothing was said"
        raise CheckError(f"vlm-bench on {address} ended with exit code {code} ({last[:300]})")
    return results


def _stamped(results: Results, address: Address, paths: Mapping[str, Path], job: Job) -> Results:
    """With the device's address, the line that was typed here, and the pictures by their names here."""
    here = {readable(name): readable(path) for name, path in (*paths.items(), *job.images_there().items())}

    def at_home(image: str | None) -> str | None:
        return image if image is None or image.startswith("data:") else here.get(image)

    accuracy = tuple(
        replace(one, per_question=tuple(replace(q, image=at_home(q.image)) for q in one.per_question))
        for one in results.accuracy
    )
    return replace(
        results,
        command=job.typed or results.command,
        environment=replace(results.environment, device=str(address)),
        settings=replace(results.settings, images=tuple(here.get(name, name) for name in results.settings.images)),
        accuracy=accuracy,
        drift=tuple(replace(one, image=at_home(one.image)) for one in results.drift),
    )
