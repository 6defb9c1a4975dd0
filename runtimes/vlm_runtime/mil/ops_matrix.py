"""MIL's operations that sum: matrix products, convolutions, norms, softmax, reductions, pooling.

Source of the semantics: coremltools/converters/mil/mil/ops/defs (iOS15 to iOS18), linear.py, conv.py, normalization.py,
reduction.py, pool.py, transformers.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlm_runtime.mil.ops_elementwise import room, wide
from vlm_runtime.mil.ops_tensor import axis_of, integers
from vlm_runtime.mil.values import Array
from vlm_runtime.mil.wire import Unsound


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x (…, I) with weight (O, I) and bias (O,) → (…, O)."""
    room(*x.shape[:-1], weight.shape[0])
    flat = wide(x).reshape(-1, x.shape[-1])
    y = flat @ wide(weight).T
    if bias is not None:
        y += wide(bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def matmul(x: Array, y: Array, transpose_x: Any = False, transpose_y: Any = False) -> Array:
    """Matrix products over the leading axes."""
    a = x.swapaxes(-1, -2) if bool(transpose_x) else x
    b = y.swapaxes(-1, -2) if bool(transpose_y) else y
    if a.ndim > 1 and b.ndim > 1:
        room(*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    return np.asarray(np.matmul(wide(a), wide(b)))


def einsum(values: list[Array], equation: str) -> Array:
    """A sum of products in Einstein's notation."""
    lengths = [n for value in values for n in value.shape]
    room(*lengths[: len(lengths) // 2 + 1])
    return np.asarray(np.einsum(equation, *[wide(value) for value in values], optimize=True))


def scaled_dot_product_attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    """softmax(q kᵀ / √d + mask) v (iOS18); a mask of bools keeps where true."""
    scores = matmul(wide(query) * np.float32(query.shape[-1] ** -0.5), key, transpose_y=True)
    if attn_mask is not None:
        if attn_mask.dtype == np.bool_:
            scores = np.where(attn_mask, scores, np.float32(-np.inf))
        else:
            scores = scores + wide(attn_mask)
    return matmul(softmax(scores), value)


def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Array | None = None,
    pad_type: str = "valid",
    pad: Array | None = None,
    dilations: Array | None = None,
    groups: Array | int = 1,
) -> Array:
    """x (N, I, …) with weight (O, I / groups, …) → (N, O, …), over one to three axes."""
    rank, many = x.ndim - 2, int(groups)
    if rank < 1 or weight.ndim != x.ndim or many < 1 or x.shape[1] != weight.shape[1] * many or weight.shape[0] % many:
        raise Unsound(f"conv of {x.shape} with {weight.shape} in {many} groups")
    step = integers(strides) if strides is not None else [1] * rank
    spread = integers(dilations) if dilations is not None else [1] * rank
    kernel = weight.shape[2:]
    windows = _windows(x, kernel, step, spread, _padding(x.shape[2:], kernel, step, spread, pad_type, pad), 0.0)
    outer = windows.shape[2 : 2 + rank]
    room(x.shape[0], *windows.shape[1:])
    # (N, G, I/G, out…, kernel…) → (N, G, I/G · kernel, out)
    grouped = windows.reshape(x.shape[0], many, -1, *outer, *kernel)
    columns = np.moveaxis(grouped, range(3, 3 + rank), range(-rank, 0))
    columns = columns.reshape(x.shape[0], many, -1, math.prod(outer))
    y: Array = wide(weight).reshape(many, weight.shape[0] // many, -1) @ columns
    y = y.reshape(x.shape[0], weight.shape[0], *outer)
    return y if bias is None else y + wide(bias).reshape(-1, *[1] * rank)


def _padding(
    lengths: tuple[int, ...], kernel: tuple[int, ...], step: list[int], spread: list[int], kind: str, pad: Any
) -> list[tuple[int, int]]:
    """Places put before and behind each axis: none, as given, or as many as keep length / step."""
    if kind == "valid":
        return [(0, 0)] * len(lengths)
    if kind == "custom":
        given = integers(pad)
        return list(zip(given[0::2], given[1::2], strict=True))
    pairs = []
    for n, k, s, d in zip(lengths, kernel, step, spread, strict=True):
        total = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
        less, more = total // 2, total - total // 2
        pairs.append((less, more) if kind == "same" else (more, less))
    if kind not in ("same", "same_lower"):
        raise Unsound(f"padding of type {kind!r}")
    return pairs


def _windows(
    x: Array,
    kernel: tuple[int, ...],
    step: list[int],
    spread: list[int],
    padding: list[tuple[int, int]],
    value: float,
) -> Array:
    """(N, C, out…, kernel…): a view of the padded input."""
    x = wide(x)
    if any(size < 0 for pair in padding for size in pair) or any(n < 1 for n in (*step, *spread)):
        raise Unsound("strides, dilations or padding below zero")
    if any(size for pair in padding for size in pair):
        room(*x.shape[:2], *(n + sum(pair) for n, pair in zip(x.shape[2:], padding, strict=True)))
        x = np.pad(x, [(0, 0), (0, 0), *padding], constant_values=value)
    reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, spread, strict=True))
    axes = tuple(range(2, x.ndim))
    windows = np.lib.stride_tricks.sliding_window_view(x, reach, axes)  # type: ignore[call-overload]
    picks = [slice(None, None, s) for s in step] + [slice(None, None, d) for d in spread]
    return np.asarray(windows[(slice(None), slice(None), *picks)])


def _pool(function: Callable[..., Array], empty: float) -> Callable[..., Array]:
    def run(
        x: Array,
        kernel_sizes: Array,
        strides: Array | None = None,
        pad_type: str = "valid",
        pad: Array | None = None,
        ceil_mode: Any = False,
        exclude_padding_from_average: Any = False,
    ) -> Array:
        kernel = tuple(integers(kernel_sizes))
        step = integers(strides) if strides is not None else [1] * len(kernel)
        ones = [1] * len(kernel)
        padding = _padding(x.shape[2:], kernel, step, ones, pad_type, pad)
        if bool(ceil_mode) or (bool(exclude_padding_from_average) and any(map(sum, padding))):
            raise Unsound("pooling with ceil_mode or with padding left out of the average")
        windows = _windows(x, kernel, step, ones, padding, empty)
        return function(windows, axis=tuple(range(-len(kernel), 0)))

    return run


def layer_norm(
    x: Array,
    axes: Array | None = None,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Array | float = 1e-5,
) -> Array:
    """Mean 0 and variance 1 over `axes`, then gamma and beta."""
    x = wide(x)
    over = tuple(axis_of(a, x.ndim) for a in (integers(axes) if axes is not None else range(x.ndim)))
    centred = x - x.mean(over, keepdims=True)
    y: Array = centred / np.sqrt(np.square(centred).mean(over, keepdims=True) + np.float32(epsilon))
    fitting = [n if i in over else 1 for i, n in enumerate(x.shape)]
    if gamma is not None:
        y *= wide(gamma).reshape(fitting)
    return y if beta is None else y + wide(beta).reshape(fitting)


def batch_norm(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Array | float = 1e-5,
) -> Array:
    """(x - mean) / √(variance + epsilon) for each channel, then gamma and beta."""
    fitting = (-1, *[1] * (x.ndim - 2))
    y: Array = (wide(x) - wide(mean).reshape(fitting)) / np.sqrt(wide(variance).reshape(fitting) + np.float32(epsilon))
    if gamma is not None:
        y = y * wide(gamma).reshape(fitting)
    return y if beta is None else y + wide(beta).reshape(fitting)


def l2_norm(x: Array, epsilon: Array | float = 1e-6) -> Array:
    """x / √(Σ x² + epsilon) over the last three axes."""
    x = wide(x)
    return np.asarray(x / np.sqrt(np.square(x).sum(tuple(range(-3, 0)), keepdims=True) + np.float32(epsilon)))


def softmax(x: Array, axis: Array | int = -1) -> Array:
    """eˣ over its sum along `axis`."""
    where = axis_of(axis, x.ndim)
    x = wide(x)
    y: Array = np.exp(x - x.max(where, keepdims=True))
    y /= y.sum(where, keepdims=True)
    return y


def _reduction(function: Callable[..., Array]) -> Callable[..., Array]:
    def run(x: Array, axes: Array | None = None, keep_dims: Any = False) -> Array:
        over = None if axes is None else tuple(integers(axes))
        return np.asarray(function(wide(x), axis=over, keepdims=bool(keep_dims)))

    return run


def _sum_square(x: Array, axis: Any, keepdims: bool) -> Array:
    return np.asarray(np.square(x).sum(axis, keepdims=keepdims))


def _l2(x: Array, axis: Any, keepdims: bool) -> Array:
    return np.sqrt(_sum_square(x, axis, keepdims))


def _l1(x: Array, axis: Any, keepdims: bool) -> Array:
    return np.asarray(np.abs(x).sum(axis, keepdims=keepdims))


def _log_sum_exp(x: Array, axis: Any, keepdims: bool) -> Array:
    top = x.max(axis, keepdims=True)
    y = np.log(np.exp(x - top).sum(axis, keepdims=True)) + top
    return np.asarray(y if keepdims else np.squeeze(y, axis))


def _place(function: Callable[..., Any]) -> Callable[..., Array]:
    def run(x: Array, axis: Array | int = -1, keep_dims: Any = True, output_dtype: str = "int32") -> Array:
        return np.asarray(function(wide(x), axis_of(axis, x.ndim), keepdims=bool(keep_dims)))

    return run


def cumsum(x: Array, axis: Array | int = 0, exclusive: Any = False, reverse: Any = False) -> Array:
    """Sums so far along `axis`."""
    where = axis_of(axis, x.ndim)
    turned = np.flip(wide(x), where) if bool(reverse) else wide(x)
    y = np.cumsum(turned, where, dtype=turned.dtype)
    y = y - turned if bool(exclusive) else y
    return np.flip(y, where) if bool(reverse) else y


def topk(
    x: Array,
    k: Array | int = 1,
    axis: Array | int = -1,
    ascending: Any = False,
    sort: Any = True,
    return_indices: Any = True,
    output_indices_dtype: str = "int32",
) -> tuple[Array, ...]:
    """The k largest along `axis` (smallest where `ascending`), with their places."""
    where = axis_of(axis, x.ndim)
    order = np.argsort(wide(x) if bool(ascending) else -wide(x), where, kind="stable")
    places = np.take(order, range(int(k)), where)
    values = np.take_along_axis(x, places, where)
    return (values, places) if bool(return_indices) else (values,)


OPS: Mapping[str, Callable[..., Any]] = {
    "avg_pool": _pool(np.mean, 0.0), "batch_norm": batch_norm, "conv": conv, "cumsum": cumsum, "einsum": einsum,
    "l2_norm": l2_norm, "layer_norm": layer_norm, "linear": linear, "matmul": matmul,
    "max_pool": _pool(np.max, -math.inf), "reduce_argmax": _place(np.argmax), "reduce_argmin": _place(np.argmin),
    "reduce_l1_norm": _reduction(_l1), "reduce_l2_norm": _reduction(_l2),
    "reduce_log_sum_exp": _reduction(_log_sum_exp), "reduce_max": _reduction(np.max),
    "reduce_mean": _reduction(np.mean), "reduce_min": _reduction(np.min),
    "reduce_prod": _reduction(np.prod), "reduce_sum": _reduction(np.sum), "reduce_sum_square": _reduction(_sum_square),
    "scaled_dot_product_attention": scaled_dot_product_attention, "softmax": softmax, "topk": topk,
}  # fmt: skip
