"""How much of a checkpoint's answers is left: KL, the same best token and exact answers on held-out pairs, in pairs.

Every variant is asked the same questions, and its distribution of each answer token, given the tokens before it, is
compared with the checkpoint's in fp32. An answer is exact when every token of it is the best one: greedy decoding then
says just that. Where a pair has no answer the checkpoint's own greedy one stands for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_export.importance import examples
from vlm_export.packed import Packed, PackedLanguage, pack
from vlm_export.reference import fits_in_memory, looked_up
from vlm_export.simulate import activation_precision
from vlm_export.target import Progress, silent
from vlm_models.errors import CheckpointError, InputError
from vlm_quant.calibration import Calibration
from vlm_quant.recipe import Precision

if TYPE_CHECKING:
    from vlm_models.model import Model

LONGEST = 16  # tokens of an answer that the checkpoint gives itself
_RESAMPLES = 2000
_LEVEL = 95  # percent


@dataclass(frozen=True)
class Question:
    """One held-out pair: embeddings (S, H) of prompt and answer, of which the rows from `first` predict `answer`.

    `picture` numbers the picture.
    """

    embeds: Tensor
    first: int
    answer: tuple[int, ...]
    picture: int

    @property
    def read(self) -> range:
        """The rows whose logits count."""
        return range(self.first, self.first + len(self.answer))


@dataclass(frozen=True)
class HeldOut:
    """Questions, those of one picture in a row, and the checkpoint's own log-probabilities (answer tokens, V) in fp32.

    `states` are what entered each of its layers (layer → (rows, H), the number of layers for the last norm).
    """

    pairs: Calibration
    questions: tuple[Question, ...]
    packed: Packed
    log_probs: NDArray[np.float32]
    states: Mapping[int, Tensor]


@dataclass(frozen=True)
class Quality:
    """One variant on every question: KL summed over the `tokens` of its answer, tokens that agree, exact or not.

    All (questions,); `pictures` says which share a picture.
    """

    kl: NDArray[np.float64]
    tokens: NDArray[np.int64]
    agree: NDArray[np.int64]
    exact: NDArray[np.bool_]
    pictures: NDArray[np.int64]

    @property
    def mean_kl(self) -> float:
        """Nats per answer token."""
        return float(self.kl.sum() / self.tokens.sum())

    @property
    def top1(self) -> float:
        """Share of tokens whose most likely one is the checkpoint's."""
        return float(self.agree.sum() / self.tokens.sum())

    @property
    def accuracy(self) -> float:
        """Share of questions whose greedy answer is exact."""
        return float(self.exact.mean())

    def numbers(self) -> dict[str, float | list[float]]:
        """Plain values, with the bootstrap intervals of KL and accuracy over pictures."""
        sums = _by_picture(self, self.kl, self.tokens, self.exact, np.ones_like(self.kl))
        return {
            "kl": self.mean_kl,
            "kl_interval": _ends(sums[0] / sums[1]),
            "top1": self.top1,
            "accuracy": self.accuracy,
            "accuracy_interval": _ends(sums[2] / sums[3]),
        }


def held_out(model: Model, pairs: Calibration, progress: Progress = silent, *, prompts: bool = False) -> HeldOut:
    """The pairs as questions, answered by the checkpoint. Raises CheckpointError where it gives no numbers.

    With `prompts` every word after the picture counts, those of the question too: they are harder to guess.
    """
    pictures = {image: i for i, image in enumerate(sorted({pair.image for pair in pairs.pairs}))}
    shown = sorted(pairs.pairs, key=lambda pair: pair.image)  # as `examples` gives them
    questions = []
    for pair, example in zip(shown, examples(model, pairs, progress=progress), strict=True):
        embeds, first = example.embeds, example.first_read
        answer = _ended(model, example.ids[first + 1 :])
        if not answer:
            answer = _greedy(model, embeds)
            embeds = torch.cat([embeds, looked_up(model, answer)])
        if prompts:
            after = len(example.ids) - example.ids[::-1].index(model.spec.prompt.image_token_id)
            first, answer = after - 1, (*example.ids[after : first + 1], *answer)
        questions.append(Question(embeds, first, answer, pictures[pair.image]))
    packed = _packed(questions)
    language = PackedLanguage(model.checkpoint, model.spec.language, packed, Precision("fp32"), keep=_keep(model))
    log_probs: NDArray[np.float32] = language.logits().log_softmax(-1).numpy()
    if not np.isfinite(log_probs).all():
        raise CheckpointError(f"{model.checkpoint.folder}: its answers to the held-out pairs are not numbers")
    return HeldOut(Calibration(tuple(shown)), tuple(questions), packed, log_probs, language.states)


