"""The process around the application: its port, its signals and its end."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import typer
import uvicorn

from vlm_models.errors import InputError
from vlm_runtime.server.app import make_app
from vlm_runtime.server.connection import connection_class

if TYPE_CHECKING:
    from fastapi import FastAPI

    from vlm_runtime.server.options import ServerOptions
    from vlm_runtime.vlm import VLM


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A TCP socket bound to `host` and `port` (0: a free one). Raises InputError where it cannot be had."""
    made = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        if sys.platform != "win32":  # there it would let two servers have one port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, UnicodeError) as error:
        if made is not None:
            made.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen on {host} port {port} ({reason}): choose another --host or --port") from None
    with made:
        yield made


def run(vlm: VLM, options: ServerOptions, listening: socket.socket, *, grace: float) -> None:
    """Serve until SIGTERM or Ctrl-C; the answer that runs then has `grace` seconds, who waits gets 503."""
    ready = f"{vlm.spec.name}: {_address(listening)} ({_engines(vlm)}); Ctrl-C ends"
    server = make_server(vlm, options, grace=grace, ready=lambda: typer.echo(ready))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again when all is done
    server.run(sockets=[listening])


def make_server(
    vlm: VLM, options: ServerOptions, *, grace: float = 10.0, ready: Callable[[], object] = lambda: None
) -> uvicorn.Server:
    """uvicorn around the application; `ready` is called when clients may come. It ends when `should_exit` is set."""
    app = make_app(vlm, options)
    config = uvicorn.Config(
        app,
        http=connection_class(options.limits),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(grace),
    )
    return _Server(config, app, ready)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, app: FastAPI, ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._app, self._ready = app, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.worker.drain()
        await super().shutdown(sockets)


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _engines(vlm: VLM) -> str:
    names = sorted(set(vlm.engines.values()))
    return names[0] if len(names) == 1 else ", ".join(f"{part}: {name}" for part, name in vlm.engines.items())
