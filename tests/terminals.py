"""`vlm-run` in a pseudo-terminal of its own, typed into and read as a person would."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

CHILD = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C arrives as a signal
signal.signal(signal.SIGINT, signal.default_int_handler)
{before}
from vlm_runtime.cli import main
sys.argv = ["vlm-run", *sys.argv[1:]]
main()
"""
WITHOUT_PROMPT_TOOLKIT = "sys.modules['prompt_toolkit'] = None"
CTRL_C, CTRL_D, UP, TAB = "\x03", "\x04", "\x1b[A", "\t"
_CODES = re.compile(r"\x1b\[[0-9;?<>=]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07|\r")


class Screen:
    """A running chat: `type` writes to it, `wait` reads until a text is there."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process, self._master, self._seen, self.text = process, master, 0, ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def enter(self, line: str) -> None:
        self.type(line + "\r")

    def wait(self, text: str, seconds: float = 90) -> str:
        """What was shown since the last wait, up to and with `text`; control codes left out."""
        end = time.monotonic() + seconds
        while (at := self.text.find(text, self._seen)) < 0:
            if time.monotonic() > end or not self._read(end - time.monotonic()):
                raise AssertionError(f"no {text!r} after {self.text[self._seen :]!r}")
        begin, self._seen = self._seen, at + len(text)
        return self.text[begin : self._seen]

    def interrupt(self, text: str) -> str:
        """Ctrl-C at the prompt until `text` shows: Python's readline misses one that comes just between two keys."""
        for _ in range(5):
            self.type(CTRL_C)
            with contextlib.suppress(AssertionError):
                return self.wait(text, 15)
        return self.wait(text)

    def ended(self) -> int:
        """The exit code, once everything is read."""
        while self._read(90):
            pass
        return self.process.wait(90)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], max(seconds, 0))[0]:
            return False
        try:
            new = os.read(self._master, 65536)
        except OSError:  # Linux: the other side is closed
            return False
        self.text = _CODES.sub("", self.text + new.decode(errors="replace"))
        return bool(new)


@contextlib.contextmanager
def chat(
    *arguments: object, before: str = "", state: Path | None = None, stdout: Path | None = None
) -> Iterator[Screen]:
    """`vlm-run` with these arguments; `before` is run in it first, `state` is its folder for the history."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1"}
    environment["XDG_STATE_HOME"] = str(state) if state else os.devnull
    with contextlib.ExitStack() as closing:
        out = closing.enter_context(stdout.open("wb")) if stdout else slave
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD.format(before=before), *map(str, arguments)],
            stdin=slave,
            stdout=out,
            stderr=slave,
            start_new_session=True,
            env=environment,
        )
        os.close(slave)
        try:
            yield Screen(process, master)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
            os.close(master)
