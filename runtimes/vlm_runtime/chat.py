"""A conversation: each turn is rendered as a whole, and only what the KV cache does not hold yet is prefilled."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from vlm_runtime.answer import Answer, Picture, Request, Settings
from vlm_runtime.prompt import render, user_message

if TYPE_CHECKING:
    from vlm_runtime.vlm import VLM, Source


class Chat:
    """Several turns about pictures, each given once.

    A turn that raises leaves the conversation as it was; one that is broken off (KeyboardInterrupt, a closed
    generator) keeps what was said so far. `last` is the last whole answer.
    """

    def __init__(self, vlm: VLM, system: str | None = None) -> None:
        self.last: Answer | None = None
        self._vlm, self._system = vlm, system
        self._messages: list[dict[str, Any]] = system_message(system)
        self._pictures: tuple[Picture, ...] = ()

    def ask(self, text: str, images: Sequence[Source] = (), **settings: Unpack[Settings]) -> Iterator[str]:
        """Yield the answer to the next turn. Raises PromptError, ImageError or InputError before any work."""
        started = time.perf_counter()
        messages = [*self._messages, user_message(text, len(images), self._vlm.spec.prompt)]
        prompt = render(messages, self._vlm.spec.prompt)
        request = self._vlm.request(prompt, images, settings, pictures=self._pictures, started=started, reuse=True)
        return self._say(request, messages)

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self._messages, self._pictures, self.last = system_message(self._system), (), None

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
