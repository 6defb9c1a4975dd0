"""A conversation: each turn is rendered as a whole, and only what the KV cache does not hold yet is prefilled."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from vlm_models.errors import InputError
from vlm_runtime.answer import Answer, Picture, Request, Settings
from vlm_runtime.prompt import render, user_message

if TYPE_CHECKING:
    from vlm_runtime.vlm import VLM, Source


@dataclass(frozen=True)
class _Turn:
    """A question with its pictures, and the conversation before it."""

    text: str
    images: tuple[Source, ...]
    messages: tuple[dict[str, Any], ...]
    pictures: tuple[Picture, ...]


class Chat:
    """Several turns about pictures, each given once.

    A turn that raises leaves the conversation as it was; one that is broken off (KeyboardInterrupt, a closed
    generator) keeps what was said so far. `last` is the last whole answer; None while there is none of the last turn.
    """

    def __init__(self, vlm: VLM, system: str | None = None) -> None:
        self.last: Answer | None = None
        self._vlm, self._system = vlm, system
        self._messages: list[dict[str, Any]] = system_message(system)
        self._pictures: tuple[Picture, ...] = ()
        self._turn: _Turn | None = None

    def ask(self, text: str, images: Sequence[Source] = (), **settings: Unpack[Settings]) -> Iterator[str]:
        """Yield the answer to the next turn. Raises PromptError, ImageError or InputError before any work."""
        return self._ask(_Turn(text, tuple(images), tuple(self._messages), self._pictures), settings)

    def retry(self, **settings: Unpack[Settings]) -> Iterator[str]:
        """Yield another answer to the last question, in the place of the one it had; the same where nothing is drawn.

        Raises InputError where nothing was asked.
        """
        if self._turn is None:
            raise InputError("there is no question to ask again: ask one first")
        return self._ask(self._turn, settings)

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self._messages, self._pictures, self.last = system_message(self._system), (), None
        self._turn = None

    def _ask(self, turn: _Turn, settings: Settings) -> Iterator[str]:
        started, spec = time.perf_counter(), self._vlm.spec.prompt
        messages = [*turn.messages, user_message(turn.text, len(turn.images), spec)]
        request = self._vlm.request(
            render(messages, spec), turn.images, settings, pictures=turn.pictures, started=started, reuse=True
        )
        self._turn = turn
        return self._say(request, messages)

    def _say(self, request: Request, messages: list[dict[str, Any]]) -> Iterator[str]:
        said, answer = list[str](), self._vlm.speak(request)
        self.last = None
        try:
            while True:
                said.append(next(answer))
                yield said[-1]
        except StopIteration as stop:
            self.last = stop.value
        finally:
            if said or self.last is not None:
                reply = {"role": "assistant", "content": [{"type": "text", "text": "".join(said)}]}
                self._messages, self._pictures = [*messages, reply], request.pictures


def system_message(system: str | None) -> list[dict[str, Any]]:
    """The message that begins a conversation, if there is one."""
    return [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
