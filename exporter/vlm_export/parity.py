"""Parity: a bundle run as a device would run it, each stage on what the stage before it gave, against the reference.

How far a stage may be off follows from the coarsest precision of the parts it has passed through. fp32 must be equal
to rounding, greedy tokens included. fp16 rounds weights to 11 bits, which costs well under a tenth of its limits. int8
was measured at a KL of 0.004 to 0.02, int4 in groups of 32, rounded to nearest, at 0.1 to 0.5 on a language model of
135M parameters and less on larger ones; a few times that changes answers. Pixels are equal to float32 rounding.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from vlm_export.reference import Reference
from vlm_export.target import Progress, silent
from vlm_models.errors import CheckError
from vlm_quant.recipe import Precision, Recipe, Weights
from vlm_runtime.blocks import Blocks, blocks_of, prefill
from vlm_runtime.bundle import Bundle
from vlm_runtime.embedding import EmbeddingTable
from vlm_runtime.engine import Decoder, Options, find_engine
from vlm_runtime.image import open_image
from vlm_runtime.splice import splice
from vlm_runtime.tiling import image_newline, layout_of, pack, tiles_of
from vlm_runtime.tokenizer import Tokenizer, prompt_ids

Floats = npt.NDArray[np.float32]
Limits = Mapping[str, float]

# stage → the parts it has passed through
STAGES: Mapping[str, tuple[str, ...]] = {
    "pixel_values": (),
    "image_features": ("vision",),
    "image_embeds": ("vision", "projector"),
    "inputs_embeds": ("vision", "projector", "embedding"),
    "logits": ("vision", "projector", "embedding", "language"),
}
PIXELS: Limits = {"max_abs": 1e-5}
ROWS: Mapping[Weights, Limits] = {
    "fp32": {"relative_l2": 1e-4},
    "fp16": {"cosine": 0.999},
    "int8": {"cosine": 0.99},
    "int4": {"cosine": 0.93},
    "int3": {"cosine": 0.85},
    "int2": {"cosine": 0.7},
}
LOGITS: Mapping[Weights, Limits] = {
    "fp32": {"relative_l2": 1e-4},
    "fp16": {"cosine": 0.999, "kl": 0.01},
    "int8": {"cosine": 0.99, "kl": 0.1},
    "int4": {"cosine": 0.9, "kl": 1.0},
    "int3": {"cosine": 0.8, "kl": 2.0},
    "int2": {"cosine": 0.6, "kl": 4.0},
}
COARSER: tuple[Weights, ...] = get_args(Weights)
AT_LEAST = ("cosine", "top1")


class Runner:
    """The parts of a bundle, each on its engine, opened when first needed, and what they make of picture and prompt."""

    def __init__(self, bundle: Bundle, engines: Mapping[str, str], picture: Path, prompt: str) -> None:
        self.bundle, self.engines, self.prompt = bundle, engines, prompt
        image = open_image(picture)
        self.layout = layout_of((image.height, image.width), bundle.spec)
        self.pixel_values: Floats = tiles_of(image, bundle.spec, self.layout)
        self.table = EmbeddingTable(bundle)
        # An engine may round by itself, whatever the weights are: its target says so.
        self.inexact = bool(bundle.part("language_model", engines["language_model"]).details.get("inexact"))

    @cached_property
    def prompt_ids(self) -> list[int]:
        return prompt_ids(self.prompt, [self.layout], Tokenizer(self.bundle).encode, self.bundle.spec.prompt)

    @property
    def blocks(self) -> Blocks:
        return blocks_of(self.prompt_ids, self.bundle.spec)

    @cached_property
    def image_features(self) -> Floats:
        return self._encode("vision_encoder", self.pixel_values)

    @cached_property
    def image_embeds(self) -> Floats:
        return self._encode("projector", self.image_features)

    @cached_property
    def inputs_embeds(self) -> Floats:
        rows = pack(self.image_embeds, self.bundle.spec, self.layout, image_newline(self.bundle))
        return splice(self.prompt_ids, [rows], self.table)

    @cached_property
    def decoder(self) -> Decoder:
        return find_engine(self.engines["language_model"]).decoder(self.bundle, Options())

    def logits(self, tokens: Sequence[int]) -> Floats:
        """(len(tokens) + 1, V): after the prompt, and after each of `tokens`."""
        self.decoder.rewind(0)
        rows = [prefill(self.decoder, self.inputs_embeds, self.blocks).copy()]
        rows += [self.decoder.decode(row).copy() for row in self.table.rows(tokens)]
        return np.stack(rows)

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """This engine's own `count` greedy tokens after the prompt and `tokens`."""
        self.decoder.rewind(0)
        logits = prefill(self.decoder, np.concatenate([self.inputs_embeds, self.table.rows(tokens)]), self.blocks)
        out: list[int] = []
        while len(out) < count:
            out.append(int(logits.argmax()))
            logits = self.decoder.decode(self.table.rows(out[-1:])[0])
        return out

    def _encode(self, part: str, x: Floats) -> Floats:
        rows: Floats = find_engine(self.engines[part]).encoder(self.bundle, part, Options()).run(x)
        return rows


