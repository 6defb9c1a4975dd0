"""From logits to the next token: the maths and the order of transformers' logits processors, in NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_models.errors import CheckError, InputError

Ids = NDArray[np.intp]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default is greedy. Raises InputError for a value out of range.

    Applied in this order: `repetition_penalty` (> 0, 1: none) on tokens that occurred, then `temperature` (0: greedy),
    `top_k` (0: all), `top_p` (0 < p ≤ 1), `min_p` (0 … 1, relative to the best token). Same `seed`, same tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1 (off)")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 (off) to 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0 < penalty < math.inf, "more than 0 (1 is off)")
        _check("seed", self.seed, self.seed is None or self.seed >= 0, "0 or more")


class Sampler:
    """Picks tokens one after another; holds the random generator of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def pick(self, logits: NDArray[np.float32], previous: Sequence[int]) -> int:
        """The next token id from logits (V,), which are left as they are; `previous` are all ids so far.

        Raises CheckError when the logits are not numbers.
        """
        if self.sampling.repetition_penalty != 1.0:
            logits = _penalized(logits, previous, self.sampling.repetition_penalty)
        best = int(logits.argmax())
        if not math.isfinite(logits[best]):
            raise CheckError(
                f"the language model gave {logits[best]} as a logit: export it again at a higher precision"
            )
        if self.sampling.temperature == 0.0:
            return best
        ids, probabilities = _filtered(logits, self.sampling)
        return int(ids[np.searchsorted(np.cumsum(probabilities[:-1]), self._random.random(), side="right")])


def distribution(logits: NDArray[np.float32], sampling: Sampling, previous: Sequence[int] = ()) -> tuple[Ids, Doubles]:
    """The token ids that can follow and their probabilities (both (n,)); needs a temperature above 0."""
    if sampling.repetition_penalty != 1.0:
        logits = _penalized(logits, previous, sampling.repetition_penalty)
    return _filtered(logits, sampling)


def _penalized(logits: NDArray[np.float32], previous: Sequence[int], penalty: float) -> NDArray[np.float32]:
    out = logits.copy()
    seen = np.unique(np.asarray(previous, np.intp))
    seen = seen[(seen >= 0) & (seen < len(out))]
    out[seen] = np.where(out[seen] < 0, out[seen] * penalty, out[seen] / penalty)
    return out


def _filtered(logits: NDArray[np.float32], sampling: Sampling) -> tuple[Ids, Doubles]:
    """Temperature, top-k, top-p, min-p; every step keeps the best token."""
    ids: Ids = np.arange(len(logits), dtype=np.intp)
    if 0 < sampling.top_k < len(logits):  # ties with the k-th best stay, as in transformers
        ids = np.flatnonzero(logits >= np.partition(logits, len(logits) - sampling.top_k)[-sampling.top_k])
    scores = logits[ids].astype(np.float64)
    scores = (scores - scores.max()) / sampling.temperature
    if sampling.top_p < 1.0:
        kept = _nucleus(scores, sampling.top_p)
        ids, scores = ids[kept], scores[kept]
    if sampling.min_p > 0.0:
        near = scores >= math.log(sampling.min_p)
        ids, scores = ids[near], scores[near]
    weights = np.exp(scores)
    return ids, weights / weights.sum()


def _nucleus(scores: Doubles, top_p: float) -> Ids:
    """Indices, best first, of the fewest best scores whose probabilities reach `top_p` together."""
    weights = np.exp(scores)
    wanted, count = top_p * weights.sum(), 256
    while True:  # sorting a few hundred of the best is enough nearly always, and 100 times cheaper than all
        best = np.argpartition(-scores, count)[:count] if count < len(scores) else np.arange(len(scores))
        best = best[np.argsort(-scores[best], kind="stable")]
        reached = np.cumsum(weights[best])
        if reached[-1] >= wanted or len(best) == len(scores):
            return best[: int(np.searchsorted(reached, wanted)) + 1]
        count *= 8


def _check(name: str, value: Any, allowed: bool, what: str) -> None:
    if not allowed:
        raise InputError(f"{name} is {value}: it must be {what}")
