"""Every operation of the executor against coremltools' own value inference, and against PyTorch where it has none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from milpackages import coremltools, mb, numbers, package, tensor
from vlm_runtime.mil import Executor, open_package
from vlm_runtime.mil.constants import OPS

Array = NDArray[Any]
A, B = numbers((2, 3, 4), 1), numbers((2, 3, 4), 2)
ROW = numbers((4,), 3)
POSITIVE = np.abs(A) + np.float32(0.25)
WHOLE = np.arange(24, dtype=np.int32).reshape(2, 3, 4) - 11
PLANES = numbers((1, 4, 7, 6), 5)


@dataclass(frozen=True)
class Case:
    """An operation: inputs that are fed, options that are constants, and the truth where coremltools infers none."""

    op: str
    fed: dict[str, Array]
    options: dict[str, Any] = field(default_factory=dict)
    truth: Callable[[], Array] | None = None

    def __str__(self) -> str:
        return self.op


def unary(op: str, x: Array = A, **options: Any) -> Case:
    return Case(op, {"x": x}, options)


def binary(op: str, x: Array = A, y: Array = B) -> Case:
    return Case(op, {"x": x, "y": y})


def t(x: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


EINSUM = "nchw,nwhu->nchu"  # the form of coremltools' torch frontend
CONV = numbers((6, 4, 3, 2), 6)
GROUPED = numbers((8, 2, 3, 3), 7)
PADDED = {"strides": [2, 1], "pad_type": "custom", "pad": [1, 0, 2, 1], "dilations": [1, 2]}


def conv_truth() -> Array:
    padded = torch.nn.functional.pad(t(PLANES), (2, 1, 1, 0))
    return torch.nn.functional.conv2d(padded, t(CONV), t(numbers((6,), 8)), (2, 1), 0, (1, 2)).numpy()


CASES = [
    *(unary(op) for op in ("abs", "atan", "ceil", "cos", "cosh", "erf", "exp", "exp2", "floor", "identity", "relu")),
    *(unary(op) for op in ("relu6", "round", "sigmoid", "sign", "sin", "sinh", "softplus", "softsign", "square")),
    *(unary(op) for op in ("tan", "tanh")),
    *(unary(op, np.clip(A, -0.9, 0.9)) for op in ("acos", "asin")),
    unary("sqrt", POSITIVE),
    unary("log", POSITIVE, epsilon=np.float32(0.5)),
    unary("rsqrt", POSITIVE, epsilon=np.float32(0.5)),
    unary("inverse", POSITIVE, epsilon=np.float32(0.5)),
    unary("logical_not", A > 0),
    *(unary("gelu", A * 3, mode=mode) for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")),
    unary("leaky_relu", A, alpha=np.float32(0.2)),
    unary("elu", A, alpha=np.float32(0.7)),
    unary("sigmoid_hard", A * 3, alpha=np.float32(0.3), beta=np.float32(0.4)),
    unary("clip", A, alpha=np.float32(-0.5), beta=np.float32(0.25)),
    Case("silu", {"x": A}, truth=lambda: torch.nn.functional.silu(t(A)).numpy()),
    *(binary(op) for op in ("add", "sub", "mul", "real_div", "maximum", "minimum", "mod", "floor_div")),
    *(binary(op, A.round(), B.round()) for op in ("equal", "not_equal", "greater", "greater_equal", "less")),
    binary("less_equal", A.round(), B.round()),
    binary("add", A, ROW),
    binary("pow", POSITIVE, B),
    binary("floor_div", WHOLE, np.full((4,), 4, np.int32)),
    *(binary(op, A > 0, B > 0) for op in ("logical_and", "logical_or", "logical_xor")),
    Case("select", {"cond": A > 0, "a": A, "b": B}),
    unary("cast", A * 5, dtype="int32"),
    unary("cast", WHOLE, dtype="fp32"),
    unary("cast", A, dtype="bool"),
    # Sums.
    Case("linear", {"x": A}, {"weight": numbers((5, 4), 9), "bias": numbers((5,), 10)}),
    Case("matmul", {"x": A, "y": numbers((2, 5, 4), 11)}, {"transpose_y": True}),
    Case("matmul", {"x": numbers((2, 4, 3), 11), "y": numbers((1, 4, 5), 12)}, {"transpose_x": True}),
    *(unary(f"reduce_{kind}", A, axes=[1, -1], keep_dims=True) for kind in ("max", "mean", "min", "prod", "sum")),
    *(unary(f"reduce_{kind}", A, axes=[0]) for kind in ("l1_norm", "l2_norm", "sum_square", "log_sum_exp")),
    unary("reduce_argmax", A, axis=1),
    unary("reduce_argmin", A, axis=-1, keep_dims=True),
    unary("cumsum", A, axis=1),
    Case(  # coremltools' own inference fails on it
        "cumsum",
        {"x": A},
        {"axis": 1, "exclusive": True, "reverse": True},
        lambda: (t(A).flip(1).cumsum(1) - t(A).flip(1)).flip(1).numpy(),
    ),
    unary("softmax", A, axis=1),
    Case(
        "layer_norm",
        {"x": A},
        {"axes": [-1], "gamma": ROW, "beta": numbers((4,), 13), "epsilon": np.float32(1e-3)},
        lambda: torch.nn.functional.layer_norm(t(A), (4,), t(ROW), t(numbers((4,), 13)), 1e-3).numpy(),
    ),
    unary("l2_norm", A, epsilon=np.float32(1e-3)),
    Case(
        "batch_norm",
        {"x": PLANES},
        {"mean": ROW, "variance": ROW**2 + 1, "gamma": -ROW, "beta": ROW * 2, "epsilon": np.float32(1e-3)},
        lambda: torch.nn.functional.batch_norm(
            t(PLANES), t(ROW), t(ROW**2 + 1), t(-ROW), t(ROW * 2), False, 0.0, 1e-3
        ).numpy(),
    ),
    Case("conv", {"x": PLANES}, {"weight": CONV, "bias": numbers((6,), 8), **PADDED}, conv_truth),
    Case(
        "conv",
        {"x": PLANES},
        {"weight": GROUPED, "groups": 2, "pad_type": "same"},
        lambda: torch.nn.functional.conv2d(t(PLANES), t(GROUPED), padding="same", groups=2).numpy(),
    ),
    Case(
        "conv",
        {"x": A},
        {"weight": numbers((5, 3, 2), 14), "strides": [2]},
        lambda: torch.nn.functional.conv1d(t(A), t(numbers((5, 3, 2), 14)), stride=2).numpy(),
    ),
    Case(
        "avg_pool",
        {"x": PLANES},
        {"kernel_sizes": [3, 2], "strides": [2, 2], "pad_type": "valid"},
        lambda: torch.nn.functional.avg_pool2d(t(PLANES), (3, 2), (2, 2)).numpy(),
    ),
    Case(
        "max_pool",
        {"x": PLANES},
        {"kernel_sizes": [2, 2], "strides": [1, 2], "pad_type": "custom", "pad": [1, 1, 0, 0]},
        lambda: torch.nn.functional.max_pool2d(t(PLANES), 2, (1, 2), (1, 0)).numpy(),
    ),
    # Shapes and places.
    unary("reshape", A, shape=[0, -1, 2]),
    unary("transpose", A, perm=[2, 0, 1]),
    unary("expand_dims", A, axes=[0, -1]),
    unary("squeeze", A[:, :1], axes=[1]),
    unary("tile", A, reps=[2, 1, 3]),
    unary("pad", A, pad=[1, 2, 0, 3], constant_val=np.float32(0.5)),
    unary("pad", A, pad=[1, 0, 2, 1], mode="reflect"),
    unary("pad", A, pad=[1, 0, 2, 1], mode="replicate"),
    unary("reverse", A, axes=[0, 2]),
    unary("shape", A),
    unary("band_part", A, lower=1, upper=0),
    unary("split", A, axis=2, split_sizes=[1, 3]),
    unary("split", A, axis=2, num_splits=2),
    unary("topk", A, k=2, axis=1),
    unary("topk", A, k=2, axis=-1, ascending=True),
    Case("gather", {"x": A, "indices": np.array([[3, 0], [-1, 1]], np.int32)}, {"axis": 2}),
    Case("gather", {"x": A, "indices": np.array([[2, 0], [1, 1]], np.int32)}, {"axis": 1, "batch_dims": 1}),
    Case("gather_along_axis", {"x": A, "indices": np.abs(WHOLE) % 3}, {"axis": 1}),
    Case(
        "gather_nd",
        {"x": A, "indices": np.array([[0, 2], [1, 1]], np.int32)},
        truth=lambda: A[[0, 1], [2, 1]],
    ),
    Case(
        "one_hot",
        {"indices": np.array([2, 0, 1], np.int32)},
        {"one_hot_vector_size": 4, "on_value": np.float32(2), "off_value": np.float32(-1)},
        lambda: np.where(np.eye(4)[[2, 0, 1]] > 0, 2, -1).astype(np.float32),
    ),
    unary("slice_by_index", A, begin=[0, 2, -3], end=[2, 0, 4], stride=[1, -1, 2], end_mask=[False, True, False]),
    unary("slice_by_index", A, begin=[1, 0, 0], end=[0, 0, 3], begin_mask=[False, True, False],
          end_mask=[False, True, False], squeeze_mask=[True, False, False]),
    unary("slice_by_size", A, begin=[0, 1, 2], size=[2, -1, 2]),
    Case(
        "slice_update",
        {"x": A, "update": numbers((2, 1, 2), 15)},
        {"begin": [0, 1, 0], "end": [2, 2, 4], "stride": [1, 1, 2]},
        lambda: np.concatenate([A[:, :1], np.stack([numbers((2, 1, 2), 15)[..., 0], A[:, 1:2, 1],
                               numbers((2, 1, 2), 15)[..., 1], A[:, 1:2, 3]], -1), A[:, 2:]], 1),
    ),
    unary("quantize", A, scale=np.float32(0.02), zero_point=np.int8(5), output_dtype="int8"),
    unary("quantize", A * 9, scale=ROW**2 + np.float32(0.01), axis=2, output_dtype="uint8"),
    Case("range_1d", {"start": np.int32(2), "end": np.int32(11), "step": np.int32(3)}),
    Case("fill", {"shape": np.array([2, 3], np.int32)}, {"value": np.float32(1.5)}),
]  # fmt: skip


def inferred(case: Case) -> list[Array]:
    """What coremltools computes itself when every input is a constant."""
    mil = coremltools().converters.mil.mil
    with (
        warnings.catch_warnings(),
        mil.Function({"unused": tensor((1,), "fp32")}, coremltools().target.iOS18) as function,
    ):
        warnings.simplefilter("ignore")
        fed = {("input" if case.op == "quantize" else name): value for name, value in case.fed.items()}
        made = getattr(mb(), case.op)(**fed, **case.options)
        function.set_outputs([function.inputs["unused"]])
    return [np.asarray(one.val) for one in (made if isinstance(made, tuple | list) else (made,))]


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Array]]:
    """What our executor makes of one package that holds every case, by the number of the case."""
    kinds = {"float32": "fp32", "int32": "int32", "bool": "fp32"}
    inputs, feeds, order = {}, {}, []
    for number, case in enumerate(CASES):
        for name, value in case.fed.items():
            key, value = f"in{number}_{name}", np.asarray(value)
            shape = value.shape or (1,)  # a function takes no scalars
            inputs[key] = tensor(shape, kinds[value.dtype.name])
            feeds[key] = value.reshape(shape).astype(np.float32 if value.dtype == bool else value.dtype)

    def build(**given: Any) -> list[Any]:
        outputs = []
        for number, case in enumerate(CASES):
            fed = {}
            for name, value in case.fed.items():
                var = given[f"in{number}_{name}"]
                if np.asarray(value).dtype == bool:
                    var = mb().cast(x=var, dtype="bool")
                if np.ndim(value) == 0:
                    var = mb().squeeze(x=var)
                fed["input" if case.op == "quantize" else name] = var
            made = getattr(mb(), case.op)(**fed, **case.options)
            for one in made if isinstance(made, tuple | list) else (made,):
                kind = coremltools().converters.mil.mil.types.builtin_to_string(one.dtype)
                one = one if kind in ("fp32", "int32") else mb().cast(x=one, dtype="fp32")
                outputs.append(mb().identity(x=one, name=f"out{number}_{len(outputs)}"))
                order.append(number)
        return outputs

    folder = package(tmp_path_factory.mktemp("ops") / "ops.mlpackage", inputs, build)
    outputs = Executor(open_package(folder)).run(feeds).outputs
    found: dict[int, list[Array]] = {}
    for number, value in zip(order, outputs.values(), strict=True):
        found.setdefault(number, []).append(value)
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{i}-{case}" for i, case in enumerate(CASES)])
def test_an_operation_gives_what_coremltools_or_torch_gives(number: int, computed: dict[int, list[Array]]) -> None:
    case = CASES[number]
    want = [case.truth()] if case.truth is not None else inferred(case)
    assert len(computed[number]) == len(want)
    for got, wanted in zip(computed[number], want, strict=True):
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted.astype(np.float64), rtol=2e-5, atol=2e-6)


def test_every_operation_is_checked_somewhere() -> None:
    elsewhere = {name for name in OPS if name.startswith("constexpr_")}  # test_mil_weights
    elsewhere |= {"dequantize", "concat", "stack", "einsum", "scaled_dot_product_attention"}  # below
    assert {case.op for case in CASES} | elsewhere == set(OPS)


def test_operations_of_several_values_and_quantized_ones(tmp_path: Path) -> None:
    query, mask = numbers((1, 2, 3, 4), 16), np.array([[0, 0, -1e4], [0, 0, 0], [-1e4, 0, 0]], np.float32)

    def build(a: Any, b: Any, q: Any, m: Any) -> list[Any]:
        small = mb().quantize(input=a, scale=np.float32(0.03), zero_point=np.uint8(128), output_dtype="uint8")
        return [
            mb().concat(values=[a, b], axis=-2, name="joined"),
            mb().stack(values=[a, b], axis=1, name="stacked"),
            mb().einsum(values=[q, mb().transpose(x=q, perm=[0, 3, 2, 1])], equation=EINSUM, name="summed"),
            mb().scaled_dot_product_attention(query=q, key=q, value=q, attn_mask=m, name="attended"),
            mb().dequantize(input=small, scale=np.float32(0.03), zero_point=np.uint8(128), name="restored"),
        ]

    shapes = {"a": A.shape, "b": B.shape, "q": query.shape, "m": mask.shape}
    folder = package(tmp_path / "p.mlpackage", {name: tensor(shape, "fp32") for name, shape in shapes.items()}, build)
    got = Executor(open_package(folder)).run({"a": A, "b": B, "q": query, "m": mask}).outputs
    np.testing.assert_array_equal(got["joined"], np.concatenate([A, B], 1))
    np.testing.assert_array_equal(got["stacked"], np.stack([A, B], 1))
    want = np.einsum(EINSUM, query, query.transpose(0, 3, 2, 1))
    np.testing.assert_allclose(got["summed"], want, rtol=1e-5, atol=1e-6)
    want = torch.nn.functional.scaled_dot_product_attention(t(query), t(query), t(query), t(mask)).numpy()
    np.testing.assert_allclose(got["attended"], want, rtol=1e-5, atol=1e-6)
    want = torch.fake_quantize_per_tensor_affine(t(A), 0.03, 128, 0, 255).numpy()
    np.testing.assert_allclose(got["restored"], want, rtol=1e-6)
