"""Token ids to text while they come: whole characters only, stop strings never shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vlm_models.errors import InputError

_LIMIT = 32  # tokens decoded again at most; a character has four bytes, so four tokens, in any real text


class Decodes(Protocol):
    """What a TextStream needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; an incomplete UTF-8 sequence gives U+FFFD."""


class TextStream:
    """Turns ids into pieces of text whose concatenation is the text of all ids, up to the first stop string.

    Only the ids of the last piece and those after it are decoded again, since how a token reads (a leading space, the
    bytes of a character) depends on its neighbours alone.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = ()) -> None:
        if any(not s for s in stop):
            raise InputError("an empty stop string: give the text that ends an answer")
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self._ids: list[int] = []  # those of the last piece (`_known` of them), then those not yet shown
        self._known, self._known_text = 0, ""
        self._held = ""  # shown only when it cannot become a stop string any more

    def push(self, token: int) -> str:
        """The text that is certain now, often empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):  # an unfinished character, most likely
            return self._shorten() if len(self._ids) > _LIMIT else ""
        if len(text) <= len(self._known_text):  # a special token adds nothing; keep the context of the last piece
            if len(self._ids) > _LIMIT:
                self._ids.pop()
            return ""
        return self._release(self._advance(text, self._known))

    def finish(self) -> str:
        """The rest, when no more ids come."""
        if self.stopped:
            return ""
        text = self._tokenizer.decode(self._ids)
        self._ids, shown = [], text[len(self._known_text) :]
        self._known, self._known_text = 0, ""
        shown = self._release(shown)
        shown, self._held = shown + self._held, ""
        return shown

    def _advance(self, text: str, drop: int) -> str:
        """Everything in `text` beyond the known part; the ids from `drop` on become the known ones."""
        new = text[len(self._known_text) :]
        self._ids = self._ids[drop:]
        self._known, self._known_text = len(self._ids), self._tokenizer.decode(self._ids)
        return new

    def _shorten(self) -> str:
        """Bytes that never become a character: show those before a border that later ids cannot move."""
        text = self._tokenizer.decode(self._ids)
        for border in range(len(self._ids) - 1, self._known, -1):
            before = self._tokenizer.decode(self._ids[:border])
            if before + self._tokenizer.decode(self._ids[border:]) == text:
                new = before[len(self._known_text) :]
                self._ids, self._known, self._known_text = self._ids[border:], 0, ""
                return self._release(new)
        return self._release(self._advance(text, len(self._ids)))

    def _release(self, new: str) -> str:
        """`new` after what is held, without what may be the beginning of a stop string."""
        if not self._stop:
            return new
        text = self._held + new
        if found := [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]  # the one complete first, wherever the borders of tokens are
        keep = next((n for n in range(min(len(text), self._longest - 1), 0, -1) if self._begins_stop(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _begins_stop(self, text: str) -> bool:
        return any(s.startswith(text) for s in self._stop)
