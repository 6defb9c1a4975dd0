"""Servers for tests: `vlm-serve` as a process of its own, or the same application in a thread of this one."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image

from vlm_runtime.engines import onnx
from vlm_runtime.server.listen import listen, make_server
from vlm_runtime.server.options import ServerOptions
from vlm_runtime.vlm import VLM, load

CHAT = "/v1/chat/completions"
_PATIENCE = 120.0  # a busy machine is not a fault


@dataclass(frozen=True)
class Process:
    """A running `vlm-serve`: its address, and the file that its stderr goes to."""

    url: str
    process: subprocess.Popen[str]
    errors: Path


@contextlib.contextmanager
def serving(bundle: Path, *options: object, key: str | None = None) -> Iterator[Process]:
    """`vlm-serve BUNDLE --port 0 …` until the end of the block; it ends well and says nothing on stderr by itself."""
    environment = {name: value for name, value in os.environ.items() if name != "VLM_API_KEY"}
    if key is not None:
        environment["VLM_API_KEY"] = key
    run = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    run += "from vlm_runtime.server.cli import main; main()"
    command = [sys.executable, "-c", run, str(bundle), "--port", "0", *map(str, options)]
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "stderr"
        with errors.open("w") as file:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, env=environment)
        try:
            line = _line(process)
            found = re.search(r"http://\S+", line)
            assert found, f"vlm-serve said {line!r} and {errors.read_text()!r}"
            yield Process(found[0], process, errors)
        finally:
            process.terminate()
            try:
                process.wait(_PATIENCE)
            finally:
                process.kill()
                assert process.stdout is not None
                process.stdout.close()


def _line(process: subprocess.Popen[str]) -> str:
    """The first line of stdout; "" when it ends before."""
    lines: queue.Queue[str] = queue.Queue()
    assert process.stdout is not None
    threading.Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True).start()  # type: ignore[union-attr]
    return lines.get(timeout=_PATIENCE)


@contextlib.contextmanager
def in_thread(vlm: VLM, options: ServerOptions | None = None) -> Iterator[tuple[str, uvicorn.Server]]:
    """The application under uvicorn in a thread: its address, and the server, whose `should_exit` ends it."""
    server = make_server(vlm, options or ServerOptions())
    with listen("127.0.0.1", 0) as socket:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            wait_for(lambda: server.started or not thread.is_alive())
            yield f"http://127.0.0.1:{socket.getsockname()[1]}", server
        finally:
            server.should_exit = True
            thread.join(_PATIENCE)
            assert not thread.is_alive()


def wait_for(true: Callable[[], object]) -> None:
    """Return when `true()` is; fail after minutes."""
    until = time.monotonic() + _PATIENCE
    while not true():
        assert time.monotonic() < until, "it did not come true"
        time.sleep(0.005)


class Gated:
    """A decoder that stops before each step until `let` allows it; counts what it was given."""

    def __init__(self, of: Any) -> None:
        self.of, self.prefills, self.steps = of, 0, 0
        self._allowed = threading.Semaphore(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        self.prefills += 1
        return self.of.prefill(embeds)

    def decode(self, embed: np.ndarray) -> np.ndarray:
        assert self._allowed.acquire(timeout=_PATIENCE)
        self.steps += 1
        return self.of.decode(embed)

    def let(self, steps: int = 1_000_000) -> None:
        """Allow so many steps more."""
        self._allowed.release(steps)


def load_gated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[VLM, Gated]:
    """A VLM of one KV cache whose decoder waits before each step."""
    made: list[Gated] = []

    def decoder(*arguments: Any) -> Gated:
        made.append(Gated(original(*arguments)))
        return made[0]

    original = onnx.decoder
    with monkeypatch.context() as patch:
        patch.setattr(onnx, "decoder", decoder)
        return load(folder, threads=1), made[0]


def data_url(image: Image.Image, form: str = "PNG") -> str:
    """A picture as clients send it."""
    file = io.BytesIO()
    image.save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def user(text: str, *images: Image.Image) -> dict[str, Any]:
    """A user's message, pictures first."""
    pictures = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}
