"""New values for some tensors of a checkpoint: kept in memory while a layer is worked on, then mapped from a file."""

from __future__ import annotations

import dataclasses
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_models.checkpoint import Checkpoint, Stored
from vlm_models.grid import Grid
from vlm_models.language import Rows

Float = NDArray[np.float32]


class Overlay:
    """`checkpoint` is the given one with the tensors that were put; it changes as they are put."""

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        self._tensors = dict(checkpoint.tensors)
        self._folder, self._pending, self._files = folder, dict[str, Stored](), 0
        self.checkpoint = dataclasses.replace(checkpoint, tensors=self._tensors)

    def floats(self, rows: Rows) -> Float:
        """The present values of some rows, a new float32 array."""
        return np.array(self.checkpoint.rows(rows.tensor, rows.start, rows.stop), np.float32)

    def put(self, tensor: str, array: Float, grid: Grid | None = None) -> None:
        """A tensor's new values (the whole of it), and the grid they stand on."""
        stored = Stored("F32", np.ascontiguousarray(array, np.float32), grid=grid)
        self._tensors[tensor] = self._pending[tensor] = stored

    def divide(self, rows: Rows, scales: Float) -> None:
        """Divide some rows of a matrix, or numbers of a vector, by `scales` (stop − start,); a grid stays one."""
        array = np.array(self.checkpoint.rows(rows.tensor), np.float32)
        part = slice(rows.start, rows.stop)
        array[part] /= scales.reshape(-1, *[1] * (array.ndim - 1))
        grid = self.checkpoint.grid(rows.tensor)
        if grid is not None:
            changed = np.array(grid.scales)
            changed[part] /= scales[:, None]
            grid = dataclasses.replace(grid, scales=changed)
        self.put(rows.tensor, array, grid)

    def flush(self) -> None:
        """Move what was put into one file and map it."""
        if not self._pending:
            return
        path, self._files = self._folder / f"{self._files}.bin", self._files + 1
        spans: dict[str, tuple[int, int]] = {}
        with path.open("w+b") as file:
            for name, stored in self._pending.items():
                start = file.tell()
                stored.array.tofile(file)
                spans[name] = start, file.tell()
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        for name, stored in self._pending.items():
            flat: NDArray[Any] = np.frombuffer(mapped, np.float32, stored.array.size, spans[name][0])
            self._tensors[name] = Stored("F32", flat.reshape(stored.array.shape), mapped, spans[name], stored.grid)
        self._pending.clear()
