"""What a projector computes, from its definition on the tensors as stored: no module that is exported takes part.

The definitions are those of the sources that `vlm_models.projectors` names. Rows of a picture are (N, h, w, C) here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_models.family import family_of
from vlm_models.torch_language import as_float32
from vlm_models.vlm_config import read_config

if TYPE_CHECKING:
    from vlm_models.checkpoint import Checkpoint
    from vlm_models.model import Model

_PREFIX = "multi_modal_projector."
_POOLED = 12


def projected(model: Model, features: Tensor) -> Tensor:
    """image_features (N, T, F) → image_embeds (N, T', H): by transformers' module if there is one, or written out."""
    checkpoint, kind = model.checkpoint, model.spec.projector.kind
    if hasattr(family_of(checkpoint), "projector"):
        own: Tensor = model.projector()(features)
        return own
    if kind == "mlp":
        return _by_transformers(checkpoint, features)
    tensors = {
        name.removeprefix(_PREFIX): as_float32(checkpoint, name)
        for name in checkpoint.names()
        if name.startswith(_PREFIX)
    }
    if kind == "ldpnet":
        return _ldp(features, tensors)
    if kind == "ldpnetv2":
        return _ldp_v2(features, tensors)
    return _layers(features, tensors)


def _by_transformers(checkpoint: Checkpoint, features: Tensor) -> Tensor:
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    with torch.device("meta"):
        module: Any = LlavaMultiModalProjector(read_config(checkpoint))
    state = {name: as_float32(checkpoint, _PREFIX + name) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    rows: Tensor = module(features)
    return rows


def _layers(x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """Layers in the order of their numbers: matrices, a GELU before all but the first, and LayerNorms (vectors)."""
    seen = 0
    for prefix in sorted({name.rpartition(".")[0] for name in tensors}, key=lambda p: int(p) if p.isdigit() else 0):
        weight, bias = tensors[f"{prefix}.weight"], tensors[f"{prefix}.bias"]
        if weight.dim() == 1:
            x = _norm(x, weight, bias)
            continue
        x = _linear(_gelu(x) if seen else x, weight, bias)
        seen += 1
    return x


def _ldp(x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """MobileVLM's LDP; its second block keeps every second row and column."""
    for i in (1, 3):
        x = x if i == 1 else _gelu(x)
        x = _linear(x, tensors[f"model.mlp.{i}.weight"], tensors[f"model.mlp.{i}.bias"])
    x = _picture(x)
    for i, step in ((1, 1), (2, 2)):
        at = f"model.mb_block.{i}.block"
        y = _depthwise(x, tensors[f"{at}.0.0.weight"])[:, ::step, ::step]
        y = _norm(y, tensors[f"{at}.0.1.weight"], tensors[f"{at}.0.1.bias"])
        y = y * ((y + 3).clamp(0, 6) / 6)
        means = y.flatten(1, 2).mean(1)
        narrow = _linear(means, tensors[f"{at}.1.fc1.weight"].flatten(1), tensors[f"{at}.1.fc1.bias"]).clamp(min=0)
        share = _linear(narrow, tensors[f"{at}.1.fc2.weight"].flatten(1), tensors[f"{at}.1.fc2.bias"])
        y = y * ((share + 3).clamp(0, 6) / 6)[:, None, None]
        y = y @ tensors[f"{at}.2.0.weight"].flatten(1).T
        y = _norm(y, tensors[f"{at}.2.1.weight"], tensors[f"{at}.2.1.bias"])
        x = x + y if step == 1 else y
    return x.flatten(1, 2)


def _ldp_v2(x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """MobileVLM's LDPv2."""
    for i in (0, 2):
        x = _gelu(x) if i else x
        x = _linear(x, tensors[f"mlp.mlp.{i}.weight"], tensors[f"mlp.mlp.{i}.bias"])
    picture = _picture(x)
    n, side, _, width = picture.shape
    block = side // _POOLED
    pooled = picture.reshape(n, _POOLED, block, _POOLED, block, width).mean((2, 4))
    placed = _depthwise(pooled, tensors["peg.peg.0.weight"]) + tensors["peg.peg.0.bias"]
    return (pooled + placed).flatten(1, 2)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.T + bias


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def _picture(rows: Tensor) -> Tensor:
    side = math.isqrt(rows.shape[1])
    return rows.reshape(rows.shape[0], side, side, rows.shape[2])


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Each channel with its own 3 × 3 weights (C, 1, 3, 3) over the zero-padded picture."""
    n, height, width, channels = x.shape
    padded = x.new_zeros(n, height + 2, width + 2, channels)
    padded[:, 1:-1, 1:-1] = x
    return torch.stack(
        [padded[:, i : i + height, j : j + width] * weight[:, 0, i, j] for i in range(3) for j in range(3)]
    ).sum(0)
