"""Which weights matter: the mean squared input of every linear layer, over pictures with questions and answers.

An error in a weight counts as the square of what it is multiplied with, so quantizers weigh errors by it. The sequences
go through the checkpoint's own preprocessing, tower, projector, chat template and splice: the decoder sees what it will
see. One walk serves all of them: a layer's weights are read, every sequence passes, the next layer's are read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vlm_export.reference import looked_up, picture_rows, spliced
from vlm_export.streaming import Rows, stream
from vlm_export.target import Progress, silent
from vlm_models.errors import CheckpointError, PromptError
from vlm_models.language import Linear
from vlm_models.processor import tokenizer_json
from vlm_quant.calibration import Calibration, Pair, sample
from vlm_runtime.image import open_image
from vlm_runtime.prompt import Message, render, user_message
from vlm_runtime.tiling import Layout, layout_of
from vlm_runtime.tokenizer import prompt_ids

if TYPE_CHECKING:
    from vlm_models.model import Model

Importance = Mapping[str, npt.NDArray[np.float32]]
"""Mean squared input (in_features,) of the linear layers, by the canonical name of the weight in the checkpoint."""

SAMPLES = 128
MAX_TEXT = 1024  # tokens of a question with its answer; longer ones are cut
_FLOOR = 1e-6  # of the mean: a channel that was never used still must not round to anything


@dataclass(frozen=True)
class Example:
    """One sequence: embeddings (S, H), and the first of its rows whose logits are read: they predict the answer.

    `ids` are its tokens, image tokens repeated.
    """

    embeds: Tensor
    first_read: int
    ids: tuple[int, ...] = ()


def importance(
    model: Model, calibration: Calibration, *, samples: int = SAMPLES, seed: int = 0, progress: Progress = silent
) -> Importance:
    """Importance of every linear layer of the language model, from at most `samples` of the pairs.

    Holds the embeddings of all sequences and one layer of weights in float32: 1.4 GB + 0.8 GB for LLaVA-1.5-7B.
    Raises ImageError or PromptError for a pair that cannot be shown, CheckpointError where numbers overflow.
    """
    return measure(model, examples(model, sample(calibration, samples, seed), progress=progress), progress)


def examples(
    model: Model, calibration: Calibration, *, pictures: bool = True, progress: Progress = silent
) -> list[Example]:
    """What the decoder is given for each pair; without `pictures` the same questions and answers as text alone."""
    encode = _tokenizer(model)
    shown = sorted(calibration.pairs, key=lambda pair: pair.image)  # pairs of one picture follow each other
    made, rows, last = [], torch.empty(0), None
    layouts: list[Layout] = []
    for i, pair in enumerate(shown):
        if pictures and pair.image != last:
            image, last = open_image(pair.image), pair.image
            rows, layouts = picture_rows(model, image), [layout_of((image.height, image.width), model.spec)]
        asked, ids = (prompt_ids(text, layouts, encode, model.spec.prompt) for text in _texts(model, pair, pictures))
        before = next((i for i, (a, b) in enumerate(zip(asked, ids, strict=False)) if a != b), len(asked))
        embeds = spliced(model, ids, rows) if pictures else looked_up(model, ids)
        limit = min(model.spec.language.max_positions, sum(layout.rows for layout in layouts) + MAX_TEXT)
        made.append(Example(embeds[:limit], min(before, limit, len(ids)) - 1, tuple(ids[:limit])))
        progress("calibration", i + 1, len(shown))
    return made


def measure(model: Model, sequences: Sequence[Example], progress: Progress = silent) -> Importance:
    """Importance over `sequences`: every row counts, for the head only those whose logits are read."""
    squares, done = _Squares([example.first_read for example in sequences]), itertools.count(1)
    of = (model.spec.language.layers + 1) * len(sequences)
    states = [example.embeds for example in sequences]
    stream(
        model.checkpoint,
        model.spec.language,
        states,
        squares.inputs,
        lambda: progress("importance", next(done), of),
    )
    return dict(squares.means(model.checkpoint.folder))


class _Squares:
    """Sums the squares of what linear layers are given, while the sequences pass."""

    def __init__(self, first_read: Sequence[int]) -> None:
        self._first_read = first_read
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def inputs(self, x: Rows, linears: Sequence[Linear]) -> Rows:
        """x, weighed as it is computed."""

        def weighed(i: int) -> Tensor:
            rows = x(i)
            self._weigh(rows[self._first_read[i] :] if linears[0].name == "lm_head" else rows, linears)
            return rows

        return Rows(weighed)

    def means(self, folder: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        for name, total in self._sums.items():
            mean = (total / self._counts[name]).numpy()
            if not np.isfinite(mean).all():
                raise CheckpointError(f"{folder}: calibration gives {name!r} inputs beyond float32: a damaged weight?")
            yield name, np.maximum(mean, mean.mean() * _FLOOR or 1.0).astype(np.float32)

    def _weigh(self, rows: Tensor, linears: Sequence[Linear]) -> None:
        """Once for each stored matrix: fused ones hold several of the layers that read the same rows."""
        squares = rows.double().pow(2).sum(0)
        for name in {linear.weight.tensor for linear in linears}:
            self._sums[name] = self._sums[name] + squares if name in self._sums else squares
            self._counts[name] = self._counts.get(name, 0) + len(rows)


def _texts(model: Model, pair: Pair, pictures: bool) -> tuple[str, str]:
    """The rendered question, and the whole conversation where there is an answer."""
    spec = model.spec.prompt
    text = pair.prompt if pictures else pair.prompt.replace(spec.picture, "")
    try:
        messages: list[Message] = [user_message(text, int(pictures), spec)]
        asked = render(messages, spec)
        if pair.answer is None:
            return asked, asked
        messages.append({"role": "assistant", "content": pair.answer})
        return asked, render(messages, spec, add_generation_prompt=False)
    except PromptError as error:
        raise PromptError(f"calibration pair of {pair.image.name}: {error}") from None


def _tokenizer(model: Model) -> Callable[[str], list[int]]:
    """Text to ids as transformers does it: with the tokenizer's special tokens, unless the text begins with BOS."""
    from tokenizers import Tokenizer

    tokenizer, bos = Tokenizer.from_str(tokenizer_json(model.checkpoint)), model.spec.prompt.bos_token
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos))).ids
        return ids

    return encode
