"""The vision tower of an original checkpoint: its own where it carries one, else the one that config.json names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_models.checkpoint import Sources, Stored, local_folder, read_json
from vlm_models.errors import CheckpointError
from vlm_models.original.names import TOWER
from vlm_models.weights import read_weights

_PARTS = re.compile(
    r"^(?:vision_tower\.|model\.)*(?:vision_model\.)?((?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\..+)$"
)
_KINDS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
_PATCHES = f"{TOWER}embeddings.patch_embedding.weight"
_PLACES = f"{TOWER}embeddings.position_embedding.weight"
# Width → heads and layers, of the released CLIP (Radford et al. 2021, OpenCLIP) and SigLIP (Zhai et al. 2023) towers.
_KNOWN: Mapping[str, Mapping[int, tuple[int, int]]] = {
    "clip_vision_model": {768: (12, 12), 1024: (16, 24), 1280: (16, 32), 1664: (16, 48)},
    "siglip_vision_model": {768: (12, 12), 1024: (16, 24), 1152: (16, 27)},
}
_EDGES = {("siglip_vision_model", 14, 27): 384}  # an image of 384 pixels has 27 patches of 14, and 6 pixels over


@dataclass(frozen=True)
class Tower:
    """`config` is that of the tower's transformers class, with as many layers as `tensors` hold; `layers` in full.

    `folder` is where its image processor may be, where it was found; `notes` say what was taken.
    """

    config: dict[str, Any]
    tensors: Mapping[str, Stored]
    layers: int
    folder: Path | None
    notes: tuple[str, ...]


def find_tower(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Stored], sources: Sources) -> Tower:
    """The tower among `tensors` (canonical), else that of --vision-tower, else the named one.

    Raises CheckpointError where there is none, naming what was looked for, or where it is neither CLIP nor SigLIP.
    """
    named = str(config.get("mm_vision_tower") or config.get("vision_tower") or "")
    own = {name: stored for name, stored in tensors.items() if name.startswith(TOWER)}
    if own:
        return _carried(folder, named, own, sources)
    place = named if sources.vision_tower is None else str(sources.vision_tower)
    if not place:
        raise CheckpointError(
            f"{folder} holds no vision tower and config.json names none (mm_vision_tower): give one with --vision-tower"
        )
    found = _open(folder, place, sources)
    if not (raw := _config(found)):
        raise CheckpointError(f"{found} has no config.json: give the vision tower's folder with --vision-tower")
    weights = _part(read_weights(found))
    if not weights:
        raise CheckpointError(f"{found} holds no CLIP or SigLIP vision tower; give one with --vision-tower")
    out = _vision_config(found, raw)
    asked = "named by config.json" if sources.vision_tower is None else "given by --vision-tower"
    return Tower(out, weights, _depth(weights), found, (f"vision tower: {found}, {asked}; the checkpoint has none",))


def _carried(folder: Path, named: str, own: Mapping[str, Stored], sources: Sources) -> Tower:
    """Weights of the checkpoint; the config of the tower they were, else what their shapes say."""
    place = named if sources.vision_tower is None else str(sources.vision_tower)
    depth, found = _depth(own), _near(folder, place) or _from_hub(place)
    raw = _config(found) if found is not None else {}
    if raw and found is not None:
        config = _vision_config(found, raw)
        full = max(int(config.get("num_hidden_layers", depth)), depth)
        source = f"its config is that of {place}"
    else:
        config, full = _by_shapes(folder, place, own, depth)
        source = f"its config is read from its shapes, since {place or 'no tower'} is not at hand"
    note = f"vision tower: the checkpoint's own, of {depth} layers; {source}"
    return Tower({**config, "num_hidden_layers": depth}, own, full, found, (note,))


def _depth(tensors: Iterable[str]) -> int:
    numbers = [int(m[1]) for name in tensors if (m := re.match(rf"{re.escape(TOWER)}encoder\.layers\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _part(tensors: Iterable[tuple[str, Stored]]) -> dict[str, Stored]:
    """The vision part of a CLIP or SigLIP folder, whose text part is left out."""
    return {TOWER + m[1]: stored for name, stored in tensors if (m := _PARTS.match(name))}


def _near(folder: Path, place: str) -> Path | None:
    """A local folder: as the path says, or beside or in the checkpoint."""
    if not place:
        return None
    given = Path(place).expanduser()
    tried = [given] if given.is_absolute() else [folder / given, folder.parent / given, folder / given.name, given]
    return next((path for path in tried if path.is_dir()), None)


def _open(folder: Path, place: str, sources: Sources) -> Path:
    if (found := _near(folder, place)) is not None:
        return found
    try:
        return local_folder(place)
    except CheckpointError as error:
        if sources.vision_tower is not None:
            raise
        raise CheckpointError(
            f"{folder} holds no vision tower, and the one that config.json names, {place!r}, is neither a folder nor "
            "to be had from the hub: give it with --vision-tower"
        ) from error


def _from_hub(place: str) -> Path | None:
    """Config and processor of a tower on the hub, without its weights; None where they are not to be had."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place):
        return None
    import huggingface_hub

    try:
        got = huggingface_hub.snapshot_download(place, allow_patterns=["config.json", "preprocessor_config.json"])
    except (OSError, ValueError):  # no network, no such repository: HfHubHTTPError and its kin are OSErrors
        return None
    return Path(got) if (Path(got) / "config.json").is_file() else None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_json(path, "") if path.is_file() else {}


