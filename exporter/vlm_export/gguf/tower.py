"""Vision tower and projector as an mmproj file holds them: keys and float32 tensors, read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Weight:
    """One tensor of the file: matrices take the file's type, the others stay float32; `read` gives float32."""

    shape: tuple[int, ...]
    matrix: bool
    read: Callable[[], NDArray[np.float32]]


@dataclass(frozen=True)
class Tower:
    """What an mmproj file holds: keys, under clip.vision unless they begin with clip. or vlm., and tensors by name."""

    keys: Mapping[str, Any]
    weights: Mapping[str, Weight]
