"""Looked at before anything is written: is every weight finite, is there room on the disk, does the context fit."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vlm_export.table import size
from vlm_export.target import Progress, find_target, silent
from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError, InputError
from vlm_models.spec import VLMSpec
from vlm_quant.recipe import PARTS
from vlm_runtime.manifest import ITEM_BYTES, SCALE_BYTES
from vlm_runtime.tiling import most_rows

if TYPE_CHECKING:
    from vlm_models.model import Model
    from vlm_quant.recipe import Precision, Recipe

DEFAULT_CONTEXT = 4096
ROOM = 1024  # positions for question and answer beside the largest picture
_EMBEDDING = "language_model.embed_tokens.weight"
_BLOCK = 1 << 17  # numbers looked at in one go: they stay in the second-level cache
_ROWS = 1 << 25  # numbers after which the progress moves
_MARGIN = 1.02
_PREFIXES = {
    "vision_encoder": ("vision_tower",),
    "projector": ("multi_modal_projector",),
    "language_model": ("language_model", "lm_head"),
}
# Bit pattern of +infinity: every NaN and infinity has at least these bits below its sign.
_BITS = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}
_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}


def context_of(spec: VLMSpec, max_context: int | None) -> int:
    """How many positions to export: `max_context`, by default what the model was made for, up to 4096.

    Where a picture may take more than 3072 of them, the default grows with it.
    """
    limit = spec.language.max_positions
    context = min(limit, max(DEFAULT_CONTEXT, most_rows(spec) + ROOM)) if max_context is None else max_context
    if not 0 < context <= limit:
        raise InputError(f"max context {context} cannot be: this model takes 1 to {limit} positions")
    if context <= spec.prompt.image_tokens:
        raise InputError(
            f"max context {context} leaves no room for a question: "
            f"one picture takes {spec.prompt.image_tokens} positions"
        )
    return context


def finite(checkpoint: Checkpoint, progress: Progress = silent) -> None:
    """Raise CheckpointError naming the first tensor that holds NaN or infinity. Reads every weight once."""
    names = checkpoint.names()
    total = sum(math.prod(checkpoint.shape(name)) for name in names)
    done = 0

    def check(name: str) -> bool:
        nonlocal done
        dtype, (rows, *rest) = checkpoint.dtype(name), checkpoint.shape(name)
        step = max(1, _ROWS // max(1, math.prod(rest)))
        for start in range(0, rows, step):  # few at a time: those of an adapter are computed
            block = checkpoint.rows(name, start, start + step).reshape(-1)
            if not _finite(block.view(_BITS[dtype]), _INFINITY[dtype]):
                return False
            done += len(block)
            progress("weights", min(done, total), total)
        checkpoint.release(name)
        return True

    with ThreadPoolExecutor(2) as pool:
        bad = [name for name, ok in zip(names, pool.map(check, names), strict=True) if not ok]
    if bad:
        more = f" (and {len(bad) - 1} more tensors)" if len(bad) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {bad[0]!r} holds NaN or infinity{more}; train or save it again"
        )
    progress("weights", total, total)


def _finite(bits: npt.NDArray[Any], infinity: int) -> bool:
    """As signed numbers the positive NaNs come last, as unsigned numbers the negative ones."""
    sign = 1 << (8 * bits.itemsize - 1)
    signed = bits.view(f"i{bits.itemsize}")
    for start in range(0, len(bits), _BLOCK):
        stop = start + _BLOCK
        if signed[start:stop].max() >= infinity or bits[start:stop].max() >= (sign | infinity):
            return False
    return True


def disk(output: Path, needed: int) -> None:
    """Raise InputError when the disk of `output` has fewer bytes free than an export needs."""
    place = next(p for p in output.absolute().parents if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(f"the export needs {size(needed)} in {place}, which has {size(free)} free; choose another -o")


def bytes_needed(model: Model, recipe: Recipe, steps: Mapping[str, Collection[str]], shared: bool) -> int:
    """Bytes that an export will write: the parts that each target builds, and the shared files unless `shared`."""
    checkpoint, language = model.checkpoint, model.spec.language
    parts = sum(find_target(name).bytes_needed(model, recipe, built) for name, built in steps.items())
    stored = checkpoint.dtype(_EMBEDDING) if recipe.embedding is None else "I8"
    table = language.vocab_size * (language.hidden_size * ITEM_BYTES[stored] + SCALE_BYTES)
    return math.ceil(_MARGIN * (parts + (0 if shared else table + _golden_bytes(model.spec))))


def weights(model: Model, part: str, *, embedding: bool = False) -> int:
    """How many numbers a part has; the embedding table counts where it gives the logits too, or with `embedding`."""
    return sum(_sizes(model, part, embedding).values())


def tensors_of(model: Model, part: str) -> list[str]:
    """The names of a part's tensors, embedding table included."""
    return [name for name in model.checkpoint.names() if name.split(".", 1)[0] in _PREFIXES[part]]


def weight_bytes(
    model: Model, part: str, recipe: Recipe, per_weight: Callable[[Precision], float], *, embedding: bool = False
) -> float:
    """Bytes of a part whose layers have their own precisions, of which `per_weight` says what one weight takes."""
    precision: Precision = getattr(recipe, PARTS[part])
    return sum(size * per_weight(precision.at(layer)) for layer, size in _sizes(model, part, embedding).items())


def _sizes(model: Model, part: str, embedding: bool) -> dict[str, int]:
    """Numbers of each tensor, by the name of its layer; the head's is "lm_head" where it is the embedding table too."""
    checkpoint, tied = model.checkpoint, model.spec.language.tied
    sizes = {}
    for name in checkpoint.names():
        if name.split(".", 1)[0] in _PREFIXES[part] and (embedding or tied or name != _EMBEDDING):
            sizes["lm_head" if tied and name == _EMBEDDING else name] = math.prod(checkpoint.shape(name))
    return sizes


def _golden_bytes(spec: VLMSpec) -> int:
    tiles = most_rows(spec) // spec.tile_tokens + 1
    rows, width = spec.vision.image_tokens, spec.vision.feature_size + 3 * spec.language.hidden_size
    numbers = tiles * (3 * spec.vision.image_size**2 + rows * width)
    return 4 * (numbers + spec.language.vocab_size) + (1 << 20)
