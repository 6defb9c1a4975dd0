"""Decoders that take a chunk of rows a call: the counting around the call, and numbers in the type a graph takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_models.errors import PromptError
from vlm_runtime.engine import Floats

STORED: dict[str, type[Any]] = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}  # NumPy has no bfloat16


class StepDecoder(ABC):
    """Prefill in chunks, decode, rewind; what is left to a subclass is `_step`, and `_forget` where rows must move."""

    def __init__(self, hidden_size: int, max_context: int, chunk: int) -> None:
        self.max_context, self.position = max_context, 0
        self._hidden_size, self._chunk = hidden_size, chunk

    def prefill(self, embeds: Floats) -> Floats:
        """Append rows (S, H) in chunks; the logits (V,) after the last one."""
        if embeds.ndim != 2 or embeds.shape[0] == 0 or embeds.shape[1] != self._hidden_size:
            raise ValueError(f"prefill takes (S, {self._hidden_size}) with S > 0, got {embeds.shape}")
        self._check_room(len(embeds))
        for start in range(0, len(embeds), self._chunk):
            logits = self._append(embeds[start : start + self._chunk])
        return logits

    def decode(self, embed: Floats) -> Floats:
        """Append one row (H,); its logits (V,)."""
        self._check_room(1)
        return self._append(np.reshape(embed, (1, self._hidden_size)))

    def rewind(self, position: int) -> None:
        """Forget all rows from `position` on."""
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot rewind to {position}: {self.position} rows are in the cache")
        if position < self.position:
            self._forget(position)
        self.position = position

    def _append(self, rows: Floats) -> Floats:
        logits = self._step(rows)
        self.position += len(rows)
        return logits

    @abstractmethod
    def _step(self, rows: Floats) -> Floats:
        """Run (S, H), 1 ≤ S ≤ chunk, behind `position` rows of the cache, which has room; the logits (V,)."""

    @abstractmethod
    def _forget(self, position: int) -> None:
        """Make the cache one of `position` rows; it holds `self.position` > `position`."""

    def _check_room(self, rows: int) -> None:
        if self.position + rows > self.max_context:
            raise PromptError(
                f"{self.position} + {rows} tokens do not fit the context of {self.max_context}: "
                "shorten the prompt or export with a larger --max-context"
            )


def store(target: NDArray[Any], values: Floats) -> None:
    """Write float32 `values` into `target` of the same shape, a type of STORED; bfloat16 (uint16) rounds to even."""
    if target.dtype != np.uint16:
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, as on the device
            target[...] = values
        return
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    target[...] = np.where(np.isnan(values), 0x7FC0, rounded)


def load(stored: NDArray[Any]) -> Floats:
    """The float32 values of an array of a type of STORED."""
    if stored.dtype != np.uint16:
        return stored.astype(np.float32)
    return (stored.astype(np.uint32) << 16).view(np.float32)
