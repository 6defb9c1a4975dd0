"""What all targets of a bundle share: the embedding table, the tokenizer, the row that ends a line of patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np

from vlm_export.target import Progress
from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.processor import tokenizer_json
from vlm_models.spec import VLMSpec
from vlm_quant.affine import quantize_int8
from vlm_runtime.manifest import Table

EMBEDDING = "embedding.bin"
SCALES = "embedding.scales.bin"
NEWLINE = "image_newline.bin"
TOKENIZER = "tokenizer.json"
_TENSOR = "language_model.embed_tokens.weight"
_BLOCK = 64 << 20  # bytes written at a time


def write_embedding(
    checkpoint: Checkpoint, spec: VLMSpec, folder: Path, progress: Progress, *, int8: bool = False
) -> Table:
    """embedding.bin: the table's rows as they are in the checkpoint, in its own dtype, little-endian, no header.

    With `int8` each row is rounded to integers by its largest magnitude, and embedding.scales.bin has the rows' scales.
    """
    rows, columns = spec.language.vocab_size, spec.language.hidden_size
    step, scales = max(1, _BLOCK // (columns * 4)), np.empty(rows, "<f4")
    with (folder / EMBEDDING).open("wb") as file:
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            block = np.ascontiguousarray(checkpoint.rows(_TENSOR, start, stop))
            if int8:
                quantized = quantize_int8(block)
                block, scales[start:stop] = quantized.values, quantized.scales
            file.write(block.view(np.uint8).data)
            progress("embedding", stop, rows)
    checkpoint.release(_TENSOR)
    if not int8:
        return Table(EMBEDDING, cast(Any, checkpoint.dtype(_TENSOR)), rows, columns)
    (folder / SCALES).write_bytes(scales.tobytes())
    return Table(EMBEDDING, "I8", rows, columns, SCALES)


def write_newline(checkpoint: Checkpoint, spec: VLMSpec, folder: Path) -> str | None:
    """image_newline.bin: the row (H,) that ends a line of patches, float32; None for a model that has none.

    Raises CheckpointError where the checkpoint lacks it, or has another width.
    """
    if spec.tiling is None or not spec.tiling.newline:
        return None
    row = np.ascontiguousarray(checkpoint.rows("image_newline"), "<f4")
    if row.shape != (spec.language.hidden_size,):
        raise CheckpointError(
            f"{checkpoint.folder}: image_newline has shape {row.shape}, the language model takes rows of "
            f"{spec.language.hidden_size}"
        )
    (folder / NEWLINE).write_bytes(row.tobytes())
    return NEWLINE


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> str:
    """tokenizer.json: the checkpoint's own, or as transformers converts it where it has only an older form."""
    (folder / TOKENIZER).write_text(tokenizer_json(checkpoint), "utf-8", newline="\n")
    return TOKENIZER
