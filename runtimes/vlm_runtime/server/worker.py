"""The one thread that runs the model: answers wait in a bounded line, and come out piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_runtime.answer import Answer, Request
from vlm_runtime.server.logprobs import Scored, score
from vlm_runtime.server.problems import RefusedError

if TYPE_CHECKING:
    from vlm_runtime.engine import Floats
    from vlm_runtime.server.metrics import Metrics
    from vlm_runtime.vlm import VLM

_USUAL_SECONDS = 1.0  # what an answer is taken to need before there was one
_PREPARED = 8  # requests whose pictures are in memory as pixel values; the others wait as they came


@dataclass(frozen=True)
class Piece:
    """Text of an answer as soon as it is certain, and its tokens where they are scored."""

    text: str
    scored: tuple[Scored, ...] = ()


Event = Piece | Answer


class Worker:
    """Answers one request at a time, the first come first; `places` may wait.

    An answer that takes longer than `seconds` ends there. `close` ends the thread.
    """

    def __init__(self, vlm: VLM, metrics: Metrics, *, places: int, seconds: float) -> None:
        self._vlm, self._metrics, self._places, self._seconds = vlm, metrics, places, seconds
        self._line: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._entered, self._usual = 0, _USUAL_SECONDS
        self._running, self._draining, self._closed = False, False, False
        self._prepared = asyncio.Semaphore(_PREPARED)  # first come, first served
        self._thread = threading.Thread(target=self._work, name="vlm-engine", daemon=True)
        self._thread.start()
        metrics.show(lambda: max(self._entered - self._running, 0), lambda: self._running)

    async def answers(
        self, prepare: Callable[[], Awaitable[Request]], best: int | None = None
    ) -> AsyncGenerator[Event, None]:
        """The pieces of one answer, and the whole at last; to close it takes it out of the line or ends it.

        `prepare` is called when there is a place. `best`: score each token and so many best ones beside it. Raises
        RefusedError (429 the line is full, 503 the server ends), what `prepare` raises, and what the model does.
        """
        self._enter()
        entered, job = time.perf_counter(), None
        try:
            async with self._prepared:
                begun = time.perf_counter()
                request = await prepare()
                entered += time.perf_counter() - begun
                job = _Job(request, best, entered, asyncio.get_running_loop())
                self._append(job)
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
            self._draining = True
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
            if self._draining:
                raise _ending()
            if self._entered > self._places:  # the one that is answered does not wait
                wait = min(max(math.ceil(self._usual * self._entered), 1), 60)
                raise RefusedError(
                    429,
                    f"the queue of {self._places} requests is full: try again in {wait} s",
                    code="queue_full",
                    headers={"Retry-After": str(wait)},
                )
            self._entered += 1

    def _append(self, job: _Job) -> None:
        with self._changed:
            if self._draining:
                raise _ending()
            self._line.append(job)
            self._changed.notify()

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
                self._running = True
            start = time.perf_counter()
            try:
                self._say(job)
            except BaseException as error:  # whatever it was, it is told to the one who asked
                job.tell(error)
            self._usual += 0.2 * (time.perf_counter() - start - self._usual)
            self._running = False

    def _say(self, job: _Job) -> None:
        begun, encoded = time.perf_counter(), self._vlm.encoded
        job.request.timings_ms["queue"] = (begun - job.entered) * 1e3
        eos, until, scored = self._vlm.spec.prompt.eos_token_ids, begun + self._seconds, list[Scored]()

        def watch(token: int, logits: Floats) -> bool:
            if job.best is not None and token not in eos:
                scored.append(score(token, logits, job.best))
            return not (job.left or self._closed) and time.perf_counter() < until

        pieces = self._vlm.speak(dataclasses.replace(job.request, watch=watch))
        while True:
            try:
                text = next(pieces)
            except StopIteration as stop:
                answer = stop.value
                break
            job.tell(Piece(text, tuple(scored)))
            scored.clear()
        if self._closed:
            raise _ending()
        if not job.left:
            self._metrics.answered(job.request, answer, self._vlm.encoded - encoded)
        if scored:
            job.tell(Piece("", tuple(scored)))
        job.tell(answer)


class _Job:
    """A request in the line since `entered`; the engine's thread puts events in, the loop's takes them out."""

    def __init__(self, request: Request, best: int | None, entered: float, loop: asyncio.AbstractEventLoop) -> None:
        self.request, self.best, self.entered, self.left = request, best, entered, False
        self.events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self._loop = loop

    def tell(self, event: Event | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


def _ending() -> RefusedError:
    return RefusedError(
        503, "the server is shutting down: try again later", code="shutting_down", headers={"Retry-After": "5"}
    )
