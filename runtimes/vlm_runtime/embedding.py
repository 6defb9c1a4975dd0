"""The embedding table of a bundle: a raw file, mapped into memory, from which rows are looked up as float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_models.errors import BundleError, PromptError
from vlm_runtime.bundle import Bundle

_STORED: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
}


class EmbeddingTable:
    """V rows of H numbers; only the pages of rows that are looked up are read from the disk.

    Rows come out in float32, integers times their row's scale, and multiplied by the language model's
    `embed_multiplier` in float32 as transformers does.
    `image_token_id` is the id whose rows are pictures and are spliced in.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Map the table of `bundle`. Raises BundleError when the file does not hold rows × columns numbers."""
        table = bundle.manifest.embedding
        flat = _mapped(bundle, table.file, table.dtype)
        if flat.size != table.rows * table.columns:
            path = bundle.path(table.file)
            raise BundleError(f"{path} does not hold {table.rows} × {table.columns} numbers of {table.dtype}")
        self._scales = None if table.scales is None else _mapped(bundle, table.scales, "F32")
        if self._scales is not None and self._scales.size != table.rows:
            raise BundleError(f"{bundle.path(str(table.scales))} does not hold {table.rows} scales")
        self.rows_count, self.columns = table.rows, table.columns
        self.image_token_id = bundle.spec.prompt.image_token_id
        self._table = flat.reshape(table.rows, table.columns)
        self._bf16 = table.dtype == "BF16"
        multiplier = np.float32(bundle.spec.language.embed_multiplier)
        self._multiplier = None if multiplier == 1 else multiplier

    def rows(self, ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.float32]:
        """The rows of `ids` as (n, H) float32. Raises PromptError for an id outside the table."""
        index = np.asarray(ids, dtype=np.int64).reshape(-1)
        outside = index[(index < 0) | (index >= self.rows_count)]
        if outside.size:
            raise self._outside(int(outside[0]))
        stored = self._table[index]
        if self._bf16:
            out = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            out = stored.astype(np.float32, copy=False)
            if self._scales is not None:
                out *= self._scales[index, None]
        if self._multiplier is not None:
            out *= self._multiplier
        return out

    def row_into(self, token_id: int, out: NDArray[np.float32]) -> None:
        """Write the row of one id into `out` (H,), float32 and contiguous: the token loop, without allocation."""
        if not 0 <= token_id < self.rows_count:
            raise self._outside(token_id)
        if self._bf16:
            bits = out.view(np.uint32)
            bits[...] = self._table[token_id]
            np.left_shift(bits, 16, out=bits)
        elif self._scales is not None:
            np.multiply(self._table[token_id], self._scales[token_id], out=out)
        else:
            out[...] = self._table[token_id]
        if self._multiplier is not None:
            np.multiply(out, self._multiplier, out=out)

    def _outside(self, token_id: int) -> PromptError:
        return PromptError(
            f"token id {token_id} is outside the embedding table of {self.rows_count} rows: "
            "tokenizer and language model do not belong together"
        )


def _mapped(bundle: Bundle, file: str, dtype: str) -> NDArray[Any]:
    path = bundle.path(file)
    try:
        return np.asarray(np.memmap(path, dtype=_STORED[dtype], mode="r"))
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot map {path}: {error}") from None
