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
Floats = NDArray[np.float32]
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

    def pick(self, logits: Floats, previous: Sequence[int]) -> int:
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
        ids, weights = _filtered(logits, self.sampling)
        index = _draw(weights, self._random.random())
        return index if ids is None else int(ids[index])


def distribution(logits: Floats, sampling: Sampling, previous: Sequence[int] = ()) -> tuple[Ids, Doubles]:
    """The token ids that can follow and their probabilities (both (n,)); needs a temperature above 0."""
    if sampling.repetition_penalty != 1.0:
        logits = _penalized(logits, previous, sampling.repetition_penalty)
    ids, weights = _filtered(logits, sampling)
    return np.arange(len(logits)) if ids is None else ids, weights / weights.sum(dtype=np.float64)


def _penalized(logits: Floats, previous: Sequence[int], penalty: float) -> Floats:
    out = logits.copy()
    seen = np.unique(np.asarray(previous, np.intp))
    seen = seen[(seen >= 0) & (seen < len(out))]
    out[seen] = np.where(out[seen] < 0, out[seen] * penalty, out[seen] / penalty)
    return out


def _filtered(logits: Floats, sampling: Sampling) -> tuple[Ids | None, Floats]:
    """Temperature, top-k, top-p, min-p; the ids left (None: all) and their weights, 1 for the best."""
    ids: Ids | None = None
    scores = logits - logits.max()
    if 0 < sampling.top_k < len(logits):  # ties with the k-th best stay, as in transformers
        ids = np.flatnonzero(scores >= _kth_best(scores, sampling.top_k))
        scores = scores[ids]
    scores /= np.float32(max(sampling.temperature, 1e-30))  # smaller is 0 as float32
    if sampling.top_p < 1.0:
        kept = _nucleus(scores, sampling.top_p)
        ids, scores = kept if ids is None else ids[kept], scores[kept]
    if sampling.min_p > 0.0:
        kept = np.flatnonzero(scores >= math.log(sampling.min_p))
        ids, scores = kept if ids is None else ids[kept], scores[kept]
    return ids, np.exp(scores)


def _kth_best(logits: Floats, k: int) -> np.float32:
    """The k-th largest logit; only those that can be it are partitioned, which is 10 times cheaper than all."""
    blocks = logits[: len(logits) // 64 * 64].reshape(-1, 64).max(axis=1)
    if len(blocks) > k:  # at least k logits are as large as the k-th best block
        logits = logits[logits >= np.partition(blocks, -k)[-k]]
    best: np.float32 = np.partition(logits, -k)[-k]
    return best


def _nucleus(scores: Floats, top_p: float) -> Ids:
    """Indices of the fewest best scores (≤ 0) whose probabilities reach `top_p` together."""
    wanted = top_p * float(np.exp(scores).sum(dtype=np.float64))
    # Scores below this weigh less than 1 - top_p all together, the best one weighing 1: none can be in the nucleus.
    near = np.flatnonzero(scores >= math.log((1 - top_p) / len(scores)))
    scores = scores[near]
    weights = np.exp(scores)
    # Sum the weights in 1,024 steps of score; only the scores of the step that reaches top_p need sorting.
    steps = np.minimum(scores * np.float32(-32), np.float32(1023)).astype(np.intp)
    reached = np.cumsum(np.bincount(steps, weights))
    last = min(int(np.searchsorted(reached, wanted)), len(reached) - 1)
    border = np.flatnonzero(steps == last)
    border = border[np.argsort(-scores[border], kind="stable")]
    before = reached[last - 1] if last else 0.0
    count = int(np.searchsorted(before + np.cumsum(weights[border], dtype=np.float64), wanted)) + 1
    nucleus: Ids = near[np.concatenate([np.flatnonzero(steps < last), border[:count]])]
    return nucleus


def _draw(weights: Floats, uniform: float) -> int:
    """The index in which `uniform` (0 ≤ u < 1) of the summed weights falls; sums of blocks first, then one block."""
    reached = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), 256), dtype=np.float64))
    wanted = uniform * reached[-1]
    block = int(np.searchsorted(reached[:-1], wanted, side="right"))
    inside = np.cumsum(weights[block * 256 : block * 256 + 256], dtype=np.float64)
    wanted -= reached[block - 1] if block else 0.0
    return block * 256 + int(np.searchsorted(inside[:-1], wanted, side="right"))


def _check(name: str, value: Any, allowed: bool, what: str) -> None:
    if not allowed:
        raise InputError(f"{name} is {value}: it must be {what}")
