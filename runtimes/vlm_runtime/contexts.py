"""Several KV caches over the same weights: a conversation that comes back finds the one it left."""

from __future__ import annotations

from vlm_models.errors import InputError
from vlm_runtime.answer import Context, Request
from vlm_runtime.engine import Decoder


class Contexts:
    """Up to `limit` contexts of one language model; made when they are needed, where the engine can make more than one.

    What tells rows apart are token ids and digests of pictures, so that an answer never depends on who else asked.
    Raises InputError for a `limit` below 1.
    """

    def __init__(self, decoder: Decoder, limit: int = 1) -> None:
        if limit < 1:
            raise InputError(f"conversations is {limit}: it must be 1 or more")
        self.first = Context(decoder)
        self._all, self._limit = [self.first], limit  # the least recently used first

    def take(self, request: Request) -> Context:
        """The context for `request`: the one with the longest common beginning, unless that ends more than it saves.

        Then, or where nothing is to be kept: a new one, or the least recently used.
        """
        found = self._longest(request) if request.reuse else None
        context = found or self._new() or self._all[0]
        self._all.remove(context)
        self._all.append(context)
        return context

    def _longest(self, request: Request) -> Context | None:
        common = {context: context.common(request.keys, request.blocks) for context in reversed(self._all)}
        best = max(common, key=lambda context: common[context])
        return best if common[best] > 0 and 2 * common[best] >= best.rows else None

    def _new(self) -> Context | None:
        if len(self._all) >= self._limit or not any(context.rows for context in self._all):
            return None
        try:
            made = self.first.another()
        except InputError:  # no memory for one more
            made = None
        if made is None:
            self._limit = len(self._all)
            return None
        self._all.insert(0, made)
        return made
