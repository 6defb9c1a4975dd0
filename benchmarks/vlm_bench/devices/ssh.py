"""Requests to the agent on a device, through the system's own `ssh`: its configuration, keys and known_hosts.

Each request is one command over one multiplexed connection: Python there reads the agent's source from stdin, then the
request. A host whose key is not known, or is another, is always refused, whatever the user's configuration allows.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from vlm_bench.devices import agent
from vlm_bench.devices.address import Address
from vlm_models.errors import DependencyError, InputError, VLMError

CONNECT_S = 10  # seconds until a host counts as unreachable
ALIVE_S = 5  # seconds between signs of life; three missing ones are a lost link
_BOOT = "import sys; exec(sys.stdin.buffer.read(int(sys.argv[1])))"
_LOST = 255  # ssh's own exit code; any other is the command's
_MEANINGS = (
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED|host key.*has changed", "changed"),
    (r"Host key verification failed|host key is known for|No matching host key|REVOKED HOST KEY", "unknown"),
    (r"Permission denied|Too many authentication failures|no mutual signature", "denied"),
    (r"Could not resolve hostname|Bad configuration option|Can't open user config|Bad owner or permissions", "wrong"),
)


class LinkError(Exception):
    """The connection broke or could not be made: `str(error)` is ssh's last line. Trying again may help."""