def measure(runner: Runner, reference: Reference, recipe: Recipe, progress: Progress = silent) -> dict[str, Any]:
    """The manifest's `parity.<target>`: every stage with its numbers and thresholds, and the greedy tokens.

    Raises CheckError when the bundle's tokenizer gives another prompt than transformers', since nothing compares then.
    """
    stages: dict[str, dict[str, Any]] = {}
    if tuple(runner.prompt_ids) != reference.prompt_ids:
        raise CheckError(_other_prompt(runner.prompt_ids, reference.prompt_ids))
    for done, stage in enumerate(STAGES):
        progress("parity", done, len(STAGES))
        weights = coarsest(recipe, STAGES[stage])
        if stage == "logits" and weights == "fp32" and runner.inexact:
            weights = "fp16"
        want: Floats = getattr(reference, stage)
        got = runner.logits(reference.greedy[:-1]) if stage == "logits" else getattr(runner, stage)
        if got.shape != want.shape:
            raise CheckError(
                f"parity failed: {stage} have shape {got.shape} in the bundle, {want.shape} in the checkpoint"
            )
        limits = LOGITS[weights] if stage == "logits" else ROWS[weights] if STAGES[stage] else PIXELS
        stages[stage] = {**distance(want, got), **(divergence(want, got) if stage == "logits" else {})}
        stages[stage]["threshold"] = dict(limits)
    progress("parity", len(STAGES), len(STAGES))
    picked = got.argmax(-1).tolist()
    equal = next((i for i, t in enumerate(reference.greedy) if picked[i] != t), len(reference.greedy))
    greedy = {"equal": equal, "of": len(reference.greedy)}
    if weights == "fp32":
        greedy["threshold"] = len(reference.greedy)
    passed = all(not missed(s) for s in stages.values()) and equal >= greedy.get("threshold", 0)
    return {"passed": passed, "stages": stages, "greedy": greedy, "reference": reference.how}


def _other_prompt(got: Sequence[int], want: Sequence[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
    return (
        f"parity failed: the bundle's prompt has {len(got)} tokens, the checkpoint's own {len(want)}, and token {at} "
        "is the first that differs: chat template, tokenizer or the number of image tokens is another"
    )


@np.errstate(invalid="ignore", over="ignore")  # infinities give NaN, which is beyond every threshold
def distance(reference: Floats, other: Floats) -> dict[str, float]:
    """Cosine and relative L2 of all numbers as one vector, and the largest absolute difference; in float64."""
    a, b = reference.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    norm_a, norm_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    return {
        "cosine": float(np.minimum(1.0, a @ b / max(norm_a * norm_b, 1e-300))),  # keeps NaN, which min() does not
        "max_abs": float(np.abs(a - b).max()),
        "relative_l2": float(np.linalg.norm(a - b)) / max(norm_a, 1e-300),
    }


@np.errstate(invalid="ignore", over="ignore")
def divergence(reference: Floats, other: Floats) -> dict[str, float]:
    """Of logits (N, V): the share of rows with the same best token, and the mean KL(reference || other) in nats."""
    p, q = _log_softmax(reference), _log_softmax(other)
    return {
        "top1": float((reference.argmax(-1) == other.argmax(-1)).mean()),
        "kl": float(np.maximum(0.0, (np.exp(p) * (p - q)).sum(-1).mean())),
    }


def missed(stage: Mapping[str, Any]) -> list[str]:
    """The metrics of a stage that are beyond their threshold; NaN is beyond every threshold."""
    return [m for m, limit in stage["threshold"].items() if not _within(m)(_number(stage[m]), limit)]


def coarsest(recipe: Recipe, parts: Sequence[str]) -> Weights:
    """The coarsest precision of some parts and their layers; fp32 of none."""
    return max((w for part in parts for w in _weights(getattr(recipe, part))), key=COARSER.index, default="fp32")


def _weights(precision: Precision | None) -> list[Weights]:
    """Of the part and its rules; none for what stays as the checkpoint stores it."""
    return [] if precision is None else [precision.weights, *(rule.weights for _, rule in precision.rules)]


def failure(parity: Mapping[str, Any], recipe: Recipe) -> str | None:
    """One line on the first stage that failed and what to try; None when parity passed."""
    if parity["passed"]:
        return None
    for stage, numbers in parity["stages"].items():
        for metric in missed(numbers):
            sign = "<" if metric in AT_LEAST else ">"
            number = f"{metric} {_number(numbers[metric]):.4g} {sign} {numbers['threshold'][metric]:g}"
            return f"parity failed: {stage} {number}{_advice(recipe, STAGES[stage])}"
    equal, of = parity["greedy"]["equal"], parity["greedy"]["of"]
    return f"parity failed: {equal} of {of} greedy tokens are equal{_advice(recipe, STAGES['logits'])}"


def _advice(recipe: Recipe, parts: Sequence[str]) -> str:
    if not parts:
        return ": this is a fault of vlm-export's preprocessing; please report it with the checkpoint's name"
    worst = coarsest(recipe, parts)
    part = next(p for p in reversed(parts) if worst in _weights(getattr(recipe, p)))
    precision: Precision = getattr(recipe, part)
    if worst == "fp32":
        return " at fp32: this is a fault of vlm-export; please report it with the checkpoint's name"
    rules = tuple(rule for rule in precision.rules if rule[1].weights != worst)
    finer: Any
    if precision.weights != worst:
        finer = dataclasses.replace(precision, rules=rules)
    elif worst == "int4" and precision.group_size > 32:
        finer = dataclasses.replace(precision, group_size=32)
    else:
        finer = None if part == "embedding" else Precision(COARSER[COARSER.index(worst) - 1], rules=rules)
    return f" at {part}={precision}; try --precision {dataclasses.replace(recipe, **{part: finer})}"


def _within(metric: str) -> Callable[[float, float], bool]:
    return operator.ge if metric in AT_LEAST else operator.le


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    out: npt.NDArray[np.float64] = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return out
