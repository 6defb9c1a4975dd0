"""How probable each token was: from logits to the entries of OpenAI's `logprobs`."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vlm_runtime.engine import Floats
    from vlm_runtime.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # what SentencePiece falls back to


@dataclass(frozen=True)
class Scored:
    """A token id, the natural logarithm of its probability, and the same of the best ones, the best first."""

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...]


def score(token: int, logits: Floats, best: int) -> Scored:
    """What the softmax of logits (V,) gives `token` and the `best` tokens; before temperature and all else."""
    shifted = logits - logits.max()
    total = np.log(np.exp(shifted).sum(dtype=np.float64))
    count = min(best, len(shifted))
    ids = np.argpartition(shifted, len(shifted) - count)[len(shifted) - count :] if count else np.empty(0, np.intp)
    ids = ids[np.lexsort((ids, -shifted[ids]))]
    return Scored(
        token,
        float(shifted[token] - total),
        tuple((int(one), float(shifted[one] - total)) for one in ids),
    )


class TokenTexts:
    """The text and the bytes of single tokens, as they read within a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]

    def entry(self, scored: Scored) -> dict[str, Any]:
        """A TokenLogprob of the schema."""
        best = [self._one(token, logprob) for token, logprob in scored.best]
        return {**self._one(scored.token, scored.logprob), "top_logprobs": best}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text, content = self._read(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(content)}

    def _read(self, token: int) -> tuple[str, bytes]:
        """A token that begins a text may lose its space, so it is read after another one."""
        before = self._tokenizer.decode(self._before, skip_special_tokens=False)
        both = self._tokenizer.decode([*self._before, token], skip_special_tokens=False)
        alone = self._tokenizer.decode([token], skip_special_tokens=False)
        text = both[len(before) :] if both.startswith(before) else alone
        return text, _raw(self._tokenizer.token(token)) if "\ufffd" in text else text.encode()


def _raw(token: str) -> bytes:
    """The bytes of a token of the vocabulary that is no whole character."""
    if found := _BYTE.fullmatch(token):
        return bytes([int(found[1], 16)])
    known = _byte_level()
    return bytes(known[c] for c in token) if all(c in known for c in token) else token.encode()


@functools.cache
def _byte_level() -> dict[str, int]:
    """Character → byte of byte-level BPE: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(rest)}