class Ssh:
    """A multiplexed connection to `address`, made at the first request and again after it was lost."""

    def __init__(
        self,
        address: Address,
        *,
        dial: tuple[str, int] | None = None,
        alias: str | None = None,
        renew: Callable[[], None] = lambda: None,
    ) -> None:
        """`dial` is the host and port that lead to the device, where `address` has none.

        `alias` is the name of its key in known_hosts, where that is not the host's; `renew` is called before it is
        dialled again. Raises DependencyError, InputError.
        """
        if shutil.which("ssh") is None:
            raise DependencyError("--device ssh:// needs the OpenSSH client: install openssh-client")
        if address.config is not None and not address.config.is_file():
            raise InputError(f"no such ssh configuration file: {address.config}")
        self.address = address
        self._host, self._port = dial or (address.host, address.port)
        self._alias, self._renew = alias, renew
        self._source = Path(agent.__file__).read_bytes()
        self._folder = tempfile.TemporaryDirectory(prefix="vlm-")  # short: a socket's path has 104 bytes at most

    def __enter__(self) -> Ssh:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit()
        self._folder.cleanup()

    def hang_up(self) -> None:
        """Drop the shared connection; the next request makes a new one."""
        self._exit()
        self._renew()

    def _exit(self) -> None:
        control = ["ssh", *self._options(), "-O", "exit", "--", self._host]
        subprocess.run(control, capture_output=True, check=False, timeout=30)

    def ask(self, do: str, data: Iterable[bytes] = (), **request: Any) -> list[dict[str, Any]]:
        """All replies to one request, `data` sent behind it. Raises LinkError, or VLMError where trying is in vain."""
        return list(self._replies(do, request, data, keep_open=False))

    def follow(self, do: str, **request: Any) -> Iterator[dict[str, Any]]:
        """Replies as they come. Raises as `ask` does."""
        return self._replies(do, request, (), keep_open=True)

    def _replies(
        self, do: str, request: Mapping[str, Any], data: Iterable[bytes], *, keep_open: bool
    ) -> Iterator[dict[str, Any]]:
        line = json.dumps({"do": do, "folder": self.address.folder, **request}).encode()
        with tempfile.TemporaryFile(dir=self._folder.name) as said:
            # stderr is no pipe: the shared connection stays in the background and would hold it open.
            process = subprocess.Popen(
                self._command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, start_new_session=True
            )
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):  # the agent ended early: its reply says why
                    process.stdin.write(self._source + line + b"\n")
                    for block in data:
                        process.stdin.write(block)
                    process.stdin.flush()
                    if not keep_open:
                        process.stdin.close()
                replies = 0
                for reply in _parsed(process.stdout):
                    replies += 1
                    self._refuse(reply)
                    yield reply
                code = process.wait()
                said.seek(0)
                text = said.read().decode("utf-8", "replace")
            finally:
                with contextlib.suppress(OSError):
                    process.stdin.close()
                process.kill()
                process.wait()
                process.stdout.close()
        if code == _LOST:
            raise self._explained(text)
        if code:
            raise self._broken(code, text, replies)

    def _command(self) -> list[str]:
        python = self.address.python
        home, python = ("~/", python[2:]) if python.startswith("~/") else ("", python)
        run = f"{home}{shlex.quote(python)} -c {shlex.quote(_BOOT)} {len(self._source)}"
        return ["ssh", *self._options(), "--", self._host, run]

    def _options(self) -> list[str]:
        address = self.address
        settings = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "ConnectTimeout": CONNECT_S,
            "ServerAliveInterval": ALIVE_S,
            "ServerAliveCountMax": 3,
            "ControlMaster": "auto",
            "ControlPersist": 60,
            "ControlPath": f"{self._folder.name}/s",
            "ClearAllForwardings": "yes",
            "RemoteCommand": "none",
            "RequestTTY": "no",
            "LogLevel": "ERROR",
            **({"HostKeyAlias": self._alias} if self._alias else {}),
        }
        options = ["-F", str(address.config)] if address.config else []
        options += ["-p", str(self._port)] if self._port else []
        options += ["-l", address.user] if address.user else []
        return options + [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]

    def _refuse(self, reply: Mapping[str, Any]) -> None:
        """Raises InputError for an error of the agent's file system."""
        if "error" in reply:
            where = f" ({reply['file']})" if reply.get("file") else ""
            raise InputError(
                f"{self.address}: {reply['error']}{where}: free some space there or name another folder: "
                f"{self.address}/FOLDER"
            )

    def _explained(self, text: str) -> VLMError | LinkError:
        """What ssh meant, as one line that says what to do."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        last = lines[-1] if lines else "the connection was closed"
        meaning = next((name for pattern, name in _MEANINGS if re.search(pattern, text, re.IGNORECASE)), None)
        shown, by_hand = str(self.address), self._by_hand()
        if meaning == "changed":
            place = re.search(r"Offending .*? in (.+)", text)
            line = f" (line {place[1].strip()})" if place else ""
            return DependencyError(
                f"{shown} has another host key than known_hosts says{line}, so it is refused: it was set up anew, or "
                f"somebody is in between; only if you know which, take that line out (ssh-keygen -R) and run {by_hand}"
            )
        if meaning == "unknown":
            return DependencyError(
                f"the host key of {shown} is not in known_hosts, so it is refused: run {by_hand} once, compare the "
                "fingerprint that it shows, and accept it"
            )
        if meaning == "denied":
            return DependencyError(
                f"{shown} refused to log in ({last}): {by_hand} must work without a password; "
                "name the key in ~/.ssh/config, add it by ssh-add, or bring it there by ssh-copy-id"
            )
        if meaning == "wrong":
            return DependencyError(f"cannot reach {shown} ({last}): correct the address or ~/.ssh/config")
        return LinkError(last)

    def _broken(self, code: int, text: str, replies: int) -> VLMError | LinkError:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit code {code}"
        if code in (126, 127) and not replies:
            return DependencyError(
                f"{self.address} has no {self.address.python} ({last}): install Python 3.11 or newer there, or name "
                f"it: {self.address}?python=/path/to/python3"
            )
        return DependencyError(
            f"{self.address.python} on {self.address} failed ({last[:300]}): Python 3.11 or newer is needed there; "
            f"name it: {self.address}?python=/path/to/python3"
        )

    def _by_hand(self) -> str:
        """The ssh command that a person would type."""
        address = self.address
        words = ["ssh", *(["-F", str(address.config)] if address.config else [])]
        words += ["-o", f"HostKeyAlias={self._alias}"] if self._alias else []
        words += ["-p", str(self._port)] if self._port else []
        words.append(f"{address.user}@{self._host}" if address.user else self._host)
        return f"'{shlex.join(words)}'"


def _parsed(lines: IO[bytes]) -> Iterator[dict[str, Any]]:
    mark = agent.MARK.encode()
    for line in lines:
        if line.startswith(mark) and line.endswith(b"\n"):  # one that broke off is none
            reply: dict[str, Any] = json.loads(line[len(mark) :])
            yield reply
