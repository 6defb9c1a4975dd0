"""Addresses of devices: `ssh://user@host:port/folder?python=…&config=…` and `adb://SERIAL?port=…`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, unquote

from vlm_models.errors import InputError

FOLDER = "~/.cache/vlm-bench"
TERMUX_PORT = 8022
_ALLOWED = "give ssh://USER@HOST:PORT/FOLDER or adb://SERIAL, such as ssh://jetson or adb://R5CT10ABCDE"
_OPTIONS = ("python", "runtime", "config", "user", "port")
_SPACES = re.compile(r"[\s\x00-\x1f]")


@dataclass(frozen=True)
class Address:
    """Where a device is, and what to use there.

    `host` is a name of ~/.ssh/config, a host or an address (ssh), or a serial number (adb). `folder` keeps what was
    copied; `python` runs there; `runtime` "copied" (this program's own sources) or "installed" (vlm-export as it is
    installed there). `config` is an ssh configuration file in place of the user's.
    """

    scheme: Literal["ssh", "adb"]
    host: str
    user: str | None = None
    port: int | None = None
    folder: str = FOLDER
    python: str = "python3"
    runtime: Literal["copied", "installed"] = "copied"
    config: Path | None = None

    def __str__(self) -> str:
        """As people name it, and as results are stamped: without the options."""
        port = f":{self.port}" if self.port and self.scheme == "ssh" else ""
        user = f"{self.user}@" if self.user and self.scheme == "ssh" else ""
        host = f"[{self.host}]" if ":" in self.host and self.scheme == "ssh" else self.host
        return f"{self.scheme}://{user}{host}{port}"


def parse(url: str) -> Address:
    """The address that `url` names. Raises InputError, one line, for anything that is none."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("ssh", "adb"):
        raise InputError(f"{url!r} is no device: {_ALLOWED}")
    place, _, query = rest.partition("?")
    options = _options(url, query)
    machine, slash, folder = place.partition("/")
    folder = unquote(f"{slash}{folder}")
    folder = folder[1:] if folder.startswith("/~") else folder
    user, port = options.get("user"), options.get("port")
    if scheme == "ssh":
        user_in, at, machine = machine.rpartition("@")
        user = unquote(user_in) if at else user
        if user and ":" in user:
            raise InputError(f"{scheme}://…@{machine} holds a password: use a key (ssh-copy-id) and leave it out")
        found = re.fullmatch(r"\[([^\[\]]+)\](?::(.*))?|([^:\[\]]*)(?::(.*))?", unquote(machine))
        if not found:
            raise InputError(f"{url!r} is no device: {_ALLOWED}; an IPv6 address stands in [ ]")
        machine = found[1] or found[3] or ""
        port = found[2] or found[4] or port
    if not machine or _odd(machine) or (user is not None and (not user or _odd(user))):
        raise InputError(f"{url!r} names no {'host' if scheme == 'ssh' else 'serial number'}: {_ALLOWED}")
    if port is not None and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InputError(f"{url!r} has port {port!r}: give a number from 1 to 65535")
    runtime = options.get("runtime", "copied")
    if runtime not in ("copied", "installed"):
        raise InputError(f"{url!r} has runtime {runtime!r}: choose copied or installed")
    return Address(
        "ssh" if scheme == "ssh" else "adb",
        machine,
        user,
        int(port) if port else None,
        folder if folder.strip("/") else FOLDER,
        options.get("python", "python3"),
        "installed" if runtime == "installed" else "copied",
        Path(options["config"]) if "config" in options else None,
    )


def _options(url: str, query: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name, value in options.items():
        if name not in _OPTIONS or not value or "\0" in value or "\n" in value:
            raise InputError(f"{url!r} has the option {name}={value!r}: choose among {', '.join(_OPTIONS)}")
    return options


def _odd(word: str) -> bool:
    """A word that ssh or adb would take for an option, or that cannot be a name."""
    return word.startswith("-") or _SPACES.search(word) is not None
