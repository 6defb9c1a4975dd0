"""Responses that end with their client: a stream of events, and a whole answer that nobody waits for any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from typing import TYPE_CHECKING, TypeVar

from fastapi.responses import Response

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

T = TypeVar("T")


async def unless_left(receive: Receive, made: Awaitable[T]) -> T | None:
    """What `made` gives, or None where the client left before: then `made` is cancelled."""
    making, leaving = asyncio.ensure_future(made), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({making, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await making if making.done() else None
    finally:
        making.cancel()
        leaving.cancel()
        await asyncio.gather(making, leaving, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, one for each of `lines`; that and `source` are closed when it ends or the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncGenerator[bytes, None], source: AsyncGenerator[object, None]) -> None:
        self._lines, self._source = lines, source
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them as they come."""
        try:
            await unless_left(receive, self._send(send))
        finally:
            await self._lines.aclose()
            await self._source.aclose()  # lines that never began do not close it

    async def _send(self, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for line in self._lines:
                await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # the client left between two looks
            return


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
