"""The layout of the original LLaVA code (github.com/haotian-liu/LLaVA) and of its kin: Bunny, MobileVLM, Yi-VL, …

config.json is the language model's with keys for the pictures (mm_vision_tower, mm_projector_type, …); tensors are
model.layers.…, model.mm_projector.… and, where it was trained, model.vision_tower.…
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_models import conversations
from vlm_models.checkpoint import Checkpoint, Sources, Stored, fingerprint, local_folder
from vlm_models.conversation import Written, chat_template
from vlm_models.errors import CheckpointError
from vlm_models.made import MadeFolder
from vlm_models.original import config as translated
from vlm_models.original import files, names
from vlm_models.original.tower import Tower, find_tower

_TABLE = "language_model.embed_tokens.weight"
_PARTS = ("language_model.", "lm_head.", "vision_tower.", "multi_modal_projector.", "image_newline")


def matches(folder: Path, config: Mapping[str, Any]) -> bool:
    """Keys that only the original code writes, and no adapter."""
    return (
        any(key in config for key in ("mm_vision_tower", "mm_projector_type", "mm_hidden_size"))
        and "text_config" not in config
        and not (folder / "adapter_config.json").is_file()
    )


def open_folder(folder: Path, config: Mapping[str, Any], sources: Sources) -> Checkpoint:
    """A whole model, or a projector (mm_projector.bin) beside the base model of --base or `_name_or_path`."""
    translated.check(folder, config)
    if names.has_weights(folder):
        if sources.base is not None:
            raise CheckpointError(f"{folder} holds a whole model: --base is for adapters and for projectors alone")
        return build(folder, config, names.model_tensors(folder), sources)
    projector = names.projector_tensors(folder)
    if not projector:
        raise CheckpointError(
            f"{folder} has neither a model (model.safetensors, pytorch_model.bin, or shards with an index) nor a "
            "projector (mm_projector.bin)"
        )
    place = sources.base or config.get("_name_or_path")
    try:
        base = local_folder(place) if place else None
    except CheckpointError:
        if sources.base is not None:
            raise
        base = None
    if base is None or base.resolve() == folder.resolve():
        raise CheckpointError(
            f"{folder} holds a projector alone, and its base model {str(place)!r} is not to be had: give it with --base"
        )
    note = f"projector of {folder.name}, everything else of the base model {base}"
    return build(folder, config, {**names.model_tensors(base), **projector}, sources, tokenizer=base, notes=(note,))


def build(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    sources: Sources,
    *,
    tokenizer: Path | None = None,
    notes: Sequence[str] = (),
) -> Checkpoint:
    """The checkpoint of an original `config` and canonical `tensors`, whose tower may be elsewhere.

    `tokenizer` is the folder of the tokenizer where it is not `folder`. Raises CheckpointError for what cannot be read.
    """
    try:
        return _built(folder, config, tensors, sources, tokenizer, notes)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:  # values of other kinds
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: config.json or a file beside it is damaged: {reason}") from error


def _built(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    sources: Sources,
    tokenizer: Path | None,
    notes: Sequence[str],
) -> Checkpoint:
    if _TABLE not in tensors:
        raise CheckpointError(f"{folder}: tensor {_TABLE!r} is missing; the checkpoint is incomplete")
    kind = str(config.get("mm_projector_type") or "linear")
    text = translated.language(folder, config, tensors)
    aspect = translated.aspect(folder, config)
    tower = find_tower(folder, config, tensors, sources)
    tensors = names.like_transformers(kind, {**tensors, **tower.tensors})
    made = MadeFolder()
    path, rows = Path(made.name), tensors[_TABLE].array.shape[0]
    wrapped = bool(config.get("mm_use_im_start_end"))
    own = folder if tokenizer is None or _has_tokenizer(folder) else tokenizer
    patch = (files.PATCH,) if config.get("mm_use_im_patch_token", True) else ()
    tokens = files.write_tokenizer(own, path, (*patch, files.START, files.END) if wrapped else (), rows)
    picture = f"{files.START}{files.IMAGE}{files.END}" if wrapped else files.IMAGE
    (path / files.SOURCE / files.CONFIG).write_text(json.dumps(dict(config)), "utf-8")
    name, why = _conversation(folder, config, text, kind, tokens, sources)
    conversation = conversations.named(name)
    template = tokens.template if conversation is None else chat_template(conversation, picture)
    if template is None or (conversation is None and wrapped):
        raise CheckpointError(
            f"{folder}: the tokenizer has no chat template that pictures can stand in: choose another --conversation"
        )
    edge = int(tower.config.get("image_size", 224))
    grid = translated.pinpoints(folder, config, edge) if aspect.startswith("anyres") else None
    processor = files.write_processor(folder, tower.folder, path, tower.config, aspect, grid)
    (path / "chat_template.jinja").write_text(template, "utf-8")
    ids, stop = files.ends(folder, config, tokens, "<|im_end|>" if conversation is None else conversation.stop)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}), "utf-8")
    out = _config(config, text, tower, kind, aspect, tokens.image) | {"conversation": name, "stop": stop}
    if grid is not None:
        out["image_grid_pinpoints"] = grid
    return Checkpoint(
        folder,
        _name(folder),
        out,
        tensors,
        fingerprint(out, tensors),
        layout="original",
        notes=(
            *notes,
            *_left_out(tensors),
            *tower.notes,
            f"image processor: {processor}, image_aspect_ratio {aspect}",
            f"conversation: {name}, {why}",
        ),
        made=made,
        conversation=Written(conversation, picture),
    )


def _left_out(tensors: Mapping[str, Stored]) -> list[str]:
    """A note on tensors that no part has a place for."""
    rest = sorted(name for name in tensors if not name.startswith(_PARTS))
    return (
        [f"{len(rest)} tensors of no part are left out: {', '.join(rest[:3])}{' …' * (len(rest) > 3)}"] if rest else []
    )


def _config(
    config: Mapping[str, Any], text: Mapping[str, Any], tower: Tower, kind: str, aspect: str, image: int
) -> dict[str, Any]:
    """config.json as LlavaConfig, LlavaNextConfig or LlavaOnevisionConfig has it."""
    vision, carried = dict(tower.config), int(tower.config.get("num_hidden_layers", tower.layers))
    shrunk = aspect.startswith("anyres_max_")  # what LLaVA-OneVision added
    out = {
        "model_type": "llava_onevision" if shrunk else "llava_next" if aspect == "anyres" else "llava",
        "text_config": dict(text),
        "vision_config": vision,
        "image_token_index": image,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "mm_projector_type": kind,
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        **translated.vision_part(config, vision["model_type"], carried, tower.layers),
    }
    return out | ({"vision_aspect_ratio": aspect} if shrunk else {})


def _conversation(
    folder: Path, config: Mapping[str, Any], text: Mapping[str, Any], kind: str, tokens: files.Tokens, sources: Sources
) -> tuple[str, str]:
    """Name of the conversation and why."""
    if sources.conversation is not None:
        known = conversations.named(sources.conversation)
        return conversations.OWN if known is None else known.name, "as --conversation says"
    given = config.get("_name_or_path")
    traces = conversations.Traces(
        names=(_name(folder), *([Path(given).name] if isinstance(given, str) and given else [])),
        model_type=str(config.get("model_type", "")),
        language=str(text["model_type"]),
        projector=kind,
        tokens=frozenset(token for token in conversations.TELLING if token in tokens.vocabulary),
        template=tokens.template is not None,
    )
    name, why = conversations.choose(traces)
    return name, f"since {why}; --conversation takes another"


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def _name(folder: Path) -> str:
    """The folder's name; of a training checkpoint with its parent's, of a hub download that of the model."""
    path = folder.resolve()
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rpartition("--")[2]
    return f"{path.parent.name}_{path.name}" if path.name.startswith("checkpoint-") else path.name
