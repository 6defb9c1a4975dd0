"""The grid on which a weight matrix stands once a quantizer has rounded it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Grid:
    """How a weight matrix (R, C) was rounded already: w = (integer − zero) · scale in groups of `group_size` columns.

    `scales` (R, G) float32, `zeros` (R, G) uint8 for integers from 0, or None for symmetric ones around 0.
    """

    bits: int
    group_size: int
    scales: Array
    zeros: Array | None = None

    def rows(self, start: int, stop: int) -> Grid:
        """That of rows start:stop."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return Grid(self.bits, self.group_size, self.scales[start:stop], zeros)
