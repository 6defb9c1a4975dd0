"""uvicorn's HTTP/1.1 connection with the patience of `Limits`: slow heads, endless bodies, readers that do not read.

A client that closes its side has left (a half-closed connection cannot be told from one), as uvicorn sees it.
"""

from __future__ import annotations

import asyncio
import sys
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from vlm_runtime.server.limits import Limits, error_json

_LINGER_SECONDS = 2.0  # how long the rest of a body is thrown away after its answer


def connection_class(limits: Limits) -> type[H11Protocol]:
    """The class for `uvicorn.Config(http=…)`."""

    class Connection(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self._end(503, f"all {limits.connections} connections are in use: try again in a moment")
            else:
                self._timer = self.loop.call_later(limits.header_seconds, self._no_head)

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer = _stop(self._timer)
            self._stalled = _stop(self._stalled)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def send_400_response(self, msg: str) -> None:
            """What is no HTTP is refused in the form of all errors; the request that it was part of has ended."""
            error, cycle = sys.exception(), self.cycle
            status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
            if cycle is not None and cycle.more_body and cycle.response_started:
                status = 0  # that request has its answer
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
            self._end(status, "this is no valid HTTP/1.1 request")

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self._stalled or self.loop.call_later(limits.stall_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._stalled = _stop(self._stalled)
            super().resume_writing()

        def _watch(self) -> None:
            """The timer of what the client owes now: the rest of a head, or of a body that was answered already."""
            answered = self.cycle is not None and self.cycle.response_complete
            if self.transport.is_closing():
                self._timer = _stop(self._timer)
            elif self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
                self._timer = self._timer or self.loop.call_later(limits.header_seconds, self._no_head)
            elif self.conn.their_state is h11.SEND_BODY and answered:
                self._timer = self._timer or self.loop.call_later(_LINGER_SECONDS, self.transport.close)
            elif self.conn.their_state is not h11.IDLE or self.cycle is not None:
                self._timer = _stop(self._timer)

        def _no_head(self) -> None:
            silent = not self.conn.trailing_data[0]
            self._end(0 if silent else 408, f"the request did not arrive within {limits.header_seconds:g} seconds")

        def _end(self, status: int, message: str) -> None:
            """Say why, unless `status` is 0, and close."""
            if status and not self.transport.is_closing():
                self.transport.write(_response(status, message))
            self.transport.close()

    return Connection


def _response(status: int, message: str) -> bytes:
    content = error_json(status, message)
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return head.encode("ascii") + b"content-length: %d\r\n\r\n" % len(content) + content


def _stop(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """No timer, in its place."""
    if timer is not None:
        timer.cancel()
    return None
