"""ONNX Runtime: three graphs, the language model's streamed from the checkpoint, the vision part's traced."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx import TensorProto

from vlm_export.onnx.block import declare
from vlm_export.onnx.graph import Graph
from vlm_export.onnx.language import Edge, OnnxLanguage
from vlm_export.onnx.linear import Linears
from vlm_export.onnx.trace import trace
from vlm_export.onnx.web import web_notes
from vlm_export.preflight import weight_bytes
from vlm_export.rules import check_rules, kept_note, language_layers
from vlm_export.target import Job, Progress
from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.language import walk
from vlm_models.model import Model
from vlm_models.spec import VLMSpec
from vlm_quant.recipe import Precision, Recipe, refuse_formats
from vlm_runtime.manifest import PARTS, Part

if TYPE_CHECKING:
    from vlm_export.reference import Reference

ENGINE = "onnx"
ENGINES = dict.fromkeys(PARTS, ENGINE)
RUN_BY = (ENGINE,)
GRIDS = "zero points"


def requires(recipe: Recipe, spec: VLMSpec, parts: Collection[str], max_context: int) -> None:
    """Every layer takes every precision; GroupQueryAttention takes heads and rotations of multiples of 16 channels.

    Raises CheckpointError for a language model of other sizes, RecipeError for types of other targets and for rules
    that fit none of its layers.
    """
    refuse_formats(recipe, parts, "onnx")
    if "language_model" not in parts:
        return
    language = spec.language
    check_rules(recipe.language, language_layers(language), "language_model")
    ropes = [rope.dim for rope in (language.rope, language.rope_local) if rope is not None]
    for what, size in (("its head_dim is", language.head_dim), *(("its rotated channels are", dim) for dim in ropes)):
        if size % 16:
            raise CheckpointError(f"target 'onnx' takes attention heads of multiples of 16 channels; {what} {size}")


def bytes_needed(model: Model, recipe: Recipe, parts: Collection[str]) -> float:
    """The weights at their precisions; the graphs themselves are small."""
    return sum(weight_bytes(model, part, recipe, _bytes_per_weight) for part in parts)


def checks(job: Job, written: Mapping[str, Part], reference: Reference) -> dict[str, Any]:
    """Nothing beyond parity."""
    return {}


def build(job: Job) -> dict[str, Part]:
    """Write root/onnx/{language_model,projector,vision_encoder}.onnx, one after the other to bound memory."""
    model, recipe, progress = job.model, job.recipe, job.progress
    folder = job.root / ENGINE
    folder.mkdir(parents=True, exist_ok=True)
    spec, parts = model.spec, {}
    if "language_model" in job.parts:
        precision, context = recipe.language, job.max_context
        parts["language_model"] = language_model(
            model.checkpoint, spec, precision, folder, context, progress, web=job.web
        )
    vision, projector = spec.vision, spec.projector
    features, pixels = (vision.image_tokens, projector.in_features), (3, vision.image_size, vision.image_size)
    for part, load, shape, precision, names in (
        ("projector", model.projector, features, recipe.projector, ("image_features", "image_embeds")),
        ("vision_encoder", model.vision_encoder, pixels, recipe.vision, ("pixel_values", "image_features")),
    ):
        if part not in job.parts:
            continue
        progress(part, 0, 1)
        with Graph(folder / f"{part}.onnx", part) as graph:
            linears = Linears(graph, precision, web=job.web)
            trace(load(), shape, graph, linears, names)
            check_rules(precision, linears.layers, part)
            parts[part] = _save(graph, spec, part, precision, linears.tally.details(), web=job.web)
        progress(part, 1, 1)
    return parts


def language_model(
    checkpoint: Checkpoint,
    spec: VLMSpec,
    precision: Precision,
    folder: Path,
    max_context: int,
    progress: Progress,
    *,
    web: bool = False,
) -> Part:
    """The decoder with its head: embeddings (1, S, hidden) → logits of the last row (1, 1, vocab).

    The KV cache of layer l is a pair of buffers (1, kv_heads, max_context, head_dim), given as
    past_key_values.l.{key,value} and, the same buffers, as present.l.{key,value}.
    """
    with Graph(folder / "language_model.onnx", "language_model") as graph:
        graph.input("inputs_embeds", TensorProto.FLOAT, (1, "rows", spec.language.hidden_size))
        graph.input("seqlens_k", TensorProto.INT32, (1,))
        graph.input("total_sequence_length", TensorProto.INT32, ())
        if spec.language.both_ways != "none":
            declare(graph)
        emitter = OnnxLanguage(graph, checkpoint, spec.language, precision, max_context, progress, web=web)
        emitter.finish(walk(spec.language, emitter, Edge("inputs_embeds")))
        return _save(graph, spec, "language_model", precision, emitter.linear_layers.tally.details(), web=web)


def _bytes_per_weight(precision: Precision) -> float:
    """On disk, scales and zero points included."""
    if precision.weights == "int4":
        return 0.5 + 4.5 / precision.group_size
    return {"fp32": 4.0, "fp16": 2.0, "int8": 1.1}[precision.weights]


def _save(graph: Graph, spec: VLMSpec, part: str, precision: Precision, details: dict[str, Any], *, web: bool) -> Part:
    graph.save({"vlm.fingerprint": spec.fingerprint, "vlm.part": part})
    files = (f"{ENGINE}/{graph.path.name}", f"{ENGINE}/{graph.data_path.name}")
    notes = [*kept_note(part, precision, details["kept"]), *web_notes(part, details["linears"], web=web)]
    written = {"data_bytes": graph.size, "notes": notes, **({"web": True} if web else {})}
    return Part(files[0], files, str(precision), {**details, **written})
