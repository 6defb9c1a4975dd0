"""A client of the chat API that measures: conversations of two turns about the demo's pictures, streamed."""

from __future__ import annotations

import base64
import functools
import io
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from vlm_models.errors import CheckError

if TYPE_CHECKING:
    from PIL import Image

_CHAT = "/v1/chat/completions"
_TIMEOUT = 600.0


@dataclass(frozen=True)
class Talk:
    """Two questions about one picture, which is sent with each turn, as clients of the API do."""

    seed: int
    questions: tuple[str, str]

    @property
    def picture(self) -> Image.Image:
        """As the demo draws it."""
        from vlm_models.demo.scenes import make_scene

        return make_scene(self.seed, "test")[0]

    def messages(self, turn: int, first_answer: str) -> list[dict[str, Any]]:
        """The conversation up to the question of `turn`, 1 or 2."""
        image = {"type": "image_url", "image_url": {"url": _url(self.seed)}}
        begin = {"role": "user", "content": [image, {"type": "text", "text": self.questions[0]}]}
        if turn == 1:
            return [begin]
        reply = {"role": "assistant", "content": first_answer}
        return [begin, reply, {"role": "user", "content": self.questions[1]}]


@dataclass(frozen=True)
class Said:
    """One answer: of which talk and turn, its text in so many pieces, and what it took (`queue_ms` in the queue)."""

    talk: int
    turn: int
    text: str
    pieces: int
    queue_ms: float
    ttft_ms: float
    total_ms: float


def talks_of(pictures: int) -> tuple[list[Talk], list[Talk]]:
    """Talks for one client alone, about pictures that no other talk has, and talks for the crowd."""
    from vlm_bench.questions import demo_questions

    asked: dict[int, list[str]] = {}
    for question in demo_questions(pictures):
        assert isinstance(question.image, int)
        asked.setdefault(question.image, []).append(question.text)
    alone = max(pictures // 3, 1)
    talks = [
        Talk(seed, pair)
        for seed, texts in asked.items()
        for pair in zip(texts, [*texts[1:], texts[0]], strict=True)
        if seed >= alone or pair[0] is texts[0]
    ]
    return [talk for talk in talks if talk.seed < alone], [talk for talk in talks if talk.seed >= alone]


class Client:
    """Many connections to one server, from one event loop."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._http = httpx.AsyncClient(timeout=_TIMEOUT, limits=httpx.Limits(max_connections=None))

    async def ask(self, talk: Talk, number: int, turn: int, first_answer: str, tokens: int) -> Said | None:
        """One turn, streamed; None where the server refuses with 429. Raises CheckError for any other trouble."""
        body = {"messages": talk.messages(turn, first_answer), "max_tokens": tokens, "stream": True}
        text, pieces, began, start = "", 0, 0.0, time.perf_counter()
        last: dict[str, Any] = {}
        async with self._http.stream("POST", self._url + _CHAT, json=body) as response:
            if response.status_code == 429:
                return None
            if response.status_code != 200:
                raise CheckError(f"the server answers {response.status_code}: {(await response.aread())[:300]!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                last = json.loads(line.removeprefix("data: "))
                if "error" in last:
                    raise CheckError(f"the server breaks off: {last['error']['message']}")
                piece = last["choices"][0]["delta"].get("content", "")
                if piece and not text:
                    began = time.perf_counter()
                text += piece
                pieces += bool(piece)
        if "timings_ms" not in last:
            raise CheckError("the server broke off without a word")
        end = time.perf_counter()
        queue = last["timings_ms"]["queue"]
        return Said(number, turn, text, pieces, queue, ((began or end) - start) * 1e3, (end - start) * 1e3)

    async def first_token_ms(self, talk: Talk, tokens: int) -> tuple[float, float]:
        """From the request to the first text, of both turns."""
        first = await self.ask(talk, 0, 1, "", tokens)
        second = first and await self.ask(talk, 0, 2, first.text, tokens)
        if first is None or second is None:
            raise CheckError("the server refuses its only client")
        return first.ttft_ms, second.ttft_ms

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()


def metrics(url: str) -> dict[str, float]:
    """Counters of /metrics that tell what the caches did."""
    wanted = ("vlm_prefix_cache_total", "vlm_image_cache_total", "vlm_prompt_tokens", "vlm_generated_tokens_total")
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith(wanted) and "_created" not in line
    }


@functools.lru_cache(maxsize=256)
def _url(seed: int) -> str:
    from vlm_models.demo.scenes import make_scene

    file = io.BytesIO()
    make_scene(seed, "test")[0].save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
