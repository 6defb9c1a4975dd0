"""A phone through Android's own `adb` client: commands of its shell, files, and a way to Termux's ssh server."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vlm_bench.devices import transfer
from vlm_bench.devices.ssh import LinkError
from vlm_bench.devices.transfer import Say
from vlm_models.errors import DependencyError, InputError

T = TypeVar("T")

_CODE = "@vlm-bench exit code "  # in the output: older phones tell no exit code, and a lost link must not look like one
ANSWER_S = 60.0  # seconds that a command of a moment may take
_GONE = re.compile(
    r"device (?:'.*' not found|offline|still authorizing)|no devices|error: closed|connection reset|protocol fault|"
    r"couldn't read from device|failed to (?:read|write)|device unauthorized",
    re.IGNORECASE,
)


class Adb:
    """The phone with this serial number."""

    def __init__(self, serial: str) -> None:
        """Raises DependencyError where there is no adb, or no such phone that lets us in."""
        if shutil.which("adb") is None:
            raise DependencyError("--device adb:// needs Android's adb: install the platform tools (Debian: adb)")
        self.serial = serial
        try:
            state = self._run("get-state")[1].strip()
        except LinkError as error:
            raise DependencyError(self._absent(str(error))) from None
        if state != "device":
            raise DependencyError(self._absent(f"it is in state {state!r}"))

    def shell(self, command: str, *, timeout_s: float | None = ANSWER_S) -> str:
        """What a command of the phone's shell prints. Raises LinkError, or DependencyError where it fails there."""
        said, out = self._run("shell", "-T", "-n", f"{command}\necho {_CODE}$?", timeout_s=timeout_s, fails=False)
        text, found, code = out.rpartition(_CODE)
        if not found:
            raise LinkError(said or "the connection was closed")
        if int(code):
            raise DependencyError(f"adb://{self.serial}: {command[:80]!r} failed there ({said or text.strip()[-300:]})")
        return text

    def push(self, local: Path, there: str) -> None:
        """Copy a file. Raises as `shell` does, and InputError where there is no room."""
        self._run("push", str(local), there, timeout_s=None)

    def forward(self, port: int, local: int = 0) -> int:
        """A TCP port here that leads to `port` on the phone: `local`, or a free one. Raises as `shell` does."""
        said = self._run("forward", f"tcp:{local}", f"tcp:{port}")[1].strip()
        return local or int(said)

    def end_forward(self, local: int) -> None:
        """Raises as `shell` does."""
        self._run("forward", "--remove", f"tcp:{local}")

    def insist(self, ask: Callable[[], T], say: Say) -> T:
        """What `ask` returns, tried again for `transfer.PATIENCE_S` where the link is lost. Raises DependencyError."""
        end, told = time.monotonic() + transfer.PATIENCE_S, ""
        while True:
            try:
                return ask()
            except LinkError as error:
                if time.monotonic() > end:
                    raise DependencyError(
                        f"no link to adb://{self.serial} for {transfer.PATIENCE_S / 60:.0f} minutes ({error}): connect "
                        "it and measure again"
                    ) from None
                if told != str(error):
                    say(f"lost the link to adb://{self.serial} ({error}): trying again")
                    told = str(error)
                time.sleep(transfer.RETRY_S)

    def _run(self, *words: str, timeout_s: float | None = ANSWER_S, fails: bool = True) -> tuple[str, str]:
        """The last line on stderr, and stdout; where `fails`, an exit code is an error."""
        command = ["adb", "-s", self.serial, *words]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise LinkError(f"adb {words[0]} did not answer for {ANSWER_S:.0f} s") from None
        out, said = done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        last = lines[-1].removeprefix("adb: ").removeprefix("error: ")[:300] if lines else ""
        if done.returncode and _GONE.search(said):
            raise LinkError(last)
        if done.returncode and fails:
            complaint = next((line for line in out.splitlines() if "error: " in line), "")  # of push, on stdout
            why = last or complaint.partition("error: ")[2][-200:] or f"exit code {done.returncode}"
            if "No space left" in why:
                raise InputError(f"adb://{self.serial} is full ({why}): free some space there")
            raise DependencyError(f"adb://{self.serial}: adb {words[0]} failed ({why})")
        return last, out

    def _absent(self, reason: str) -> str:
        if "unauthorized" in reason:
            return f"adb://{self.serial} does not trust this machine: unlock it, allow USB debugging, and try again"
        return f"cannot reach adb://{self.serial} ({reason}): 'adb devices' must list it as a device"
