"""Pictures into the prompt: the rows of the projector take the places of the image tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlm_models.errors import BundleError, PromptError
from vlm_runtime.embedding import EmbeddingTable


def splice(ids: Sequence[int], rows: Sequence[NDArray[np.float32]], table: EmbeddingTable) -> NDArray[np.float32]:
    """Embeddings (S, H) of expanded `ids` (S): image tokens become the picture `rows` (T, H) in order, exactly.

    Raises PromptError when there are not as many image tokens as rows, BundleError for rows that are not H wide.
    """
    index = np.asarray(ids, dtype=np.int64).reshape(-1)
    image = index == table.image_token_id
    places, given = int(np.count_nonzero(image)), sum(len(r) for r in rows)
    if places != given:
        raise PromptError(
            f"the prompt has {places} image tokens, but {len(rows)} pictures give {given} rows: "
            "write the image token once for each picture"
        )
    for picture in rows:
        if picture.ndim != 2 or picture.shape[1] != table.columns:
            raise BundleError(
                f"the projector gave rows of shape {picture.shape}, the language model takes (T, {table.columns}): "
                "the parts are not of the same model; export again"
            )
    out = np.empty((index.size, table.columns), np.float32)
    out[~image] = table.rows(index[~image])
    if places:
        out[image] = np.concatenate(rows, axis=0)
    return out
