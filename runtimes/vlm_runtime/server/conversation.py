"""From what a client sent to a checked request: messages rendered, pictures fetched, opened and preprocessed."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from pydantic import ValidationError

from vlm_models.errors import PromptError
from vlm_runtime.answer import Picture, Request, Settings, milliseconds
from vlm_runtime.prompt import render
from vlm_runtime.server.images import ImagePolicy, fetch_images
from vlm_runtime.server.limits import Limits, check_conversation
from vlm_runtime.server.problems import invalid
from vlm_runtime.server.schema import ChatRequest, ImagePart

if TYPE_CHECKING:
    from vlm_runtime.vlm import VLM

_ROLES = {"developer": "system"}
_PICTURES_KEPT = 16
_AT_ONCE = 2  # conversations prepared in threads beside the engine's; pictures take memory while they are decoded


class Preparation:
    """Makes requests of one VLM; keeps the last pictures as preprocessed, by the bytes they came in."""

    def __init__(self, vlm: VLM, policy: ImagePolicy) -> None:
        self._vlm, self._policy, self._limits = vlm, policy, policy.limits
        self._threads = anyio.CapacityLimiter(_AT_ONCE)
        self._pictures: OrderedDict[tuple[bytes, int], Picture] = OrderedDict()
        self._lock = threading.Lock()
        with contextlib.suppress(PromptError):  # the template is read now and not by the first who asks
            render([{"role": "user", "content": ""}], vlm.spec.prompt)

    async def parse(self, body: bytes) -> ChatRequest:
        """What the client asks. Raises RefusedError (400), InputError for a conversation over the limits."""
        return await anyio.to_thread.run_sync(self._parse, body, limiter=self._threads)

    async def request(self, asked: ChatRequest, started: float) -> Request:
        """A checked request; `started` is when the client's came. Raises ImageError, PromptError or InputError."""
        addresses = [part.image_url.url for message in asked.messages for part in _pictures(message.content)]
        files = await fetch_images(addresses, self._policy)
        return await anyio.to_thread.run_sync(self._request, asked, files, started, limiter=self._threads)

    def _parse(self, body: bytes) -> ChatRequest:
        try:
            asked = ChatRequest.model_validate_json(body)
        except ValidationError as error:
            raise invalid(error, body) from None
        images = sum(len(_pictures(message.content)) for message in asked.messages)
        said = sum(_text_bytes(message.content) for message in asked.messages)
        check_conversation(self._limits, images, said, self._vlm.max_context)
        return asked

    def _request(self, asked: ChatRequest, files: Sequence[bytes], started: float) -> Request:
        text = render([_message(message) for message in asked.messages], self._vlm.spec.prompt)
        begun = time.perf_counter()
        pictures = [self._picture(file, len(files)) for file in files]
        spent = milliseconds(begun)
        request = self._vlm.request(
            text, (), settings_of(asked, self._limits), pictures=pictures, started=started, reuse=True
        )
        request.timings_ms["preprocess"] = spent
        return request

    def _picture(self, file: bytes, among: int) -> Picture:
        """One of so many pictures; how many there are matters to how some models cut them."""
        key = hashlib.sha256(file).digest(), among if self._vlm.spec.tiling is not None else 1
        with self._lock:
            if known := self._pictures.get(key):
                self._pictures.move_to_end(key)
                return known
        made = self._vlm.picture(file, among)
        with self._lock:
            self._pictures[key] = made
            while len(self._pictures) > _PICTURES_KEPT:
                self._pictures.popitem(last=False)
        return made


def settings_of(asked: ChatRequest, limits: Limits) -> Settings:
    """The settings of `generate`: those that were asked for, and no longer an answer than the limit."""
    wanted = asked.max_completion_tokens or asked.max_tokens or limits.tokens
    settings: Settings = {"max_new_tokens": min(wanted, limits.tokens)}
    if asked.stop is not None:
        settings["stop"] = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    if asked.temperature is not None:
        settings["temperature"] = asked.temperature
    if asked.top_p is not None:
        settings["top_p"] = max(asked.top_p, 1e-6)  # 0 is the best token alone
    if asked.top_k is not None:
        settings["top_k"] = asked.top_k
    if asked.min_p is not None:
        settings["min_p"] = asked.min_p
    if asked.repetition_penalty is not None:
        settings["repetition_penalty"] = asked.repetition_penalty
    if asked.seed is not None:
        settings["seed"] = asked.seed % 2**64
    return settings


def _pictures(content: Any) -> list[ImagePart]:
    return [] if isinstance(content, str) else [part for part in content if isinstance(part, ImagePart)]


def _text_bytes(content: Any) -> int:
    if isinstance(content, str):
        return len(content.encode())
    return sum(len(part.text.encode()) for part in content if not isinstance(part, ImagePart))


def _message(message: Any) -> dict[str, Any]:
    """A message as `render` takes it."""
    content = message.content
    if not isinstance(content, str):
        content = [
            {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
            for part in content
        ]
    return {"role": _ROLES.get(message.role, message.role), "content": content}
