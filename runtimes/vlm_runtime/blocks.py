"""Rows of a prompt that see one another both ways: those of a picture (Gemma 3), or the whole prompt (PaliGemma)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import numpy as np

from vlm_models.errors import BundleError
from vlm_models.spec import VLMSpec
from vlm_runtime.engine import Decoder, Floats

Blocks = Sequence[tuple[int, int]]
"""(start, stop) of rows that see one another, in order; all other rows see what is before them."""


class BlockDecoder(Protocol):
    """A Decoder that can show a block to itself."""

    def prefill_block(self, embeds: Floats) -> Floats:
        """Append rows (S, H) which see each other and all before them; the logits (V,) after the last one."""


def blocks_of(ids: Sequence[int], spec: VLMSpec) -> Blocks:
    """The blocks of a prompt, image tokens repeated."""
    if spec.language.both_ways == "prompt":
        return ((0, len(ids)),)
    if spec.language.both_ways == "none":
        return ()
    image = np.concatenate([[False], np.asarray(ids) == spec.prompt.image_token_id, [False]])
    edges = np.flatnonzero(image[1:] != image[:-1]).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def prefill(decoder: Decoder, embeds: Floats, blocks: Blocks) -> Floats:
    """Append rows (S, H), those of each block as one; the logits (V,) after the last one.

    Raises BundleError where the engine knows causal attention only.
    """
    if not blocks:
        return decoder.prefill(embeds)
    if not hasattr(decoder, "prefill_block"):
        raise BundleError("this engine lets no row see those after it, as the model needs: choose onnx or gguf")
    done = 0
    for start, stop in blocks:
        if done < start:
            logits = decoder.prefill(embeds[done:start])
        logits = cast(BlockDecoder, decoder).prefill_block(embeds[start:stop])
        done = stop
    return decoder.prefill(embeds[done:]) if done < len(embeds) else logits


def whole_blocks(common: int, blocks: Blocks) -> int:
    """How many of `common` rows may stay in the KV cache: a block stays whole, or not at all."""
    return next((start for start, stop in blocks if start < common < stop), common)
