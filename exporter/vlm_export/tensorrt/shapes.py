"""The one optimization profile of an engine: least, usual and most of each dimension that is not fixed.

One profile only: every further one puts the weights into the engine again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Range = tuple[int, int, int]
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
MAX_BATCH = 4  # pictures in one run


def span(name: str, axis: int, io: Mapping[str, Any]) -> Range | None:
    """(least, usual, most) of an input's dimension; `io` is the part's `details["io"]`. None where nothing is known.

    One row is usual, for decoding is what is waited for; the past is usually half full.
    """
    kind = name.partition(".")[0]
    if kind in ("past_key", "past_value") and axis == 2 and "max_context" in io:
        return position_values(io)
    if kind == "inputs_embeds" and axis == 1 and "prefill_chunk" in io:
        return 1, 1, int(io["prefill_chunk"])
    if kind in ("pixel_values", "image_features") and axis == 0:
        return 1, 1, int(io.get("max_batch", MAX_BATCH))
    return None


def shapes(name: str, dimensions: Sequence[int], io: Mapping[str, Any]) -> Shapes | None:
    """The three shapes of an input whose open dimensions are -1; None where one of them has no known range."""
    ranges = [(size, size, size) if size >= 0 else span(name, axis, io) for axis, size in enumerate(dimensions)]
    known = [one for one in ranges if one is not None]
    if len(known) < len(ranges):
        return None
    least, usual, most = (tuple(one[i] for one in known) for i in range(3))
    return least, usual, most


def position_values(io: Mapping[str, Any]) -> Range:
    """Rows in the cache; also the values of `position`, for an SDK that wants them when it plans."""
    context = int(io["max_context"])
    return 0, context // 2, context - 1
