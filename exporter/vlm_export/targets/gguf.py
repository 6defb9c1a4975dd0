"""GGUF: the language model for llama.cpp, beside ONNX vision parts, and an mmproj file for llama.cpp's own tools."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlm_export.gguf.architecture import architecture, embed_scale, inexact
from vlm_export.gguf.file import FileFacts, write_gguf
from vlm_export.gguf.layers import direct, kept, tensor_types
from vlm_export.gguf.mmproj import unsupported, write_mmproj
from vlm_export.gguf.mtmd import measure_mmproj
from vlm_export.gguf.quantize import quantize_gguf
from vlm_export.gguf.served_template import served_template
from vlm_export.gguf.tensors import exact_type, tensors
from vlm_export.gguf.tokenizer import tokenizer_fields
from vlm_export.importance import SAMPLES, importance
from vlm_export.preflight import weight_bytes, weights
from vlm_export.rules import kept_note
from vlm_export.target import Job
from vlm_models.model import Model
from vlm_models.spec import VLMSpec
from vlm_quant.calibration import sample
from vlm_quant.gguf_types import GGUF_TYPES, gguf_type
from vlm_quant.recipe import Recipe
from vlm_runtime.llama import library
from vlm_runtime.manifest import Part

if TYPE_CHECKING:
    from vlm_export.reference import Reference

ENGINE = "gguf"
ENGINES = {"vision_encoder": "onnx", "projector": "onnx", "language_model": ENGINE}
RUN_BY = (ENGINE,)
GRIDS = "own"
LANGUAGE_MODEL, MMPROJ = f"{ENGINE}/language_model.gguf", f"{ENGINE}/mmproj.gguf"


def requires(recipe: Recipe, spec: VLMSpec, parts: Collection[str], max_context: int) -> None:
    """llama.cpp at the version known to agree, a type it has, an architecture whose graph computes this model."""
    architecture(spec.language, max_context)
    tensor_types(recipe.language, spec.language)
    library()


def bytes_needed(model: Model, recipe: Recipe, parts: Collection[str]) -> float:
    """The language model, the exact copy of it that a quantizer reads, and the mmproj."""
    half, copy = 2.0, 0.0
    if not direct(recipe.language):
        copy = GGUF_TYPES[exact_type(tensors(model.checkpoint, model.spec))].bits / 8
    towers = weights(model, "vision_encoder") + weights(model, "projector")
    return towers * half + weight_bytes(
        model, "language_model", recipe, lambda layer: gguf_type(layer).bits / 8 + copy, embedding=True
    )


def build(job: Job) -> dict[str, Part]:
    """Write root/gguf/language_model.gguf and, where llama.cpp can run such a tower, root/gguf/mmproj.gguf."""
    model, spec = job.model, job.model.spec
    (job.root / ENGINE).mkdir(parents=True, exist_ok=True)
    mark = {"vlm.fingerprint": spec.fingerprint, "vlm.part": "language_model"}
    words = tokenizer_fields(model.checkpoint, spec, mode=job.gguf_tokenizer, progress=job.progress)
    template = served_template(str(words.values["tokenizer.chat_template"]), spec.prompt)
    vocabulary = {**words.values, "tokenizer.chat_template": template}
    kind, arch = gguf_type(job.recipe.language), architecture(spec.language, job.max_context)
    weights, path = tensors(model.checkpoint, spec), job.root / LANGUAGE_MODEL
    precision, own = job.recipe.language, tensor_types(job.recipe.language, spec.language)
    calibrated: dict[str, Any] = {}
    if direct(precision):
        facts = write_gguf(path, arch, mark, weights, kind, vocabulary, own=own, progress=job.progress)
    else:
        exact = path.with_suffix(".exact.gguf")
        write_gguf(exact, arch, mark, weights, GGUF_TYPES[exact_type(weights)], vocabulary, progress=job.progress)
        matter, calibrated = _importance(job)
        threads = os.cpu_count() or 1
        facts = quantize_gguf(exact, path, kind, matter, spec.language, own=own, threads=threads, progress=job.progress)
        exact.unlink()
        facts = replace(facts, rounded_again=tuple(tensor.name for tensor in weights if tensor.grid is not None))
    left = kept(precision, facts.types, facts.fallbacks, spec.language.tied)
    details = {
        **_facts(facts),
        "kept": left,
        **calibrated,
        "architecture": arch.name,
        "embed_scale": embed_scale(spec.language),
        "inexact": inexact(spec.language),
        "tokenizer": dict(words.details),
    }
    files = [LANGUAGE_MODEL]
    if (reason := unsupported(model)) is None:
        full = job.recipe.vision.weights == "fp32"
        write_mmproj(model, job.root / MMPROJ, type="f32" if full else "f16", progress=job.progress)
        files.append(MMPROJ)
    else:
        details["no_mmproj"] = reason
    notes = [*_notes(facts, kind.name, calibrated, direct(precision), left), *words.details.get("notes", [])]
    notes += kept_note("language_model", replace(precision, format=kind.name), left)
    if less := inexact(spec.language):
        notes.append(less)
    if reason is not None:
        notes.append(f"no mmproj for llama.cpp's own tools: {reason}")
    described = str(replace(precision, format=kind.name))
    return {"language_model": Part(LANGUAGE_MODEL, tuple(files), described, {**details, "notes": notes})}


def checks(job: Job, written: Mapping[str, Part], reference: Reference) -> dict[str, Any]:
    """How far llama.cpp's own vision code is from the checkpoint, with our mmproj file."""
    part = written["language_model"]
    if MMPROJ not in part.files:
        return {}
    picture = job.root / "golden/image.png"
    measured = measure_mmproj(job.root / MMPROJ, job.root / LANGUAGE_MODEL, picture, reference, job.model.spec)
    return {"mmproj": measured}


def _importance(job: Job) -> tuple[Mapping[str, Any] | None, dict[str, Any]]:
    """What each channel counts, and the record of the pairs it was measured on."""
    if job.calibration is None:
        return None, {}
    chosen = sample(job.calibration, SAMPLES, 0)
    record = {"pairs": len(chosen.pairs), "of": len(job.calibration.pairs), "sha256": chosen.sha256}
    return importance(job.model, chosen, progress=job.progress), {"calibration": record}


def _facts(facts: FileFacts) -> dict[str, Any]:
    found: dict[str, Any] = {"tensors": dict(Counter(facts.types.values())), "fallbacks": dict(facts.fallbacks)}
    if facts.grids or facts.rounded_again:
        found |= {"grids": len(facts.grids), "rounded_again": list(facts.rounded_again)}
    return found


def _notes(
    facts: FileFacts, kind: str, calibrated: Mapping[str, Any], direct: bool, left: Mapping[str, str]
) -> list[str]:
    """Sentences for the console."""
    notes = []
    if not direct and not calibrated:
        notes.append(
            f"{kind} without calibration: errors are not weighed by what pictures and questions need; "
            "give --calibration with image-text pairs"
        )
    told = [reason for name, reason in facts.fallbacks.items() if name not in left]
    for reason, count in Counter(told).items():
        notes.append(f"{count} tensor{'s are' if count > 1 else ' is'} {reason}")
    return notes
