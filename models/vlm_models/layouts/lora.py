"""A LoRA adapter's folder: the base model with what the adapter adds, merged in float32 whenever rows are read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_models.adapter import Adapter, read_adapter
from vlm_models.checkpoint import (
    ADAPTER,
    Checkpoint,
    LowRank,
    Sources,
    Stored,
    fingerprint,
    local_folder,
    read_json,
)
from vlm_models.errors import CheckpointError
from vlm_models.layouts import huggingface, original
from vlm_models.made import MadeFolder
from vlm_models.original import names

_HEAD, _TABLE = "lm_head.weight", "language_model.embed_tokens.weight"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


def matches(folder: Path, config: Mapping[str, Any]) -> bool:
    """adapter_config.json is there, with a config.json or without."""
    return (folder / ADAPTER).is_file()


def open_folder(folder: Path, config: Mapping[str, Any], sources: Sources) -> Checkpoint:
    """The base model of --base, or the one that the adapter names, with the adapter on it.

    `config`, which training of LLaVA's original code saves, counts before the base model's, which may be a language
    model alone. Raises CheckpointError where the base is not to be had, and for whatever of the adapter has no place.
    """
    if names.has_weights(folder):
        raise CheckpointError(f"{folder} holds a whole model and an adapter ({ADAPTER}), two layouts mixed: remove one")
    adapter = read_adapter(folder)
    base = _base(folder, adapter, sources)
    own = read_json(base / "config.json", "is no base model")
    asked, at = (config, folder) if config else (own, base)
    inner = Sources(vision_tower=sources.vision_tower, conversation=sources.conversation)
    if original.matches(base, asked):
        whole = names.canonical(folder, adapter.whole.items())
        low_rank = names.canonical(folder, _weights(adapter))
        kind = str(asked.get("mm_projector_type") or "linear")
        tensors = {**names.model_tensors(base), **whole}
        opened = original.build(at, asked, tensors, inner, tokenizer=base)
        whole, low_rank = names.like_transformers(kind, whole), names.like_transformers(kind, low_rank)
    else:
        from vlm_models.layout import find_layout  # this is one of those that it finds

        opened = find_layout(base, asked).open_folder(base, asked, inner)
        whole = huggingface.canonical(folder, adapter.whole.items())
        low_rank = huggingface.canonical(folder, _weights(adapter))
        opened = replace(opened, made=_files(folder, opened))
    merged = _merged(folder, base, {**opened.tensors, **whole}, low_rank)
    on_tower = sum(name.startswith("vision_tower.") for name in low_rank)
    notes = (
        f"LoRA on {len(low_rank)} matrices, {on_tower} of them of the vision tower, merged into {base}",
        *([f"{len(whole)} tensors that were trained whole replace those of the base model"] if whole else []),
    )
    return replace(
        opened,
        folder=folder,
        name=folder.resolve().name,
        tensors=merged,
        fingerprint=fingerprint(opened.config, merged),
        layout="lora",
        notes=(*notes, *opened.notes),
        adapted=frozenset((*low_rank, *whole)),
    )


def _base(folder: Path, adapter: Adapter, sources: Sources) -> Path:
    """The folder of the base model."""
    if sources.base is not None:
        base = local_folder(sources.base)
    elif adapter.base is None:
        raise CheckpointError(
            f"{folder / ADAPTER} does not say on which base model it was trained: give it with --base"
        )
    else:
        near = folder / adapter.base
        try:
            base = near if near.is_dir() else local_folder(adapter.base)
        except CheckpointError as error:
            raise CheckpointError(
                f"{folder}: the adapter's base model {adapter.base!r} is neither a folder nor to be had from the hub: "
                "give it with --base"
            ) from error
    if (base / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder}: its base model {base} is an adapter too: merge that one first, or give --base"
        )
    return base


def _weights(adapter: Adapter) -> list[tuple[str, Stored]]:
    """What is added, by the names of the weights that it is added to."""
    return [(f"{name}.weight", Stored("F32", one.up, low_rank=one)) for name, one in adapter.low_rank.items()]


def _merged(folder: Path, base: Path, tensors: dict[str, Stored], low_rank: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors with their adapters. A head that was the embedding table is one of its own once one of both changes:

    PEFT adds to the one layer that it adapts, not to the other.
    """
    if _HEAD not in tensors and {_HEAD, _TABLE} & set(low_rank) and _TABLE in tensors:
        tensors[_HEAD] = tensors[_TABLE]
    for name, added in low_rank.items():
        if name not in tensors:
            raise CheckpointError(
                f"{folder}: the adapter changes {name!r}, which its base {base} does not have: it would be dropped"
            )
        assert added.low_rank is not None
        _check_shape(folder, name, tensors[name], added.low_rank)
        tensors[name] = replace(tensors[name], dtype="F32", grid=None, low_rank=added.low_rank)
    return tensors


def _check_shape(folder: Path, name: str, stored: Stored, added: LowRank) -> None:
    rows, columns = stored.array.shape[0], stored.array.size // max(1, stored.array.shape[0])
    if (found := (added.up.shape[0], added.down.shape[1])) != (rows, columns):
        raise CheckpointError(
            f"{folder}: the adapter of {name!r} is for a matrix of {found[0]} × {found[1]}, "
            f"the base model's is {rows} × {columns}: it was trained on another base model"
        )


def _files(folder: Path, opened: Checkpoint) -> MadeFolder:
    """Processor, tokenizer and template of the base model; those that lie beside the adapter count before them."""
    made = MadeFolder()
    has_own = any((folder / name).is_file() for name in _TOKENIZERS)
    for source in (opened.files, folder):
        for path in (path for pattern in _FILES for path in source.glob(pattern)):
            tokens = path.name.startswith(("token", "vocab", "merges", "special_tokens", "added_tokens"))
            if path.name.endswith(".index.json") or (source == opened.files and has_own and tokens):
                continue
            shutil.copyfile(path, Path(made.name) / path.name)
    return made
