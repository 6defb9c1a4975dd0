"""An OpenSSH server on loopback with keys of its own, and a wire to it that can be cut."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SSHD = "/usr/sbin/sshd"


def listening(port: int = 0) -> socket.socket:
    """A TCP socket on loopback; a free port is one that nobody else has, whatever state it is in."""
    if port:
        return socket.create_server(("127.0.0.1", port))
    free = socket.socket()
    free.bind(("127.0.0.1", 0))  # without SO_REUSEADDR, by which two may be given the same one
    free.listen()
    return free


class Wire:
    """A TCP port that leads to another one: counts what is sent, and can be cut, frozen and mended.

    `cut_at` bytes sent it cuts itself.
    """

    def __init__(self, target: int) -> None:
        self._target, self._pairs = target, list[tuple[socket.socket, socket.socket]]()
        self.sent, self.cut_at = 0, float("inf")
        self._whole, self._flows = threading.Event(), threading.Event()
        self._whole.set()
        self._flows.set()
        self._listener = listening()
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End all connections and refuse new ones."""
        self._whole.clear()
        while self._pairs:
            _end(*self._pairs.pop())

    def freeze(self) -> None:
        """Nothing arrives any more, and nobody is told."""
        self._flows.clear()

    def mend(self) -> None:
        """New connections work; frozen ones have been given up by their owners."""
        while self._pairs:
            _end(*self._pairs.pop())
        self._whole.set()
        self._flows.set()

    def close(self) -> None:
        self.cut()
        self._flows.set()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self._whole.is_set():
                near.close()
                continue
            threading.Thread(target=self._join, args=(near,), daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        with near, socket.create_connection(("127.0.0.1", self._target)) as far:
            self._pairs.append((near, far))
            back = threading.Thread(target=self._pump, args=(far, near, False), daemon=True)
            back.start()
            self._pump(near, far, True)
            back.join()

    def _pump(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._flows.wait()
                self.sent += len(data) * counts
                if self.sent > self.cut_at:
                    self.cut_at = float("inf")
                    self.cut()
                sink.sendall(data)
        _end(source, sink)


@dataclass(frozen=True)
class Server:
    """A device reached over `wire`: `folder` is what it keeps, `keys` the configuration of client and server."""

    wire: Wire
    keys: Path
    folder: Path
    options: str = f"&python={sys.executable}"

    @property
    def url(self) -> str:
        return f"ssh://device{self.folder}?config={self.keys}/config{self.options}"


@contextmanager
def serving(place: Path) -> Iterator[Server]:
    """Start the server; `place` is an empty folder with a short path."""
    assert shutil.which("ssh"), "these tests need the OpenSSH client: apt-get install openssh-client"
    assert Path(SSHD).is_file(), f"these tests need {SSHD}: apt-get install openssh-server"
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # which sshd wants as root
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / name], check=True)
    shutil.copy(place / "user.pub", place / "authorized_keys")
    with listening() as free:
        port = free.getsockname()[1]
    settings = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": place / "host",
        "AuthorizedKeysFile": place / "authorized_keys",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "PermitRootLogin": "yes",
    }
    (place / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    with (place / "sshd.log").open("wb") as log:
        server = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(place / "sshd_config")], stdin=subprocess.DEVNULL, stderr=log
        )
    wire = Wire(port)
    try:
        _wait(port, server, place / "sshd.log")
        client = {
            "HostName": "127.0.0.1",
            "Port": wire.port,
            "User": getpass.getuser(),
            "IdentityFile": place / "user",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "UserKnownHostsFile": place / "known_hosts",
            "GlobalKnownHostsFile": os.devnull,
        }
        (place / "config").write_text(
            "Host device 127.0.0.1\n" + "".join(f"  {name} {value}\n" for name, value in client.items())
        )
        (place / "known_hosts").write_text(f"[127.0.0.1]:{wire.port} {(place / 'host.pub').read_text()}")
        yield Server(wire, place, place / "device")
    finally:
        wire.close()
        server.terminate()
        server.wait(10)


def _end(*sockets: socket.socket) -> None:
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while True:
        assert server.poll() is None, f"sshd ended: {log.read_text()}"
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            assert time.monotonic() < end, "sshd does not listen"
            time.sleep(0.05)
        else:
            return
