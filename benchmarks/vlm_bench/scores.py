"""Scores of an answer beside its references, and of one distribution beside another."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_ARTICLES = {"a", "an", "the"}
_ANLS_THRESHOLD = 0.5
_Z95 = 1.959964  # two-sided 95 % of the normal distribution


def normalised(text: str) -> str:
    """`text` as the VQA challenge compares it: lower case, without punctuation and articles, number words as digits.

    After https://visualqa.org/evaluation.html (Antol et al. 2015), with two differences: apostrophes are dropped where
    VQA has a table of contractions, and an answer that is nothing but an article ("A" of several choices) keeps it.
    """
    text = " ".join(text.lower().replace("'", "").replace("’", "").split())
    thousands = re.search(r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        if mark in text:
            apart = f"{mark} " in text or f" {mark}" in text or thousands
            text = text.replace(mark, "" if apart else " ")
    words = [_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", text).split()]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def exact(answer: str, references: Sequence[str]) -> bool:
    """Whether the answer is one of the references, both `normalised`."""
    return normalised(answer) in {normalised(reference) for reference in references}


def contains(answer: str, references: Sequence[str]) -> bool:
    """Whether the words of one of the references stand in the answer, in a row; both `normalised`."""
    said = f" {normalised(answer)} "
    return any(f" {wanted} " in said for reference in references if (wanted := normalised(reference)))


def anls(answer: str, references: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest reference, 0 where half of the letters or more are wrong.

    Case and runs of white space are not looked at. After Biten et al. 2019, "Scene Text Visual Question Answering",
    https://arxiv.org/abs/1905.13648, equation 1; the mean over questions is ANLS.
    """
    said = _plain(answer)
    distances = [levenshtein(said, _plain(reference)) for reference in references]
    lengths = [max(len(said), len(_plain(reference)), 1) for reference in references]
    nearest = min((d / n for d, n in zip(distances, lengths, strict=True)), default=1.0)
    return 1.0 - nearest if nearest < _ANLS_THRESHOLD else 0.0


def levenshtein(a: str, b: str) -> int:
    """The least number of letters to insert, delete or replace that makes one text the other."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Log probabilities of logits (…, V), in nats, computed in float64."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    out: npt.NDArray[np.float64] = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return out


@np.errstate(invalid="ignore", over="ignore")  # infinities give NaN, which the caller refuses
def divergence(reference: Floats, other: Floats) -> npt.NDArray[np.float64]:
    """KL(reference || other) of each row of logits (N, V), in nats: (N,)."""
    p, q = log_softmax(reference), log_softmax(other)
    kl: npt.NDArray[np.float64] = np.maximum(0.0, (np.exp(p) * (p - q)).sum(-1))
    return kl


def interval(right: int, of: int) -> tuple[float, float]:
    """The share right/of with 95 % confidence: Wilson's score interval (1927), which holds near 0 and 1 as well.

    It takes the questions for independent; several about one picture are less than that. Raises ValueError for none.
    """
    if not 0 <= right <= of or of == 0:
        raise ValueError(f"{right} of {of} is no share")
    share, z2 = right / of, _Z95**2 / of
    middle, reach = share + z2 / 2, _Z95 * math.sqrt(share * (1 - share) / of + z2 / (4 * of))
    return max(0.0, (middle - reach) / (1 + z2)), min(1.0, (middle + reach) / (1 + z2))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