def ask(model: Model, held: HeldOut, layer: int = -1) -> Quality:
    """Every question put to a variant of the checkpoint.

    Layers before `layer` are taken to be the checkpoint's own; −1: none is, the rows of pictures and words neither.
    """
    states, packed = held.states.get(layer), held.packed
    if layer < 0:
        own = examples(model, held.pairs)
        rows = [torch.cat([e.embeds, q.embeds[len(e.embeds) :]]) for e, q in zip(own, held.questions, strict=True)]
        packed = _packed([replace(q, embeds=r) for q, r in zip(held.questions, rows, strict=True)])
    language = PackedLanguage(
        model.checkpoint, model.spec.language, packed, activation_precision(model), keep=_keep(model)
    )
    logits, at = language.logits(states, max(layer, 0)), 0
    kl, agree, exact = [], [], []
    for question in held.questions:
        part = slice(at, at := at + len(question.answer))
        got, wanted = logits[part].double().log_softmax(-1), torch.from_numpy(held.log_probs[part]).double()
        kl.append(float((wanted.exp() * (wanted - got)).sum()))
        best = got.argmax(-1)
        agree.append(int((best == wanted.argmax(-1)).sum()))
        exact.append(best.tolist() == list(question.answer))
    tokens, pictures = [len(q.answer) for q in held.questions], [q.picture for q in held.questions]
    return Quality(np.array(kl), np.array(tokens), np.array(agree), np.array(exact), np.array(pictures))


def joined(parts: Sequence[Quality]) -> Quality:
    """Several sets of questions about different pictures as one."""
    starts = np.cumsum([0, *(part.pictures.max() + 1 for part in parts[:-1])])
    pictures = np.concatenate([part.pictures + start for part, start in zip(parts, starts, strict=True)])
    kl, tokens, agree, exact = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("kl", "tokens", "agree", "exact")
    )
    return Quality(kl, tokens, agree, exact, pictures)


def compared(ours: Quality, theirs: Quality) -> Mapping[str, list[float]]:
    """Bootstrap intervals over pictures of what differs on the same questions: KL's ratio, accuracy's difference."""
    a = _by_picture(ours, ours.kl, theirs.kl, ours.exact.astype(float) - theirs.exact, np.ones_like(ours.kl))
    return {"kl_ratio_interval": _ends(a[0] / a[1]), "accuracy_difference_interval": _ends(a[2] / a[3])}


def _packed(questions: Sequence[Question]) -> Packed:
    return pack([q.embeds for q in questions], [q.read for q in questions], [q.picture for q in questions])


def _keep(model: Model) -> bool:
    """Weights that are used once need not be kept; but streaming takes them in small pieces."""
    return fits_in_memory(model)


def _greedy(model: Model, embeds: Tensor) -> tuple[int, ...]:
    """The checkpoint's own answer, its end included."""
    language, said = model.language_model(keep=_keep(model)), list[int]()
    logits = language.forward(embeds)
    while len(said) < LONGEST:
        said.append(int(logits[0].argmax()))
        if said[-1] in model.spec.prompt.eos_token_ids:
            break
        logits = language.forward(looked_up(model, said[-1:]))
    return tuple(said)


def _ended(model: Model, answer: Sequence[int]) -> tuple[int, ...]:
    """Up to its end: what a template writes after it nobody generates."""
    ends = [i for i, token in enumerate(answer) if token in model.spec.prompt.eos_token_ids]
    return tuple(answer[: ends[0] + 1] if ends else answer)


def _by_picture(quality: Quality, *numbers: NDArray[np.generic]) -> NDArray[np.float64]:
    """Sums over pictures drawn with replacement, (numbers, resamples)."""
    groups = [np.flatnonzero(quality.pictures == picture) for picture in np.unique(quality.pictures)]
    if len(groups) < 2:
        raise InputError("intervals need questions about at least 2 pictures; give more held-out pairs")
    sums = np.array([[n[group].astype(np.float64).sum() for n in numbers] for group in groups])
    drawn = np.random.default_rng(0).integers(0, len(groups), (_RESAMPLES, len(groups)))
    counts = np.array([np.bincount(d, minlength=len(groups)) for d in drawn], np.float64)
    summed: NDArray[np.float64] = (counts @ sums).T
    return summed


def _ends(values: NDArray[np.float64]) -> list[float]:
    return [float(v) for v in np.percentile(values, ((100 - _LEVEL) / 2, (100 + _LEVEL) / 2))]
