"""What one request may ask of the server, and the ASGI middleware that holds it to that before any of it is parsed.

A body is read here, whole, before the application sees the request: too long is 413 (at once where the client says its
length), too slow is 408, not JSON is 415, more than memory allows is 429. What is refused is not read to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from vlm_models.errors import InputError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(frozen=True)
class Limits:
    """Bounds of one request and its connection. Raises InputError for one that is not above zero.

    `body_bytes` of one request's JSON, `bodies_bytes` of all requests together; `values`: how many values the JSON may
    have (its commas); `images`, and of each `pixels` and the longer `edge`; `text_bytes` for each token of context;
    `tokens` of an answer; `seconds` an answer may take once it began. Connections: `header_seconds` for the head
    of a request, `body_seconds` for its body, `stall_seconds` for a reader that takes nothing, `connections` at once.
    """

    body_bytes: int = 32 << 20
    bodies_bytes: int = 512 << 20
    values: int = 50_000
    images: int = 16
    pixels: int = 50_000_000
    edge: int = 10_000
    text_bytes: int = 16
    tokens: int = 4096
    seconds: float = 300.0
    header_seconds: float = 15.0
    body_seconds: float = 60.0
    stall_seconds: float = 30.0
    connections: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise InputError(f"the limit {field.name} is {value}: it must be above zero")


# What `limited`, `guarded` and the application answer beside 200, for the OpenAPI schema: status → meaning.
REFUSALS: Mapping[int, str] = {
    400: "Something in the request is wrong; `error.message` says what, `error.param` where.",
    401: "The key is missing or wrong.",
    403: "A page of another site asked.",
    408: "The body did not arrive in time.",
    413: "The body is longer than allowed.",
    415: "The body is not application/json.",
    421: "The Host header names another machine.",
    429: "The queue is full: ask again after `Retry-After` seconds.",
}


def check_conversation(limits: Limits, images: int, text_bytes: int, context: int) -> None:
    """Raise InputError for more pictures than allowed, or for text that cannot fit `context` tokens.

    To find its tokens takes seconds for a megabyte, in which nobody else is answered.
    """
    if images > limits.images:
        raise InputError(f"the conversation has {images} images: at most {limits.images} are allowed")
    if text_bytes > limits.text_bytes * context:
        raise InputError(f"the text has {text_bytes} bytes and the bundle's context is {context} tokens: shorten it")


async def refuse(
    send: Send, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
) -> None:
    """Answer in the form of OpenAI's errors: {"error": {message, type, param, code}}."""
    content = error_json(status, message, code)
    given = {"content-type": "application/json", "content-length": str(len(content)), **(headers or {})}
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in given.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": content})


def error_json(status: int, message: str, code: str | None = None) -> bytes:
    """The body of an error. Source: OpenAI's API reference, "Error codes"; ASCII, so that any text can be in it."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode("ascii")


def limited(app: ASGIApp, limits: Limits) -> ASGIApp:
    """`app` behind the limits of bodies: it is called with a body that is there, whole and small enough."""
    held, room = 0, max(limits.bodies_bytes, limits.body_bytes)  # bytes of all bodies in memory, and how many may be

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal held
        head = dict(scope["headers"]) if scope["type"] == "http" else {}
        if b"content-length" not in head and b"transfer-encoding" not in head:
            return await app(scope, receive, send)
        length, body, mine = head.get(b"content-length", b"0"), bytearray(), 0
        if (length != b"0" or b"transfer-encoding" in head) and (wrong := _type_refused(head)):
            return await refuse(send, 415, wrong, "unsupported_media_type")
        if not length.isdigit() or int(length[:20]) > limits.body_bytes:
            return await _too_long(head, receive, send, limits)
        try:
            try:
                async with asyncio.timeout(limits.body_seconds):
                    more = True
                    while more:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            return None
                        chunk = message.get("body", b"")
                        more = message.get("more_body", False)
                        if len(body) + len(chunk) > limits.body_bytes:
                            body.clear()
                            return await _too_long(head, receive, send, limits)
                        if held + len(chunk) > room:
                            full = "too many large requests at once: try again in a moment"
                            return await refuse(send, 429, full, "busy", {"retry-after": "1"})
                        body += chunk
                        mine += len(chunk)
                        held += len(chunk)
            except TimeoutError:
                slow = f"the body did not arrive within {limits.body_seconds:g} seconds"
                return await refuse(send, 408, slow, "body_timeout", {"connection": "close"})
            if body.count(b",") > limits.values:
                many = f"the JSON has more than {limits.values} values: send a shorter conversation"
                return await refuse(send, 413, many, "body_too_large")
            await app(scope, _replay(bytes(body), receive, body), send)
        finally:
            held -= mine

    return serve


async def _too_long(head: Mapping[bytes, bytes], receive: Receive, send: Send, limits: Limits) -> None:
    """413. Some clients write all before they read: as much again is thrown away, in two seconds at most.

    Who waits for 100 Continue is answered at once: nothing was sent.
    """
    left = 0 if b"expect" in head else limits.body_bytes
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2):
            while left > 0:
                message = await receive()
                left = left - len(message.get("body", b"")) if message.get("more_body", False) else 0
    wrong = f"the body is longer than {limits.body_bytes} bytes: send fewer or smaller images"
    await refuse(send, 413, wrong, "body_too_large", {"connection": "close"})


def _replay(content: bytes, receive: Receive, read: bytearray) -> Receive:
    """A `receive` that gives `content` once and then what comes (that the client left)."""
    read.clear()
    waiting: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def give() -> Message:
        return waiting.pop() if waiting else await receive()

    return give


def _type_refused(head: Mapping[bytes, bytes]) -> str:
    """Why a body of this kind is not taken: other kinds, a web page of any site may send without being asked."""
    kind = head.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        return "the body must be JSON: send the header Content-Type: application/json"
    if head.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        return "the body must not be compressed: send it without Content-Encoding"
    return ""
