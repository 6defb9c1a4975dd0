"""Copies to a device: only what it lacks, from where the last try broke off, checked by SHA-256 on arrival."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vlm_bench.devices import source
from vlm_bench.devices.address import Address
from vlm_bench.devices.ssh import LinkError, Ssh
from vlm_bench.results import Results, readable
from vlm_models.errors import DependencyError, InputError

T = TypeVar("T")
Say = Callable[[str], None]
"""Told what happens, a line at a time."""
Keep = Callable[[Results], None]
"""Given what was measured so far."""

PATIENCE_S = 600.0  # how long a lost link is tried again
RETRY_S = 3.0
MARGIN = 256 << 20  # bytes that must stay free on the device
_BLOCK = 1 << 20
_TELL_S = 5.0
_TRIES = 3  # copies that arrive damaged


@dataclass(frozen=True)
class File:
    """A file to copy: where it is here, or its content; what it is by content."""

    sha256: str
    size: int
    local: Path | None = None
    content: bytes = b""


def local_file(path: Path) -> File:
    """A file of this machine. Raises InputError where it cannot be read."""
    try:
        with path.open("rb") as opened:
            return File(hashlib.file_digest(opened, "sha256").hexdigest(), path.stat().st_size, path)
    except OSError as error:
        raise InputError(f"cannot read {readable(path)}: {error.strerror or error}") from None


def runtime() -> File:
    """What `source.archive` makes."""
    content = source.archive()
    return File(hashlib.sha256(content).hexdigest(), len(content), None, content)


def copy(ssh: Ssh, wanted: Mapping[str, File], say: Say) -> None:
    """Send those of `wanted` (SHA-256 → file) that the device lacks.

    Raises InputError where it has no room, DependencyError where the link stays away for PATIENCE_S.
    """
    damaged = 0
    while True:
        reply = insist(
            lambda: ssh.ask("have", files={sha256: file.size for sha256, file in wanted.items()})[0], ssh, say
        )
        lacking: dict[str, int] = reply["lacking"]
        if not lacking:
            return
        todo = [(wanted[sha256], min(there, wanted[sha256].size)) for sha256, there in lacking.items()]
        need = sum(file.size - there for file, there in todo)
        if reply["free"] < need + MARGIN:
            raise InputError(
                f"{ssh.address} has {megabytes(reply['free'])} free in {ssh.address.folder}, the copy takes "
                f"{megabytes(need)} and {megabytes(MARGIN)} must stay: free some, or name another folder: "
                f"{ssh.address}/FOLDER"
            )
        say(f"copying {megabytes(need)} to {ssh.address}")
        with suppress(LinkError):
            order = [(file.sha256, file.size, there) for file, there in todo]
            last = ssh.ask("receive", _content(todo, need, say), files=order)[-1:]
            damaged += any("damaged" in reply for reply in last)
            if damaged >= _TRIES:
                raise InputError(f"a file arrives damaged on {ssh.address} every time: check its disk and memory")
            if last and "done" in last[0]:
                return
        ssh.hang_up()
        time.sleep(RETRY_S)


def _content(todo: list[tuple[File, int]], need: int, say: Say) -> Iterator[bytes]:
    sent, told = 0, time.monotonic()
    for file, offset in todo:
        if file.local is None:
            yield file.content[offset:]
            sent += file.size - offset
            continue
        left = file.size - offset
        with file.local.open("rb") as opened:
            opened.seek(offset)
            while left and (block := opened.read(min(_BLOCK, left))):
                yield block
                left -= len(block)
                sent += len(block)
                if time.monotonic() - told > _TELL_S:
                    told = time.monotonic()
                    say(f"copied {megabytes(sent)} of {megabytes(need)}")
        if left:
            raise InputError(f"{file.local} became shorter while it was copied: try again when nobody writes it")


def insist(ask: Callable[[], T], ssh: Ssh, say: Say) -> T:
    """What `ask` returns, tried again for PATIENCE_S where the link is lost."""
    end, told = time.monotonic() + PATIENCE_S, ""
    while True:
        try:
            return ask()
        except (LinkError, IndexError) as error:  # IndexError: the link broke before the reply
            if time.monotonic() > end:
                raise given_up(ssh.address, str(error)) from None
            if told != str(error):
                say(f"lost the link to {ssh.address} ({error}): trying again")
                told = str(error)
            ssh.hang_up()
            time.sleep(RETRY_S)


def given_up(address: Address, reason: str) -> DependencyError:
    """The error of a link that stayed away."""
    return DependencyError(
        f"no link to {address} for {PATIENCE_S / 60:.0f} minutes ({reason}): what was started there goes on; give the "
        "same command again to take it up"
    )


def megabytes(count: float) -> str:
    """A size for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
