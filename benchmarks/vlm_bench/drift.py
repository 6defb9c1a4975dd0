"""Where bundles part from their checkpoint: the same pictures and prompts through each, compared stage by stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import vlm_runtime
from vlm_bench.diff import words
from vlm_bench.results import Deviation, Drift, readable
from vlm_export.parity import ROWS, STAGES, distance
from vlm_export.target import Progress, not_installed, silent
from vlm_models.errors import InputError, VLMError
from vlm_runtime.blocks import prefill
from vlm_runtime.prompt import render, user_message
from vlm_runtime.splice import splice

Floats = NDArray[np.float32]
Case = tuple[Path, str]
"""A picture and a prompt."""
Skip = Callable[[str, str], None]
"""Told of a contestant that cannot run, and why."""

# A stage has drifted when its cosine to the reference is lower than what parity allows fp16: rounding explains no more.
LIMIT = ROWS["fp16"]["cosine"]
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Trace:
    """What one contestant makes of one case: parity's stages by name, the tokens that `logits` (N, V) follow, the text.

    `logits` row i predicts token i; `pixel_values` (…, 3, s, s), `image_features` (…, T, F), `image_embeds` (…, T, H),
    `inputs_embeds` (S, H). `ended` says whether an end token ended the answer.
    """

    stages: Mapping[str, Floats]
    tokens: tuple[int, ...]
    answer: str
    ended: bool


@dataclass(frozen=True)
class Candidate:
    """A bundle in `folder`, on `engine` (as for vlm-run), called `name` in the report."""

    name: str
    folder: Path
    engine: str | None = None


def drift(
    candidates: Sequence[Candidate],
    images: Sequence[Path],
    prompts: Sequence[str],
    *,
    checkpoint: str | Path | None = None,
    max_new_tokens: int = 16,
    threads: int | None = None,
    skip: Skip | None = None,
    progress: Progress = silent,
) -> tuple[Drift, ...]:
    """Each candidate beside `checkpoint` (in float32, which needs torch), or beside the first candidate without one.

    Every prompt is asked about every picture. A candidate that cannot run is told to `skip`; without it, and for the
    reference always, the error is raised: InputError, BundleError or DependencyError. Raises InputError where there is
    nothing to compare or the bundles are not all of one checkpoint.
    """
    cases = [(image, prompt) for image in images for prompt in prompts]
    if not cases:
        raise InputError("no picture or no prompt to compare answers on: give at least one of each")
    if len(candidates) < (1 if checkpoint is not None else 2):
        raise InputError("drift needs something to compare with: give two bundles, or one and --checkpoint FOLDER")
    total = len(cases) * (len(candidates) + (checkpoint is not None))
    if checkpoint is not None:
        reference, others = CHECKPOINT, tuple(candidates)
        try:
            traces, fingerprint = _checkpoint_traces(checkpoint, cases, max_new_tokens, progress, total)
        except ModuleNotFoundError as error:
            raise not_installed(error, "comparing with a checkpoint", "export") from error
    else:
        reference, others = candidates[0].name, tuple(candidates[1:])
        vlm = _open(candidates[0], threads)
        traces, fingerprint = [trace(vlm, case, max_new_tokens) for case in cases], vlm.spec.fingerprint
    drifts: list[Drift] = []
    for number, candidate in enumerate(others):
        progress(candidate.name, total - len(cases) * (len(others) - number), total)
        try:
            drifts += _beside(reference, fingerprint, cases, traces, candidate, max_new_tokens, threads)
        except VLMError as error:
            if skip is None:
                raise
            skip(candidate.name, str(error))
    progress("", total, total)
    return tuple(drifts)


def trace(vlm: vlm_runtime.VLM, case: Case, max_new_tokens: int, tokens: Sequence[int] | None = None) -> Trace:
    """One case through a bundle: every stage, its own answer, and the logits along `tokens` (None: along its own)."""
    image, prompt = case
    text = render([user_message(prompt, 1, vlm.spec.prompt)], vlm.spec.prompt)
    request = vlm.request(text, [image], {"max_new_tokens": max_new_tokens}, started=0.0)
    pixels = vlm.picture(image).pixels
    features = vlm.vision_encoder.run(pixels)
    rows = vlm.projector.run(features)
    embeds = splice(request.ids, [vlm.encode_image(image)], vlm.embedding)
    said = vlm.answer(prompt, [image], max_new_tokens=max_new_tokens)
    along = tuple(said.token_ids if tokens is None else tokens)
    decoder = vlm.decoder
    decoder.rewind(0)
    logits = [prefill(decoder, embeds, request.blocks).copy()]
    logits += [
        decoder.decode(row).copy() for row in vlm.embedding.rows(along[: decoder.max_context - len(embeds)][:-1])
    ]
    stages = (pixels, features, rows, embeds, np.stack(logits))
    return Trace(dict(zip(STAGES, stages, strict=True)), along, said.text, said.finish_reason == "stop")


def deviations(reference: Trace, other: Trace) -> dict[str, Deviation]:
    """Stage → how far `other` is off; a stage of another size, or with a NaN, has no numbers."""
    return {stage: _deviation(stage, want, other.stages[stage]) for stage, want in reference.stages.items()}


def first_drift(stages: Mapping[str, Deviation]) -> str | None:
    """The first stage with a cosine below LIMIT, or without one; None where all are as near as fp16 is."""
    return next((name for name, one in stages.items() if one.cosine is None or one.cosine < LIMIT), None)


def _beside(
    reference: str,
    fingerprint: str,
    cases: Sequence[Case],
    traces: Sequence[Trace],
    candidate: Candidate,
    max_new_tokens: int,
    threads: int | None,
) -> Iterator[Drift]:
    vlm = _open(candidate, threads)
    if vlm.spec.fingerprint != fingerprint:
        raise InputError(
            f"{candidate.name} is not of the same checkpoint as {reference}: compare bundles of one checkpoint"
        )
    for case, want in zip(cases, traces, strict=True):
        # A streamed reference may have been cut: as many tokens then.
        length = max_new_tokens if want.ended else len(want.tokens)
        got = trace(vlm, case, length, want.tokens)
        stages = deviations(want, got)
        image, prompt = case
        yield Drift(
            reference=reference,
            name=candidate.name,
            image=readable(image),
            prompt=prompt,
            stages=stages,
            first=first_drift(stages),
            answer=got.answer,
            reference_answer=want.answer,
            words=words(want.answer, got.answer),
        )


def _checkpoint_traces(
    checkpoint: str | Path, cases: Sequence[Case], tokens: int, progress: Progress, total: int
) -> tuple[list[Trace], str]:
    """Traces of the checkpoint itself, its answers read by its own tokenizer; and its fingerprint."""
    from transformers import AutoTokenizer

    from vlm_export.reference import compute_reference
    from vlm_models.model import load_model

    model = load_model(checkpoint)
    spec, traces = model.spec.prompt, []
    tokenizer: Any = AutoTokenizer.from_pretrained(model.checkpoint.folder, local_files_only=True)
    for number, (image, prompt) in enumerate(cases):
        progress(CHECKPOINT, number, total)
        text = render([user_message(prompt, 1, spec)], spec)
        made = compute_reference(model, image, text, tokens=tokens)
        end = next((i for i, token in enumerate(made.greedy) if token in spec.eos_token_ids), None)
        said = made.greedy if end is None else made.greedy[: end + 1]
        stages = {name: getattr(made, name) for name in STAGES} | {"logits": made.logits[: len(said)]}
        answer = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        traces.append(Trace(stages, tuple(said), answer, end is not None))
    return traces, model.spec.fingerprint


def _open(candidate: Candidate, threads: int | None) -> vlm_runtime.VLM:
    return vlm_runtime.load(candidate.folder, engine=candidate.engine, threads=threads)


def _deviation(stage: str, want: Floats, got: Floats) -> Deviation:
    if stage == "logits":  # a shorter context ends before the reference does
        want = want[: len(got)]
    if want.size != got.size:
        return Deviation(None, None, None)
    numbers = {name: value if math.isfinite(value) else None for name, value in distance(want, got).items()}
    return Deviation(**numbers)
