"""The three parts of a model as Core AI assets (`.aimodel`): iOS and macOS 27, and Apple's CPU runtime on Linux."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vlm_export.coreai.decoder import CoreAILanguage
from vlm_export.coreai.sdk import Form, write_asset
from vlm_export.target import Progress, silent
from vlm_models.errors import CheckpointError
from vlm_models.model import Model
from vlm_quant.recipe import Precision

EncoderPart = Literal["vision_encoder", "projector"]

PART = "language_model"
LANGUAGE = Form(
    ("inputs_embeds", "position_ids"),
    ("logits",),
    ("k_cache", "v_cache"),
    {"inputs_embeds": 1, "position_ids": 1},
)
NAMES: dict[EncoderPart, tuple[str, str]] = {
    "vision_encoder": ("pixel_values", "image_features"),
    "projector": ("image_features", "image_embeds"),
}
_FP16_MAX = torch.finfo(torch.float16).max


def convert_language(
    model: Model, precision: Precision, path: Path, *, max_context: int, progress: Progress = silent
) -> dict[str, Any]:
    """Write the asset `path` (language_model.aimodel, a folder), and return what is in it.

    inputs_embeds (1, S, H), position_ids int32 (1, end) = 0 … end-1 → logits (1, 1, V) of the last row, S and end of
    any size up to C = `max_context`; states k_cache and v_cache (layers, 1, kv_heads, C, head_dim). All floats are
    float32 at fp32 and float16 otherwise. Raises CheckpointError for a context of less than 3 positions, for weights
    beyond float16, for what has no Core AI form.
    """
    if max_context < 3:  # torch.export takes sizes of 1 for fixed and needs two that differ
        raise CheckpointError(f"target 'coreai' needs a context of 3 positions or more, got {max_context}")
    spec, dtype = model.spec.language, _dtype(precision)
    steps = 2 * spec.layers  # loading takes about half, exporting the rest
    decoder = CoreAILanguage(
        model.checkpoint, spec, dtype, max_context, lambda layer: progress(PART, layer, steps)
    ).eval()
    embeds = torch.zeros(1, 2, spec.hidden_size, dtype=dtype)
    positions = torch.arange(3, dtype=torch.int32)[None]
    cache = torch.zeros(spec.layers, 1, spec.kv_heads, max_context, spec.head_dim, dtype=dtype)
    write_asset(decoder, (embeds, positions, cache, cache.clone()), LANGUAGE, path, _marks(model, PART))
    progress(PART, 1, 1)
    return {"cache": "fp32" if dtype is torch.float32 else "fp16", "max_context": max_context}


def convert_encoder(
    model: Model, part: EncoderPart, precision: Precision, path: Path, *, progress: Progress = silent
) -> dict[str, Any]:
    """Write `part` as the asset `path` (a folder), one picture a call, and return what is in it.

    vision_encoder: pixel_values (1, 3, s, s) → image_features (1, T, F); projector: image_features → image_embeds
    (1, T, H); float32 at fp32, float16 otherwise, in and out. Raises CheckpointError for weights beyond float16 and
    for a tower that has no Core AI form.
    """
    progress(part, 0, 1)
    vision, dtype = model.spec.vision, _dtype(precision)
    if part == "vision_encoder":
        module: nn.Module = model.vision_encoder()
        shape: tuple[int, ...] = (1, 3, vision.image_size, vision.image_size)
    else:
        module, shape = model.projector(), (1, vision.image_tokens, model.spec.projector.in_features)
    if dtype is torch.float16:
        _check_fp16(module, part)
    # A copy: the model's own stays float32, and torch.export takes no weights that were loaded in inference mode.
    module = copy.deepcopy(module).to(dtype).requires_grad_(False)
    source, result = NAMES[part]
    example = torch.zeros(shape, dtype=dtype)
    write_asset(module, (example,), Form((source,), (result,)), path, _marks(model, part))
    progress(part, 1, 1)
    return {}


def _dtype(precision: Precision) -> torch.dtype:
    return torch.float32 if precision.weights == "fp32" else torch.float16


def _marks(model: Model, part: str) -> dict[str, str]:
    return {"vlm.fingerprint": model.spec.fingerprint, "vlm.part": part}


@torch.no_grad()
def _check_fp16(module: nn.Module, part: str) -> None:
    for name, tensor in module.named_parameters():
        if tensor.abs().max() > _FP16_MAX:
            raise CheckpointError(f"{part} weight {name!r} is beyond float16's {_FP16_MAX:g}: export it at fp32")
