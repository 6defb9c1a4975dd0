"""MIL's elementwise operations. Floats are computed in float32, whatever precision they are stored in.

Source of the semantics: coremltools/converters/mil/mil/ops/defs (iOS15 to iOS18), elementwise_*.py and activation.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlm_runtime.mil.values import NUMPY, Array
from vlm_runtime.mil.wire import Unsound

MAX_RESULT = 1 << 30  # numbers in one result: 4 GiB of float32


def wide(x: Array) -> Array:
    """float16 as float32, else unchanged."""
    return x.astype(np.float32) if x.dtype == np.float16 else x


def room(*shape: int) -> None:
    """Raises Unsound for a result that no model of ours has."""
    count = 1
    for n in shape:
        count *= int(n)
    if count > MAX_RESULT:
        raise Unsound(f"a result of {' × '.join(map(str, shape))} numbers is too large")


def _erf(x: Array) -> Array:
    """Within 5e-7: the rational function that Eigen and XLA use for float32."""
    x = np.clip(x, np.float32(-4), np.float32(4))
    square = x * x
    return x * _polynomial(square, _ERF_ABOVE) / _polynomial(square, _ERF_BELOW)


# fmt: off
_ERF_ABOVE = (
    -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05, -7.34990630326855e-04,
    -2.95459980854025e-03, -1.60960333262415e-02,
)
_ERF_BELOW = (
    -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02,
)
# fmt: on


def _polynomial(x: Array, coefficients: tuple[float, ...]) -> Array:
    total = np.full_like(x, coefficients[0])
    for one in coefficients[1:]:
        total = total * x + np.float32(one)
    return total


def _sigmoid(x: Array) -> Array:
    half = np.float32(0.5)
    return half * (np.tanh(half * x) + 1)


def _softplus(x: Array) -> Array:
    return np.logaddexp(x, np.zeros((), x.dtype))


def _relu(x: Array) -> Array:
    return np.maximum(x, np.zeros((), x.dtype))


_UNARY: Mapping[str, Callable[[Array], Array]] = {
    "abs": np.abs, "acos": np.arccos, "asin": np.arcsin, "atan": np.arctan, "ceil": np.ceil, "cos": np.cos,
    "cosh": np.cosh, "erf": _erf, "exp": np.exp, "exp2": np.exp2, "floor": np.floor, "identity": lambda x: x,
    "logical_not": np.logical_not, "relu": _relu, "relu6": lambda x: np.clip(x, 0, 6), "round": np.round,
    "sigmoid": _sigmoid, "sign": np.sign, "silu": lambda x: x * _sigmoid(x), "sin": np.sin, "sinh": np.sinh,
    "softplus": _softplus, "softsign": lambda x: x / (1 + np.abs(x)), "sqrt": np.sqrt, "square": np.square,
    "tan": np.tan, "tanh": np.tanh,
}  # fmt: skip


def _divide(x: Array, y: Array) -> Array:
    """real_div: of integers the quotient is cut towards zero."""
    if x.dtype.kind in "iu":
        return np.trunc(x.astype(np.float64) / y).astype(x.dtype)
    return x / y


_BINARY: Mapping[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "equal": np.equal, "floor_div": np.floor_divide, "greater": np.greater,
    "greater_equal": np.greater_equal, "less": np.less, "less_equal": np.less_equal, "logical_and": np.logical_and,
    "logical_or": np.logical_or, "logical_xor": np.logical_xor, "maximum": np.maximum, "minimum": np.minimum,
    "mod": np.mod, "mul": np.multiply, "not_equal": np.not_equal, "pow": np.power, "real_div": _divide,
    "sub": np.subtract,
}  # fmt: skip


def _unary(function: Callable[[Array], Array]) -> Callable[..., Array]:
    return lambda x: function(wide(x))


def _binary(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    def run(x: Array, y: Array) -> Array:
        room(*np.broadcast_shapes(x.shape, y.shape))
        return function(wide(x), wide(y))

    return run


def rsqrt(x: Array, epsilon: Array | float = 1e-12) -> Array:
    """1 / √(x + epsilon)."""
    return 1 / np.sqrt(wide(x) + np.float32(epsilon))


def inverse(x: Array, epsilon: Array | float = 1e-4) -> Array:
    """1 / (x + epsilon)."""
    return 1 / (wide(x) + np.float32(epsilon))


def log(x: Array, epsilon: Array | float = 1e-45) -> Array:
    """ln(x + epsilon)."""
    return np.log(wide(x) + np.float32(epsilon))


def gelu(x: Array, mode: str = "EXACT") -> Array:
    """x · Φ(x): EXACT, TANH_APPROXIMATION or SIGMOID_APPROXIMATION."""
    x = wide(x)
    half = np.float32(0.5)
    if mode == "EXACT":
        return np.asarray(half * x * (1 + _erf(x * np.float32(0.5**0.5))))
    if mode == "TANH_APPROXIMATION":
        inner = np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x * x * x)
        return np.asarray(half * x * (1 + np.tanh(inner)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * _sigmoid(np.float32(1.702) * x)
    raise Unsound(f"gelu of mode {mode!r}")


def leaky_relu(x: Array, alpha: Array | float = 0.01) -> Array:
    """x where positive, else alpha · x."""
    x = wide(x)
    return np.where(x >= 0, x, np.float32(alpha) * x)


def elu(x: Array, alpha: Array | float = 1.0) -> Array:
    """x where positive, else alpha · (eˣ - 1)."""
    x = wide(x)
    return np.where(x > 0, x, np.float32(alpha) * np.expm1(np.minimum(x, 0)))


def sigmoid_hard(x: Array, alpha: Array | float = 0.2, beta: Array | float = 0.5) -> Array:
    """alpha · x + beta, within 0 and 1."""
    return np.clip(np.float32(alpha) * wide(x) + np.float32(beta), 0, 1)


def clip(x: Array, alpha: Array | float, beta: Array | float) -> Array:
    """x within alpha and beta."""
    return np.clip(wide(x), np.float32(alpha), np.float32(beta))


def select(cond: Array, a: Array, b: Array) -> Array:
    """a where cond, else b."""
    room(*np.broadcast_shapes(cond.shape, a.shape, b.shape))
    return np.where(cond.astype(bool), wide(a), wide(b))


def cast(x: Array, dtype: str) -> Array:
    """To another type; floats to integers are cut towards zero."""
    if dtype not in NUMPY:
        raise Unsound(f"cast to {dtype!r}")
    x = wide(x)
    if dtype in ("fp16", "fp32"):
        return x.astype(np.float32)
    return x.astype(NUMPY[dtype])


OPS: Mapping[str, Callable[..., Any]] = {
    **{name: _unary(function) for name, function in _UNARY.items()},
    **{name: _binary(function) for name, function in _BINARY.items()},
    "cast": cast, "clip": clip, "elu": elu, "gelu": gelu, "inverse": inverse, "leaky_relu": leaky_relu, "log": log,
    "rsqrt": rsqrt, "select": select, "sigmoid_hard": sigmoid_hard,
}  # fmt: skip
