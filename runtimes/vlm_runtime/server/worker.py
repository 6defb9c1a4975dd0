"""The one thread that runs the model: answers wait in a bounded line, and come out piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_runtime.answer import Answer, Request
from vlm_runtime.server.problems import RefusedError

if TYPE_CHECKING:
    from vlm_runtime.engine import Floats
    from vlm_runtime.vlm import VLM

Watch = Callable[[int, "Floats"], None]


@dataclass(frozen=True)
class Piece:
    """Text of an answer, as soon as it is certain."""

    text: str


Event = Piece | Answer


class Worker:
    """Answers one request at a time, the first come first.

    `places` may wait. An answer that takes longer than `seconds` ends there. `close` ends the thread.
    """

    def __init__(self, vlm: VLM, *, places: int, seconds: float) -> None:
        self._vlm, self._places, self._seconds = vlm, places, seconds
        self._line: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._entered, self._usual, self.draining, self._closed = 0, 1.0, False, False
        self._thread = threading.Thread(target=self._work, name="vlm-engine", daemon=True)
        self._thread.start()

    async def answers(self, prepare: Callable[[], Awaitable[Request]]) -> AsyncGenerator[Event, None]:
        """The pieces of one answer, and the whole at last; to close it takes it out of the line or ends it.

        `prepare` is called when there is room. Raises RefusedError (429 the line is full, 503 the server ends), what
        `prepare` raises, and what the model does.
        """
        self._enter()
        job = None
        try:
            job = _Job(await prepare(), asyncio.get_running_loop())
            with self._changed:
                self._line.append(job)
                self._changed.notify()
            while True:
                event = await job.events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Answer):
                    return
        finally:
            self._leave(job)

    def drain(self) -> None:
        """Take no one in any more; who waits is sent away, the answer that runs goes on."""
        with self._changed:
            self.draining = True
            waiting = list(self._line)
            self._line.clear()
        for job in waiting:
            job.tell(_ending())

    def close(self) -> None:
        """End the thread, the answer that runs at its next token."""
        self.drain()
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _enter(self) -> None:
        with self._changed:
            if self.draining:
                raise _ending()
            if self._entered > self._places:  # one is answered
                wait = min(max(math.ceil(self._usual * self._entered), 1), 60)
                raise RefusedError(
                    429,
                    f"{self._entered} requests are waiting already: try again in {wait} s",
                    code="queue_full",
                    headers={"Retry-After": str(wait)},
                )
            self._entered += 1

    def _leave(self, job: _Job | None) -> None:
        with self._changed:
            self._entered -= 1
            if job is not None:
                job.left = True
                with contextlib.suppress(ValueError):
                    self._line.remove(job)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._closed)
                if self._closed:
                    return
                job = self._line.popleft()
            start = time.perf_counter()
            try:
                self._say(job)
            except BaseException as error:  # whatever it was, it is told to the one who asked
                job.tell(error)
            self._usual += 0.2 * (time.perf_counter() - start - self._usual)

    def _say(self, job: _Job) -> None:
        pieces, begun = self._vlm.speak(job.request), time.perf_counter()
        job.request.timings_ms["queue"] = (begun - job.entered) * 1e3
        while not job.left and not self._closed:
            try:
                job.tell(Piece(next(pieces)))
            except StopIteration as stop:
                return job.tell(stop.value)
        return pieces.close()


class _Job:
    """A request in the line; its events are put in by the engine's thread and taken out in the loop's."""

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self.request, self.entered, self.left = request, time.perf_counter(), False
        self.events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self._loop = loop

    def tell(self, event: Event | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


def _ending() -> RefusedError:
    return RefusedError(
        503, "the server is shutting down: try again later", code="shutting_down", headers={"Retry-After": "5"}
    )