def _vision_config(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The vision part of a tower's config.json, whole CLIP and SigLIP models' included."""
    name = str(raw.get("model_type", ""))
    kind = _KINDS.get(name, name)
    if kind not in _KNOWN:
        allowed = ", ".join(sorted([*_KINDS, *_KNOWN]))
        raise CheckpointError(f"{folder}: a vision tower of model_type {name!r} is not supported; {allowed} are")
    part = raw.get("vision_config", raw.get("vision_config_dict")) if name in _KINDS else raw
    if not isinstance(part, dict):
        raise CheckpointError(f"{folder / 'config.json'} has no vision_config")
    drop = ("architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path")
    return {**{key: value for key, value in part.items() if key not in drop}, "model_type": kind}


def _by_shapes(folder: Path, place: str, own: Mapping[str, Stored], depth: int) -> tuple[dict[str, Any], int]:
    """Config and full depth of a released tower from the shapes of its tensors."""
    kind = "clip_vision_model" if f"{TOWER}embeddings.class_embedding" in own else "siglip_vision_model"
    ask = f"{place or 'none'!r} cannot be read: give a folder with its config.json with --vision-tower"
    needed = (_PATCHES, _PLACES, f"{TOWER}encoder.layers.0.mlp.fc1.weight")
    if missing := [name for name in needed if name not in own]:
        raise CheckpointError(f"{folder}: the vision tower has no {missing[0]!r}, and the one it is named after, {ask}")
    patches, places, fc1 = (own[name].array.shape for name in needed)
    width, patch, side = patches[0], patches[-1], round((places[0] - (kind == "clip_vision_model")) ** 0.5)
    if width not in _KNOWN[kind]:
        known = ", ".join(map(str, _KNOWN[kind]))
        raise CheckpointError(
            f"{folder}: a {kind} of width {width} is none of the known ({known}), and the one it is named after, {ask}"
        )
    heads, full = _KNOWN[kind][width]
    if kind == "siglip_vision_model":
        activation, eps = "gelu_pytorch_tanh", 1e-6
    else:  # only OpenAI's own CLIPs have the quick GELU, and none of them is wider than L
        others = re.search("laion|open_?clip|dfn|datacomp|eva|metaclip", place.lower())
        activation, eps = "gelu" if others or width > 1024 else "quick_gelu", 1e-5
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": fc1[0],
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": _EDGES.get((kind, patch, side), patch * side),
        "patch_size": patch,
        "hidden_act": activation,
        "layer_norm_eps": eps,
    }, full
