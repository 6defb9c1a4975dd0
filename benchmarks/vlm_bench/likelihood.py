"""Logits of a bundle, or of its checkpoint, after a prompt and the tokens that are forced upon it."""

from __future__ import annotations

import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_bench.questions import Question, QuestionSet
from vlm_bench.results import readable
from vlm_bench.scores import Floats, divergence, log_softmax
from vlm_models.errors import CheckError, DependencyError, InputError, PromptError
from vlm_models.spec import PromptSpec
from vlm_runtime.blocks import prefill
from vlm_runtime.prompt import render, user_message
from vlm_runtime.splice import splice

if TYPE_CHECKING:
    from vlm_runtime.vlm import VLM

TOKENS = 4  # of an answer, counted in KL
QUESTIONS = 64  # of a set, counted in KL
_OF_CHECKPOINTS = 16  # each of them reads the checkpoint's weights again
Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Distributions:
    """A reference's greedy answer to a question, at most TOKENS long, and the logits (N, V) that chose each token."""

    question: Question
    tokens: tuple[int, ...]
    logits: Floats


@dataclass(frozen=True)
class Reference:
    """What others are compared with: `name` for people, the checkpoint's `fingerprint`."""

    name: str
    fingerprint: str
    distributions: tuple[Distributions, ...]


def rendered(question: str, pictures: int, prompt: PromptSpec) -> str:
    """The question as `VLM.answer` asks it: through the chat template, pictures first."""
    return render([user_message(question, pictures, prompt)], prompt)


def after(vlm: VLM, prompt: str, images: Sequence[Any], continuations: Sequence[Sequence[int]]) -> Iterator[Floats]:
    """For each continuation its logits (len + 1, V): after the rendered prompt, and after each of its tokens.

    The prompt is prefilled once; `images` as for `VLM.answer`. Raises PromptError where they do not fit the context.
    """
    request = vlm.request(prompt, images, {}, started=time.perf_counter())
    embeds = splice(request.ids, [vlm.encode_image(image, len(images)) for image in images], vlm.embedding)
    decoder = vlm.decoder
    decoder.rewind(0)
    first = prefill(decoder, embeds, request.blocks).copy()
    for tokens in continuations:
        decoder.rewind(len(request.ids))
        yield np.stack([first, *(decoder.decode(row).copy() for row in vlm.embedding.rows(list(tokens)))])


def losses(vlm: VLM, question: str, images: Sequence[Any], answers: Sequence[str]) -> list[tuple[float, bool]]:
    """Of each answer to a question: its mean loss per token in nats, and whether greedy decoding begins with it.

    An answer is written as the chat template writes the assistant's turn, without what ends it. Raises PromptError.
    """
    user = user_message(question, len(images), vlm.spec.prompt)
    prompt = render([user], vlm.spec.prompt)
    tokens = [_tail(vlm, user, prompt, answer) for answer in answers]
    found = []
    for ids, logits in zip(tokens, after(vlm, prompt, images, tokens), strict=True):
        chosen = log_softmax(logits[:-1])[np.arange(len(ids)), ids]
        found.append((float(-chosen.mean()), logits[:-1].argmax(-1).tolist() == ids))
    return found


def bundle_reference(
    name: str, vlm: VLM, questions: QuestionSet, watch: Watch = lambda done, of: None, *, count: int = QUESTIONS
) -> Reference:
    """The reference that an opened bundle is, on `count` of the questions, evenly spread."""
    chosen = spread(questions.questions, count)
    found = []
    for done, question in enumerate(chosen):
        watch(done, len(chosen))
        pictures = question.pictures()
        said = vlm.answer(question.text, pictures, max_new_tokens=TOKENS)
        prompt = rendered(question.text, len(pictures), vlm.spec.prompt)
        (logits,) = after(vlm, prompt, pictures, [said.token_ids[:-1]])
        found.append(Distributions(question, said.token_ids, logits))
    return Reference(name, vlm.spec.fingerprint, tuple(found))


def checkpoint_reference(
    folder: Path, questions: QuestionSet, watch: Watch = lambda done, of: None, *, count: int = _OF_CHECKPOINTS
) -> Reference:
    """The reference that a checkpoint is, on `count` of the questions: transformers' tower, a float32 decoder in torch.

    Questions without a picture are passed over. Raises CheckpointError, DependencyError without torch, and InputError
    where no question has a picture.
    """
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "safetensors")):
        raise DependencyError("a checkpoint as reference needs torch: pip install 'vlm-export[export]'")
    from vlm_export.reference import compute_reference
    from vlm_models.model import load_model

    pictured = [q for q in questions.questions if q.image is not None]
    if not pictured:
        raise InputError(f"no question of {questions.name} has a picture: a checkpoint is compared on pictures only")
    model, found = load_model(folder), []
    chosen = spread(pictured, count)
    with tempfile.TemporaryDirectory() as scratch:
        for done, question in enumerate(chosen):
            watch(done, len(chosen))
            file = question.file(Path(scratch))
            assert file is not None
            prompt = rendered(question.text, 1, model.spec.prompt)
            reference = compute_reference(model, file, prompt, tokens=TOKENS)
            greedy, ends = reference.greedy, frozenset(model.spec.prompt.eos_token_ids)
            length = next((i + 1 for i, token in enumerate(greedy) if token in ends), len(greedy))
            found.append(Distributions(question, greedy[:length], reference.logits[:length]))
    return Reference(readable(folder.resolve().name), model.spec.fingerprint, tuple(found))


def mean_divergence(vlm: VLM, reference: Reference) -> float:
    """Mean KL(reference || bundle) in nats over the first tokens of the reference's own greedy answers.

    Raises InputError for a reference of another checkpoint, CheckError for logits that are not numbers.
    """
    if vlm.spec.fingerprint != reference.fingerprint:
        raise InputError(
            f"{vlm.bundle.folder.name} is not of the checkpoint that {reference.name} is of: "
            "KL compares bundles of one checkpoint"
        )
    rows = []
    for one in reference.distributions:
        pictures = one.question.pictures()
        prompt = rendered(one.question.text, len(pictures), vlm.spec.prompt)
        (logits,) = after(vlm, prompt, pictures, [one.tokens[:-1]])
        rows.append(divergence(one.logits, logits))
    kl = float(np.concatenate(rows).mean())
    if not math.isfinite(kl):
        raise CheckError(f"logits of {vlm.bundle.folder.name} or {reference.name} are not numbers: export again")
    return kl


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """At most `count` of them, evenly over the whole."""
    if count >= len(questions):
        return list(questions)
    return [questions[i * len(questions) // count] for i in range(count)]


def _tail(vlm: VLM, user: Mapping[str, Any], prompt: str, answer: str) -> list[int]:
    """Token ids of the answer after the prompt, as one text where the tokenizer does not join them at the seam."""
    text = answer.strip()
    if not text:
        raise PromptError("an answer whose likelihood is asked for is empty: write one or more words")
    whole = render([user, {"role": "assistant", "content": text}], vlm.spec.prompt, add_generation_prompt=False)
    written = whole.startswith(prompt) and text in whole[len(prompt) :]
    tail = whole[len(prompt) : whole.rindex(text) + len(text)] if written else text
    before, both = vlm.tokenizer.encode(prompt), vlm.tokenizer.encode(prompt + tail)
    if both[: len(before)] == before:
        return both[len(before) :]
    return vlm.tokenizer.encode(tail, add_special_tokens=False)
