"""`vlm-export --inspect`: what a checkpoint is, how its pictures and prompts work, what each target would need."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from vlm_export import golden, preflight
from vlm_export.table import size
from vlm_export.target import find_target, not_installed, target_names
from vlm_models.checkpoint import Sources
from vlm_models.errors import DependencyError, InputError
from vlm_models.model import Model
from vlm_models.spec import VLMSpec
from vlm_quant.recipe import Precision, Recipe, parse_recipe
from vlm_runtime.manifest import PARTS
from vlm_runtime.tiling import layout_of

_SIZES = ((512, 512), (480, 640), (1080, 1920), (3000, 600))  # (height, width) of pictures as people have them
_KV_BYTES = 4  # a number of the KV cache where an engine does not choose: float32
_FLOAT = 4
_LIBRARIES = 1 << 29  # torch and what it loads
_WEIGHT_BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5, "int3": 0.375, "int2": 0.25}


@dataclass(frozen=True)
class PartFacts:
    """One part: what it is in a sentence, its parameters, and how many of them are stored in which type."""

    what: str
    parameters: int
    stored: Mapping[str, int]


@dataclass(frozen=True)
class Needs:
    """What one target takes, in bytes: on the disk while it is made, in memory to export, to check and to run it.

    Memory is estimated from the sizes of weights and KV cache; the check takes less, and longer, where twice that is
    not free. `refused` says why it cannot be exported at all.
    """

    disk: int | None = None
    export: int | None = None
    check: int | None = None
    run: int | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Inspection:
    """A checkpoint that was opened and checked, without exporting anything."""

    name: str
    family: str
    layout: str
    notes: tuple[str, ...]
    parts: Mapping[str, PartFacts]
    image_token: str
    pictures: str
    template: str
    prompt: str
    context: int
    precision: str
    targets: Mapping[str, Needs]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def inspect(checkpoint: str | Path, sources: Sources, precision: str, max_context: int | None) -> Inspection:
    """Open a checkpoint of any layout and say what is in it. Raises what an export of it would raise at once."""
    recipe = parse_recipe("fp16" if precision.strip() == "auto" else precision)
    try:
        from vlm_models.model import load_model

        model = load_model(checkpoint, sources)
    except ModuleNotFoundError as error:
        raise not_installed(error, "reading a checkpoint", "export") from error
    spec = model.spec
    context = preflight.context_of(spec, max_context)
    shown = repr(spec.prompt.picture)
    token = f"{spec.prompt.image_token!r}, id {spec.prompt.image_token_id}"
    return Inspection(
        name=spec.name,
        family=spec.family,
        layout=model.checkpoint.layout,
        notes=model.checkpoint.notes,
        parts={part: _part(model, part, what) for part, what in _described(spec).items()},
        image_token=token if spec.prompt.placeholder is None else f"{token}; a picture is written as {shown}",
        pictures=_pictures(spec),
        template="a chat template" if spec.prompt.chat_template is not None else "none: written as LLaVA-1.5 is asked",
        prompt=golden.prompt(spec.prompt),
        context=context,
        precision=str(recipe),
        targets={name: _needs(name, model, recipe, context) for name in target_names()},
    )


def _described(spec: VLMSpec) -> dict[str, str]:
    vision, projector, language = spec.vision, spec.projector, spec.language
    layers = ", ".join(map(str, vision.feature_layers))
    class_row = "without its first row" if vision.select_strategy == "default" else "all rows"
    heads = f"{language.heads} heads" + (f" over {language.kv_heads}" if language.kv_heads != language.heads else "")
    return {
        "vision_encoder": f"{vision.model_type}: {vision.layers} layers of {vision.hidden_size}, pictures of "
        f"{vision.image_size} × {vision.image_size} in patches of {vision.patch_size}; hidden state {layers}, "
        f"{class_row}",
        "projector": f"{projector.kind}: {projector.in_features} → {projector.out_features}, {projector.activation}, "
        f"{vision.image_tokens} → {spec.tile_tokens} rows",
        "language_model": f"{language.model_type}: {language.layers} layers of {language.hidden_size}, {heads}, "
        f"{language.vocab_size} tokens{', tied head' if language.tied else ''}, {language.max_positions} positions",
    }


def _part(model: Model, part: str, what: str) -> PartFacts:
    stored: Counter[str] = Counter()
    for name in preflight.tensors_of(model, part):
        stored[model.checkpoint.dtype(name)] += math.prod(model.checkpoint.shape(name))
    return PartFacts(what, stored.total(), dict(stored))


def _pictures(spec: VLMSpec) -> str:
    """How many tokens a picture takes: one number, or examples by its shape."""
    if spec.tiling is None:
        return f"{spec.prompt.image_tokens} tokens each, whatever their shape"
    examples = []
    for height, width in _SIZES:
        layout = layout_of((height, width), spec)
        examples.append(f"{width} × {height}: {layout.tiles} tiles, {layout.rows} tokens")
    return f"cut into tiles by their shape ({spec.tiling.rule}); {'; '.join(examples)}"


def _needs(name: str, model: Model, recipe: Recipe, context: int) -> Needs:
    try:
        target = find_target(name)
        built: dict[str, list[str]] = {}
        for part, engine in target.ENGINES.items():
            built.setdefault(name if engine in target.RUN_BY else engine, []).append(part)
        for builder, parts in built.items():
            find_target(builder).requires(recipe, model.spec, parts, context)
    except (InputError, DependencyError) as error:
        return Needs(refused=str(error))
    disk = preflight.bytes_needed(model, recipe, built, shared=False)
    language = model.spec.language
    cache = 2 * language.layers * language.kv_heads * language.head_dim * context * _KV_BYTES
    eyes = _FLOAT * (preflight.weights(model, "vision_encoder") + preflight.weights(model, "projector"))
    stored = sum(preflight.weight_bytes(model, part, recipe, _stored) for part in PARTS)
    check = _FLOAT * preflight.weights(model, "language_model", embedding=True)
    return Needs(disk=disk, export=2 * eyes + _LIBRARIES, check=check, run=math.ceil(stored) + cache)


def _stored(precision: Precision) -> float:
    """Bytes of one weight with its share of the scales, whatever the format."""
    return _WEIGHT_BYTES[precision.weights] + _FLOAT / max(precision.group_size, 32)


def lines(found: Inspection) -> list[str]:
    """For people, a fact a line."""
    out = [f"{found.name}: family {found.family}, layout {found.layout}"]
    out += [f"  {note}" for note in found.notes]
    total = sum(part.parameters for part in found.parts.values())
    for name, part in found.parts.items():
        stored = ", ".join(sorted(part.stored))
        out.append(f"{name:<15} {_count(part.parameters)} parameters ({stored}); {part.what}")
    out.append(f"{'total':<15} {_count(total)} parameters; embedding table in the language model")
    out.append(f"{'image token':<15} {found.image_token}")
    out.append(f"{'pictures':<15} {found.pictures}")
    out.append(f"{'template':<15} {found.template}; one question about a picture becomes:")
    out.append(f"{'':<15} {found.prompt!r}")
    out.append(f"exported at {found.precision}, with a context of {found.context}:")
    for name, needs in found.targets.items():
        memory = {"to export": needs.export, "for the check": needs.check, "to run": needs.run}
        said = ", ".join(f"{size(amount)} {use}" for use, amount in memory.items() if amount is not None)
        what = f"about {size(needs.disk or 0)} on the disk while it is made; memory: {said}"
        out.append(f"  {name:<13} {what if needs.refused is None else f'cannot: {needs.refused}'}")
    return out


def show_checkpoint(
    checkpoint: str | None, sources: Sources, precision: str, max_context: int | None, *, as_json: bool
) -> None:
    """`--inspect` on stdout, for people or as one JSON object."""
    if checkpoint is None:
        raise InputError("missing CHECKPOINT: --inspect looks at a checkpoint")
    found = inspect(checkpoint, sources, precision, max_context)
    typer.echo(json.dumps(found.plain()) if as_json else "\n".join(lines(found)))


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"
