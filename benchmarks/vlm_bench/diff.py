"""Two answers word by word: what both say, what only the reference says, what only the other says."""

from __future__ import annotations

import difflib
import re

from vlm_bench.results import Words

# Scripts without spaces between words are compared letter by letter: Thai to Burmese, kana, Han, Hangul.
_LETTER = "\u0e00-\u109f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"\s+|[{_LETTER}]|[^\W{_LETTER}]+|[^\w\s]")


def words(reference: str, answer: str) -> tuple[Words, ...]:
    """Steps from `reference` to `answer`, in reading order; their texts joined are the two texts, exactly.

    Words, marks and white space stand alone; matching is difflib's, for which white space is no reason to match.
    """
    a, b = _WORD.findall(reference), _WORD.findall(answer)
    steps = difflib.SequenceMatcher(str.isspace, a, b, autojunk=False).get_opcodes()
    return tuple(Words(op, "".join(a[a0:a1]), "".join(b[b0:b1])) for op, a0, a1, b0, b1 in steps)
