"""The ASGI application: OpenAI's routes over one VLM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import datetime
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from vlm_models.errors import VLMError
from vlm_runtime.answer import Answer
from vlm_runtime.server import page
from vlm_runtime.server.auth import Access, guarded
from vlm_runtime.server.conversation import Preparation
from vlm_runtime.server.images import image_policy
from vlm_runtime.server.limits import limited
from vlm_runtime.server.logprobs import Scored, TokenTexts
from vlm_runtime.server.metrics import CONTENT_TYPE, Metrics
from vlm_runtime.server.openapi import describe, responses
from vlm_runtime.server.options import ServerOptions
from vlm_runtime.server.problems import RefusedError, refused
from vlm_runtime.server.replies import Reply, event
from vlm_runtime.server.schema import ChatRequest, Completion, Health, Models, Served
from vlm_runtime.server.stream import EventStream, unless_left
from vlm_runtime.server.worker import Event, Worker

if TYPE_CHECKING:
    from vlm_runtime.vlm import VLM

_log = logging.getLogger("vlm_runtime.server")
_OUTCOMES = {429: "queue_full"}


def make_app(vlm: VLM, options: ServerOptions) -> FastAPI:
    """The application: OpenAI's routes, /health, /metrics and the chat page.

    `app.state.worker` runs the model in a thread of its own, which ends with the app's lifespan. Raises InputError for
    options that cannot be.
    """
    access = Access(options.api_key, options.origins, options.loopback)
    metrics = Metrics()
    worker = Worker(vlm, metrics, places=options.queue, seconds=options.limits.seconds)
    chats = _Chats(vlm, options, worker, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    app = FastAPI(title="vlm-serve", docs_url=None, redoc_url=None, lifespan=lifespan, routes=page.routes())
    app.state.worker = worker
    app.add_middleware(limited, limits=options.limits)
    app.add_middleware(guarded, access=access)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return refused(error).response()

    @app.exception_handler(HTTPException)
    async def missed(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return RefusedError(error.status_code, message, headers=error.headers).response()

    @app.get("/health", response_model=Health, responses=responses(open_to_all=True))
    async def health() -> Response:
        return JSONResponse({"status": "ok", "api_key": options.api_key is not None})

    @app.get("/metrics", response_class=Response, responses=responses(text=CONTENT_TYPE))
    async def prometheus() -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    @app.get("/v1/models", response_model=Models, responses=responses())
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_served(vlm, options, chats.name)]})

    @app.post("/v1/chat/completions", response_model=Completion, responses=responses(chat=True))
    async def chat(request: Request) -> Response:
        """Answer a conversation, whole or with `stream` as server-sent events of Chunks."""
        return await chats.respond(request)

    describe(app, chats.name, key=options.api_key is not None)
    return app


class _Chats:
    """Requests to /v1/chat/completions."""

    def __init__(self, vlm: VLM, options: ServerOptions, worker: Worker, metrics: Metrics) -> None:
        self.name = options.model_name or vlm.spec.name
        self._fingerprint, self._texts = f"fp_{vlm.spec.fingerprint[:12]}", TokenTexts(vlm.tokenizer)
        self._worker, self._metrics = worker, metrics
        self._preparation = Preparation(vlm, image_policy(options.image_hosts, options.limits))

    async def respond(self, request: Request) -> Response:
        """The answer, or why there is none."""
        started = time.perf_counter()
        try:
            asked = await self._preparation.parse(await request.body())
            if asked.model not in (None, self.name):
                message = f"there is no model {asked.model!r:.100}: this server has {self.name!r}"
                raise RefusedError(404, message, param="model", code="model_not_found")
            return await self._answered(request, asked, started)
        except Exception as error:
            return self._refused(error).response()

    async def _answered(self, request: Request, asked: ChatRequest, started: float) -> Response:
        scores, options = bool(asked.logprobs), asked.stream_options
        usage = options is not None and bool(options.include_usage)
        reply = Reply(self.name, self._fingerprint, self._texts, scores, usage)
        best = (asked.top_logprobs or 0) if scores else None
        events = self._worker.answers(lambda: self._preparation.request(asked, started), best)
        if asked.stream:
            first = await unless_left(request.receive, anext(events))
            if first is not None:
                return EventStream(self._lines(reply, first, events), events)
        else:
            whole = await unless_left(request.receive, _collected(events))
            if whole is not None:
                self._metrics.ended("answered")
                return JSONResponse(reply.whole(*whole))
        self._metrics.ended("left")
        return Response(status_code=499)  # nobody reads it

    async def _lines(
        self, reply: Reply, first: Event, rest: AsyncGenerator[Event, None]
    ) -> AsyncGenerator[bytes, None]:
        outcome = "left"
        try:
            yield reply.first()
            now = first
            while not isinstance(now, Answer):
                yield reply.piece(now.text, now.scored)
                now = await anext(rest)
            outcome = "answered"
            yield reply.last(now)
        except Exception as error:
            outcome = ""
            yield event(self._refused(error).body)
        finally:
            await rest.aclose()
            if outcome:
                self._metrics.ended(outcome)

    def _refused(self, error: Exception) -> RefusedError:
        """What the client is told; a bug goes into the log."""
        problem = refused(error)
        if problem.status == 500 and not isinstance(error, VLMError):
            _log.error("an answer failed", exc_info=error)
        traceback.clear_frames(error.__traceback__)  # they hold the body, in a cycle that waits for the collector
        self._metrics.ended(_OUTCOMES.get(problem.status, "failed" if problem.status >= 500 else "refused"))
        return problem


async def _collected(events: AsyncGenerator[Event, None]) -> tuple[Answer, list[Scored]]:
    scored: list[Scored] = []
    async with contextlib.aclosing(events):
        async for now in events:
            if isinstance(now, Answer):
                return now, scored
            scored += now.scored
    raise AssertionError("an answer ends with the whole")


def _served(vlm: VLM, options: ServerOptions, name: str) -> dict[str, object]:
    manifest = vlm.bundle.manifest
    served = Served(
        id=name,
        object="model",
        created=int(datetime.fromisoformat(manifest.created).timestamp()),
        owned_by="vlm-serve",
        engines=vlm.engines,
        precisions={part: manifest.parts[part][engine].precision for part, engine in vlm.engines.items()},
        max_context=vlm.max_context,
    )
    return served.model_dump()
