"""The tokens of a tokenizer.json in the order of their ids, with llama.cpp's token types and scores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_export.gguf.pretokenizer import has_spaces
from vlm_models.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama_token_type"""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """`texts` and llama.cpp's `types` of every row of the embedding table; ids without a token are UNUSED.

    `added` holds the added tokens (the tokenizers library's) by id.
    """

    texts: tuple[str, ...]
    types: tuple[int, ...]
    added: Mapping[int, Any]

    @property
    def strips(self) -> bool:
        """Whether some added token takes the blanks after it."""
        return any(token.rstrip for token in self.added.values())

    def plain(self, token: int) -> bool:
        """Whether the added token is of the usual kind: special, read wherever it stands."""
        added = self.added[token]
        return added.special and not (added.single_word or added.lstrip or added.rstrip or added.normalized)


def read_vocabulary(tokenizer: Any, source: Mapping[str, Any], size: int, what: str) -> Vocabulary:
    """The vocabulary of a BPE tokenizer for a table of `size` rows; tokens beyond it (<image>) are left out.

    `source` is its tokenizer.json, whose ids of added tokens the tokenizers library does not always keep.
    Raises CheckpointError, its message starting with `what`, where two ids have one text: llama.cpp would stop.
    """
    texts: dict[int, str] = {int(i): str(text) for text, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.get_added_tokens_decoder()
    texts.update({i: str(token.content) for i, token in added.items()})
    unknown, spaces = source["model"].get("unk_token"), has_spaces(source)
    out, types = [], []
    taken = set(texts.values())
    for i in range(size):
        text = texts.get(i)
        if text is None:
            text = _unused(i, taken)
            kind = UNUSED
        elif text == unknown:
            kind = UNKNOWN
        elif i in added:
            kind = CONTROL if added[i].special else USER_DEFINED
        else:
            kind = BYTE if spaces and _BYTE.fullmatch(text) else NORMAL
        out.append(text)
        types.append(kind)
    seen: dict[str, int] = {}
    for i, text in enumerate(out):
        key = text.partition("\0")[0] or f"[EMPTY_{i}]"  # as llama.cpp reads it
        if key in seen:
            raise CheckpointError(f"{what} has one text for two ids, {seen[key]} and {i} ({text!r}): GGUF takes one")
        seen[key] = i
    return Vocabulary(tuple(out), tuple(types), {i: token for i, token in added.items() if i < size})


def scores(texts: Sequence[str], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """A score for each token, by which llama.cpp merges the highest first: the rank of its first merge, negated.

    SentencePiece's own scores are in the same order; tokens that no merge makes come last.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(text, len(merges) + i)) for i, text in enumerate(texts)]


def _unused(token: int, taken: set[str]) -> str:
    text = f"[PAD{token}]"
    while text in taken:
        text = f"[{text}]"
    taken.add(text)
    return text
