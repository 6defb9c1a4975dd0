"""Answers as OpenAI's API writes them: a whole one, or chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlm_runtime.server.logprobs import Scored, TokenTexts

if TYPE_CHECKING:
    from vlm_runtime.answer import Answer


@dataclass(frozen=True)
class Reply:
    """What all parts of one answer have in common; `scores` asks for logprobs, `usage` for a chunk of it."""

    model: str
    fingerprint: str
    texts: TokenTexts
    scores: bool = False
    usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer, scored: Sequence[Scored]) -> dict[str, Any]:
        """A Completion of the schema."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text},
            "logprobs": self._logprobs(scored),
            "finish_reason": _reason(answer),
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": _usage(answer), **_spent(answer)}

    def first(self) -> bytes:
        """The chunk that says who speaks."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str, scored: Sequence[Scored]) -> bytes:
        """A chunk with text."""
        return self._chunk({"content": text}, scored=scored)

    def last(self, answer: Answer) -> bytes:
        """The end: why it ended and what it took, the usage where it was asked for, and the mark of the end."""
        end = self._chunk({}, reason=_reason(answer), **_spent(answer))
        if self.usage:
            end += _line({**self._head("chat.completion.chunk"), "choices": [], "usage": _usage(answer)})
        return end + b"data: [DONE]\n\n"

    def _chunk(
        self, delta: dict[str, str], *, scored: Sequence[Scored] = (), reason: str | None = None, **more: Any
    ) -> bytes:
        logprobs = self._logprobs(scored) if scored else None
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice], **more}
        return _line({**chunk, "usage": None} if self.usage else chunk)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _logprobs(self, scored: Sequence[Scored]) -> dict[str, Any] | None:
        return {"content": [self.texts.entry(one) for one in scored]} if self.scores else None


def event(content: dict[str, Any]) -> bytes:
    """One server-sent event of JSON."""
    return _line(content)


def _line(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _reason(answer: Answer) -> str:
    return "stop" if answer.finish_reason == "stop" else "length"


def _usage(answer: Answer) -> dict[str, Any]:
    made = len(answer.token_ids)
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": made,
        "total_tokens": answer.prompt_tokens + made,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens, "image_tokens": answer.image_tokens},
    }


def _spent(answer: Answer) -> dict[str, Any]:
    times = {stage: round(spent, 3) for stage, spent in answer.timings_ms.items() if stage != "load"}
    return {"timings_ms": times, "engines": dict(answer.engines)}
