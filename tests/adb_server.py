"""Android's adb server with one phone, as far as the real `adb` client asks: its protocol on a TCP port.

The phone is a folder of this machine: /data/local/tmp in commands and pushed files is that folder, its shell is `sh`
with programs of its own first in PATH. Source: packages/modules/adb, SERVICES.TXT, SYNC.TXT, shell_protocol.h.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import threading
from pathlib import Path

from sshd import listening

ROOT = "/data/local/tmp"
PROPERTIES = {
    "ro.product.cpu.abilist": "x86_64,x86",
    "ro.product.manufacturer": "Acme",
    "ro.product.model": "Pad 3",
    "ro.soc.model": "AC100",
    "ro.build.version.release": "15",
}


class Phone:
    """A server on `port`; `plugged` False: the phone is not there, and what goes on there goes on."""

    def __init__(self, folder: Path, serial: str = "FAKE123") -> None:
        self.folder, self.serial, self.plugged, self.commands = folder, serial, True, list[str]()
        self.forwards: dict[int, socket.socket] = {}
        self.pushed, self.refuses, self.full = list[str](), "", False
        (folder / "bin").mkdir(parents=True)
        (folder / "tmp").mkdir()
        self.program("getprop", "".join(f"[ $1 = {k} ] && echo '{v}'\n" for k, v in PROPERTIES.items()) + "true\n")
        self.program("dumpsys", "[ $1 = battery ] && echo '  temperature: 314' || echo 'Thermal Status: 1'\n")
        self._open = set[socket.socket]()
        self._listener = listening()
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener, self._serve), daemon=True).start()

    def program(self, name: str, script: str) -> None:
        """A program of the phone, a shell script."""
        (self.folder / "bin" / name).write_text(f"#!/bin/sh\n{script}")
        (self.folder / "bin" / name).chmod(0o755)

    def unplug(self) -> None:
        """The phone is away: what is open is closed without a word."""
        self.plugged = False
        for one in [*self._open, *self.forwards.values()]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self.forwards.clear()

    def close(self) -> None:
        self.unplug()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self, listener: socket.socket, serve: object) -> None:
        with contextlib.suppress(OSError), listener:
            while True:
                near, _ = listener.accept()
                threading.Thread(target=self._guarded, args=(near, serve), daemon=True).start()

    def _guarded(self, near: socket.socket, serve: object) -> None:
        assert callable(serve)
        self._open.add(near)
        with near:
            with contextlib.suppress(OSError, EOFError):
                serve(near)
            with contextlib.suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)  # another thread may be reading
        self._open.discard(near)

    def _serve(self, near: socket.socket) -> None:
        chosen = False
        while True:
            request = _exactly(near, int(_exactly(near, 4), 16)).decode()
            if request == "host:version":
                near.sendall(b"OKAY00040029")
                return
            if self.refuses:
                near.sendall(b"FAIL%04x" % len(self.refuses) + self.refuses.encode())
                return
            chosen = chosen or self.serial in request
            if not self.plugged or not chosen:
                reason = f"device '{self.serial if not self.plugged else request.split(':')[-1]}' not found".encode()
                near.sendall(b"FAIL%04x" % len(reason) + reason)
                return
            if request.startswith("host:tport:serial:"):
                near.sendall(b"OKAY" + struct.pack("<q", 1))
            elif request.startswith("host:transport:"):
                near.sendall(b"OKAY")
            elif request.endswith(":features"):
                _answer(near, "shell_v2,cmd")
                return
            elif request.endswith(":get-state"):
                _answer(near, "device")
                return
            elif ":forward:" in request:
                self._forward(near, request)
                return
            elif ":killforward:" in request:
                self.forwards.pop(int(request.rpartition(":")[2])).shutdown(socket.SHUT_RDWR)
                near.sendall(b"OKAYOKAY")
                return
            else:
                near.sendall(b"OKAY")
                (self._sync if request == "sync:" else self._shell)(near, request)
                return

    def _shell(self, near: socket.socket, request: str) -> None:
        assert request.startswith("shell,v2"), request
        command = request.partition(":")[2]
        self.commands.append(command)
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        with subprocess.Popen(
            ["sh", "-c", command.replace(ROOT, str(self.folder / "tmp"))],
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            threading.Thread(target=_end_with, args=(near, process), daemon=True).start()
            out, said = process.communicate()
        for kind, data in ((1, out), (2, said), (3, bytes([process.returncode & 255]))):
            if data:
                near.sendall(struct.pack("<BI", kind, len(data)) + data)

    def _sync(self, near: socket.socket, request: str) -> None:
        while True:
            kind, length = struct.unpack("<4sI", _exactly(near, 8))
            if kind == b"QUIT":
                return
            name = _exactly(near, length).decode()
            if kind == b"STAT":
                near.sendall(b"STAT" + bytes(12))
                continue
            assert kind == b"SEND", kind
            self.pushed.append(name)
            if self.full:
                reason = b"couldn't write: No space left on device"
                near.sendall(b"FAIL" + struct.pack("<I", len(reason)) + reason)
                return
            there = Path(name.rpartition(",")[0].replace(ROOT, str(self.folder / "tmp")))
            with there.open("wb") as file:
                while (block := struct.unpack("<4sI", _exactly(near, 8)))[0] == b"DATA":
                    file.write(_exactly(near, block[1]))
            near.sendall(b"OKAY" + bytes(4))

    def _forward(self, near: socket.socket, request: str) -> None:
        local, _, there = request.partition(":forward:")[2].partition(";")
        listener = listening(int(local.removeprefix("norebind:").removeprefix("tcp:")))
        port, target = listener.getsockname()[1], int(there.removeprefix("tcp:"))
        self.forwards[port] = listener

        def relay(one: socket.socket) -> None:
            with socket.create_connection(("127.0.0.1", target)) as other:
                self._open.add(other)
                back = threading.Thread(target=_pump, args=(other, one), daemon=True)
                back.start()
                _pump(one, other)
                back.join()
                self._open.discard(other)

        threading.Thread(target=self._accept, args=(listener, relay), daemon=True).start()
        near.sendall(b"OKAYOKAY" + (b"%04x%d" % (len(str(port)), port)))


def _end_with(near: socket.socket, process: subprocess.Popen[bytes]) -> None:
    """A shell ends with its connection; what it detached does not."""
    with contextlib.suppress(OSError):
        while near.recv(1 << 12):
            pass
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGHUP)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    for one in (source, sink):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def _answer(near: socket.socket, text: str) -> None:
    near.sendall(b"OKAY" + b"%04x" % len(text) + text.encode())


def _exactly(source: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        block = source.recv(count - len(data))
        if not block:
            raise EOFError
        data += block
    return data
