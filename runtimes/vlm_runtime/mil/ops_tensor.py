"""MIL's operations on shapes and places: what moves numbers without computing.

Source of the semantics: coremltools/converters/mil/mil/ops/defs (iOS15 to iOS18), tensor_*.py and scatter_gather.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np

from vlm_runtime.mil.ops_elementwise import room, wide
from vlm_runtime.mil.values import Array
from vlm_runtime.mil.wire import Unsound


def integers(x: Any) -> list[int]:
    """A constant or computed list of integers."""
    return [int(n) for n in np.asarray(x).reshape(-1)]


def axis_of(axis: Any, rank: int) -> int:
    """An axis counted from the front. Raises Unsound when there is none."""
    number = int(axis)
    if not -rank <= number < rank:
        raise Unsound(f"axis {number} of a tensor of rank {rank}")
    return number % rank


def reshape(x: Array, shape: Array) -> Array:
    """To `shape`, where 0 keeps a length and -1 is what remains."""
    wanted = integers(shape)
    return x.reshape([x.shape[i] if n == 0 and i < x.ndim else n for i, n in enumerate(wanted)])


def transpose(x: Array, perm: Array) -> Array:
    """Axes in the order of `perm`."""
    return x.transpose(integers(perm))


def expand_dims(x: Array, axes: Array) -> Array:
    """Lengths of 1 put in, at `axes` of the result."""
    return np.expand_dims(x, tuple(integers(axes)))


def squeeze(x: Array, axes: Array | None = None) -> Array:
    """Lengths of 1 taken out."""
    return np.squeeze(x, None if axes is None else tuple(integers(axes)))


def concat(values: list[Array], axis: Array, interleave: Any = False) -> Array:
    """One after the other along `axis`; scalars count as vectors."""
    if bool(interleave):
        raise Unsound("concat with interleave")
    pieces = [value.reshape(1) if value.ndim == 0 else value for value in values]
    where = axis_of(axis, pieces[0].ndim)
    room(sum(piece.size for piece in pieces))
    return np.concatenate(pieces if len({p.dtype for p in pieces}) == 1 else [wide(p) for p in pieces], where)


def stack(values: list[Array], axis: Array) -> Array:
    """One after the other along a new axis."""
    room(sum(value.size for value in values))
    return np.stack([wide(value) for value in values], int(axis))


def split(
    x: Array, axis: Array, num_splits: Array | None = None, split_sizes: Array | None = None
) -> tuple[Array, ...]:
    """Pieces along `axis`, equal or of `split_sizes`."""
    where = axis_of(axis, x.ndim)
    if split_sizes is None:
        return tuple(np.split(x, int(cast(Array, num_splits)), where))
    sizes = integers(split_sizes)
    if any(n < 0 for n in sizes) or sum(sizes) != x.shape[where]:
        raise Unsound(f"a length of {x.shape[where]} split into {sizes[:8]}")
    return tuple(np.split(x, np.cumsum(sizes)[:-1], where))


def tile(x: Array, reps: Array) -> Array:
    """Repeated along each axis."""
    room(x.size, *integers(reps))
    return np.tile(x, integers(reps))


def pad(x: Array, pad: Array, mode: str = "constant", constant_val: Any = 0.0) -> Array:
    """Lengths put before and behind the last axes."""
    pairs = np.asarray(pad).reshape(-1, 2).tolist()
    pairs = [[0, 0]] * (x.ndim - len(pairs)) + pairs
    room(*(n + before + behind for n, (before, behind) in zip(x.shape, pairs, strict=True)))
    if mode == "constant":
        return np.pad(wide(x), pairs, constant_values=np.asarray(constant_val).astype(wide(x).dtype))
    kind = {"reflect": "reflect", "replicate": "edge"}.get(mode)
    if kind is None:
        raise Unsound(f"pad of mode {mode!r}")
    return np.pad(x, pairs, kind)  # type: ignore[call-overload,no-any-return]


def reverse(x: Array, axes: Array | None = None) -> Array:
    """Backwards along `axes`, or all."""
    return np.flip(x, None if axes is None else tuple(integers(axes)))


def shape(x: Array) -> Array:
    """The lengths of x."""
    return np.array(x.shape, np.int32)


def range_1d(start: Array, end: Array, step: Array) -> Array:
    """start, start + step, … below end."""
    if float(step) == 0:
        raise Unsound("a range with the step 0")
    room(max(0, math.ceil((float(end) - float(start)) / float(step))))
    return np.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


def fill(shape: Array, value: Array | float = 0.0) -> Array:
    """A tensor of one number."""
    room(*integers(shape))
    number = np.asarray(value)
    return np.full(integers(shape), number, np.float32 if number.dtype.kind == "f" else number.dtype)


def band_part(x: Array, lower: Array | int = -1, upper: Array | int = -1) -> Array:
    """Zeros outside the band of diagonals; -1 keeps all on that side."""
    i, j = np.arange(x.shape[-2])[:, None], np.arange(x.shape[-1])[None]
    low, high = int(lower), int(upper)
    return np.where(((low < 0) | (i - j <= low)) & ((high < 0) | (j - i <= high)), x, np.zeros((), x.dtype))


def gather(
    x: Array, indices: Array, axis: Array | int = 0, batch_dims: Array | int = 0, validate_indices: Any = False
) -> Array:
    """x at `indices` along `axis`; negative ones count from the end. `batch_dims` leading axes are shared."""
    where, batch = axis_of(axis, x.ndim), int(batch_dims)
    places = np.asarray(indices).astype(np.int64)
    _within(places, x.shape[where])
    if batch == 0:
        room(*x.shape[:where], *places.shape, *x.shape[where + 1 :])
        return np.take(x, places, where)
    if not 0 < batch <= min(where, places.ndim) or x.shape[:batch] != places.shape[:batch]:
        raise Unsound(f"gather with {batch} shared axes of {x.shape} and {places.shape}")
    rows = [np.take(x[at], places[at], where - batch) for at in np.ndindex(*x.shape[:batch])]
    return np.stack(rows).reshape(*x.shape[:batch], *rows[0].shape)


def gather_along_axis(x: Array, indices: Array, axis: Array | int = 0, validate_indices: Any = False) -> Array:
    """x at `indices` along `axis`, each place for itself."""
    where, places = axis_of(axis, x.ndim), np.asarray(indices).astype(np.int64)
    _within(places, x.shape[where])
    return np.take_along_axis(x, places, where)


def gather_nd(x: Array, indices: Array, batch_dims: Array | int = 0, validate_indices: Any = False) -> Array:
    """x at the coordinates in the last axis of `indices`."""
    if int(batch_dims):
        raise Unsound("gather_nd with batch_dims")
    places = np.asarray(indices).astype(np.int64)
    for number in range(places.shape[-1]):
        _within(places[..., number], x.shape[number])
    return np.asarray(x[tuple(np.moveaxis(places, -1, 0))])


def _within(places: Array, length: int) -> None:
    if places.size and not (-length <= places.min() and places.max() < length):
        raise Unsound(f"an index of {places.min()} to {places.max()} into a length of {length}")


def _slices(
    x: Array, begin: Any, end: Any, stride: Any, begin_mask: Any, end_mask: Any, squeeze_mask: Any
) -> tuple[slice | int, ...]:
    """NumPy's index. Masks: from the very begin, to the very end, one place without its axis."""
    steps = integers(stride) if stride is not None else [1] * x.ndim
    masks = [
        [bool(n) for n in np.asarray(mask).reshape(-1)] if mask is not None else [False] * x.ndim
        for mask in (begin_mask, end_mask, squeeze_mask)
    ]
    first, last = integers(begin), integers(end)
    if {len(one) for one in (first, last, steps)} | {len(mask) for mask in masks} != {x.ndim} or 0 in steps:
        raise Unsound(f"a slice of {len(first)} axes of a tensor of rank {x.ndim}")
    return tuple(
        first[i]
        if masks[2][i]
        else slice(None if masks[0][i] else first[i], None if masks[1][i] else last[i], steps[i])
        for i in range(x.ndim)
    )


def slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """A part of x, as Python slices."""
    return np.asarray(x[_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)])


def slice_by_size(x: Array, begin: Array, size: Array) -> Array:
    """`size` numbers from `begin` on along each axis; -1 takes the rest."""
    pairs = zip(integers(begin), integers(size), strict=True)
    return x[tuple(slice(start, None if n < 0 else start + n) for start, n in pairs)]


def slice_update(
    x: Array,
    update: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
    *,
    in_place: bool = False,
) -> Array:
    """x with `update` at a part of it; `in_place` where the caller knows that nobody else reads x."""
    part = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    result = x if in_place and x.flags.writeable else x.copy()
    if result[part].shape != update.shape:
        raise Unsound(f"slice_update of {update.shape} into {result[part].shape}")
    result[part] = update
    return result


def one_hot(
    indices: Array,
    one_hot_vector_size: Array,
    axis: Array | int = -1,
    on_value: Array | float = 1,
    off_value: Array | float = 0,
) -> Array:
    """A new axis with on_value at the index."""
    size = int(one_hot_vector_size)
    room(indices.size, size)
    hit = np.expand_dims(indices, int(axis)) == np.moveaxis(
        np.arange(size).reshape(size, *[1] * indices.ndim), 0, int(axis)
    )
    return np.where(hit, on_value, off_value)


OPS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        band_part, concat, expand_dims, fill, gather, gather_along_axis, gather_nd, one_hot, pad, range_1d, reshape,
        reverse, shape, slice_by_index, slice_by_size, slice_update, split, squeeze, stack, tile, transpose,
    )
}  # fmt: skip
