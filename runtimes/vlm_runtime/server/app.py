"""The ASGI application: OpenAI's routes over one VLM."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from vlm_runtime.answer import Answer
from vlm_runtime.server.auth import Access, guarded
from vlm_runtime.server.conversation import Preparation, from_data_url
from vlm_runtime.server.limits import limited
from vlm_runtime.server.options import ServerOptions
from vlm_runtime.server.problems import RefusedError, refused
from vlm_runtime.server.schema import ChatRequest
from vlm_runtime.server.worker import Event, Worker

if TYPE_CHECKING:
    from vlm_runtime.vlm import VLM


def make_app(vlm: VLM, options: ServerOptions) -> FastAPI:
    """The application; `app.state.worker` runs the model from the start of the app's lifespan to its end.

    Raises InputError for options that cannot be.
    """
    name, limits = options.model_name or vlm.spec.name, options.limits
    access = Access(options.api_key, options.origins, options.loopback)
    worker = Worker(vlm, places=options.queue, seconds=limits.seconds)
    preparation = Preparation(vlm, limits, from_data_url)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    app = FastAPI(title="vlm-serve", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.worker = worker
    app.add_middleware(limited, limits=limits)
    app.add_middleware(guarded, access=access)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return refused(error).response()

    @app.exception_handler(HTTPException)
    async def missed(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return RefusedError(error.status_code, message, headers=error.headers).response()

    @app.get("/health")
    async def health() -> Response:
        status = "draining" if worker.draining else "ok"
        content = {"status": status, "api_key": options.api_key is not None}
        return JSONResponse(content, 503 if worker.draining else 200)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_served(vlm, name)]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        started = time.perf_counter()
        try:
            asked = await preparation.parse(await request.body())
            if asked.model not in (None, name):
                message = f"there is no model {asked.model!r:.100}: this server has {name!r}"
                raise RefusedError(404, message, param="model", code="model_not_found")
            events = worker.answers(lambda: preparation.request(asked, started))
            return await _unless_left(request, _whole(events, asked, vlm, name))
        except Exception as error:
            problem = refused(error)
            if problem.status == 500:
                raise
            return problem.response()

    return app


def _served(vlm: VLM, name: str) -> dict[str, Any]:
    manifest = vlm.bundle.manifest
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "vlm-serve",
        "engines": vlm.engines,
        "precisions": {part: manifest.parts[part][engine].precision for part, engine in vlm.engines.items()},
        "max_context": vlm.max_context,
        "conversations": 1,
    }


async def _whole(events: AsyncGenerator[Event, None], asked: ChatRequest, vlm: VLM, name: str) -> Response:
    async with contextlib.aclosing(events):
        async for event in events:
            if isinstance(event, Answer):
                answer = event
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text},
        "logprobs": None,
        "finish_reason": "stop" if answer.finish_reason == "stop" else "length",
    }
    return JSONResponse(
        {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": vlm.spec.fingerprint[:16],
            "choices": [choice],
            "usage": {
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": len(answer.token_ids),
                "total_tokens": answer.prompt_tokens + len(answer.token_ids),
                "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": answer.image_tokens},
            },
            "timings_ms": {stage: round(spent, 3) for stage, spent in answer.timings_ms.items() if stage != "load"},
            "engines": dict(answer.engines),
        }
    )


async def _unless_left(request: Request, made: Any) -> Response:
    """The response, or none where the client left before it was made: then what makes it is cancelled."""
    making, leaving = asyncio.ensure_future(made), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({making, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await making if making.done() else Response(status_code=499)
    finally:
        for task in (making, leaving):
            task.cancel()
        await asyncio.gather(making, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
