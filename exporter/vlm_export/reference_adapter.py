"""The adapter of a LoRA folder read once more, for the reference alone: by torch's and safetensors' own readers, names
by their ends, merged in float64. So a layer that was missed, mixed up or scaled wrongly on the way to a bundle shows.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_export.reference_internvl import as_saved
from vlm_models.checkpoint import Array, Checkpoint
from vlm_models.model import Model

_LANGUAGE = re.compile(r".*?((?:layers\.\d+\..+|embed_tokens|norm))$")
_TOWER = re.compile(r".*vision_(?:tower|model)\.(.+)$")
_PROJECTOR = re.compile(r".*(?:mm_projector|multi_modal_projector)(?:\.(.+))?$")


@dataclass(frozen=True)
class Adapted(Checkpoint):
    """A checkpoint whose adapted tensors are `pairs` (A, B, scale) on the base's, or `whole` ones instead of them."""

    pairs: Mapping[str, tuple[Tensor, Tensor, float]] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)

    def dtype(self, name: str) -> str:
        """F32 for whatever is computed or read here."""
        return "F32" if name in self.pairs or name in self.whole else super().dtype(name)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows start:stop."""
        if name in self.whole and name not in self.pairs:
            kept: Array = self.whole[name][start:stop].float().numpy()
            return kept
        if name not in self.pairs:
            return super().rows(name, start, stop)
        down, up, scale = self.pairs[name]
        base = self.whole[name].double().numpy() if name in self.whole else self.tensors[name].array
        weight = torch.from_numpy(base[start:stop].astype(np.float64))
        change = torch.einsum("or,ri->oi", up[start:stop].double().flatten(1), down.double().flatten(1))
        merged: Array = (weight + scale * change.reshape(weight.shape)).float().numpy()
        return merged


def as_trained(model: Model) -> Model:
    """The model with its adapter, or the names of an original layout, read anew; else the model itself."""
    checkpoint = model.checkpoint
    if checkpoint.layout == "internvl_chat":
        return as_saved(model)
    if checkpoint.layout != "lora":
        return model
    folder = checkpoint.folder
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    modules: dict[str, str] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in _read(folder).items():
        if "lora_" not in name:
            whole[_weight(re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", name))] = tensor
            continue
        module, _, rest = name.partition(".lora_")
        where = _weight(module + ".weight")
        turned = rest.startswith("embedding")
        side = downs if rest.removeprefix("embedding_")[0] == ("B" if turned else "A") else ups
        side[where], modules[where] = tensor.T if turned else tensor, module
    pairs = {name: (downs[name], ups[name], _scale(config, modules[name], ups[name])) for name in modules}
    values = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}
    return Model(Adapted(**values, pairs=pairs, whole=whole), model.spec)


def _read(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    main = folder / "adapter_model.safetensors"
    found = load_file(main) if main.is_file() else torch.load(folder / "adapter_model.bin", weights_only=True)
    for name in ("non_lora_trainables.bin", "mm_projector.bin"):
        if (folder / name).is_file():
            return {**found, **torch.load(folder / name, weights_only=True)}
    return dict(found)


def _weight(name: str) -> str:
    """What the checkpoint calls a trained tensor."""
    module, _, kind = name.rpartition(".")
    if match := _PROJECTOR.match(module):
        return f"multi_modal_projector.{match[1] or 'linear'}.{kind}"
    if name.endswith("image_newline"):
        return "image_newline"
    if match := _TOWER.match(module):
        return f"vision_tower.{match[1]}.{kind}" if kind else ""
    if module.endswith("lm_head"):
        return f"lm_head.{kind}"
    match = _LANGUAGE.match(module)
    return f"language_model.{match[1]}.{kind}" if match else name


def _scale(config: Mapping[str, Any], module: str, up: Tensor) -> float:
    """lora_alpha over the rank that the matrices have, or over its root."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.search(rf"(?:^|\.)(?:{pattern})$", module):
            alpha = value
            break
    rank = up.shape[1]
    return float(alpha / rank**0.5) if config.get("use_rslora") else float(alpha / rank)
