"""Compressed weights: each decompression against coremltools' own, from packed blobs of every type on disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from milpackages import coremltools, mb, numbers, package, tensor
from vlm_runtime.mil import Executor, open_package
from vlm_runtime.mil.explain import weights

Array = NDArray[Any]
RNG = np.random.default_rng(5)


def typed(values: Array, dtype: str) -> Array:
    """Numbers of a type below a byte, as coremltools knows them."""
    types = coremltools().converters.mil.mil.types
    return values.astype(types.nptype_from_builtin(types.string_to_builtin(dtype)))


def integers(dtype: str, shape: tuple[int, ...]) -> Array:
    bits = int(dtype.removeprefix("u").removeprefix("int"))
    low, high = (0, 1 << bits) if dtype.startswith("u") else (-(1 << bits - 1), 1 << bits - 1)
    return typed(RNG.integers(low, high, shape), dtype)


def blockwise(dtype: str, shape: tuple[int, ...], scales: tuple[int, ...], *, offset: bool, half: bool = True) -> Any:
    scale = numbers(scales, 1, 0.01).astype(np.float16 if half else np.float32)
    options = {"offset": integers(dtype, scales)} if offset else {}
    return mb().constexpr_blockwise_shift_scale(data=integers(dtype, shape), scale=scale, **options)


def palette(bits: int, groups: tuple[int, ...], vector: int = 1) -> Any:
    lut = numbers((*groups, 1 << bits, vector), 2).astype(np.float16)
    options = {"vector_axis": 0} if vector > 1 else {}
    return mb().constexpr_lut_to_dense(indices=integers(f"uint{bits}", (8, 12)), lut=lut, **options)


def sparse() -> Any:
    mask = integers("uint1", (9, 7))
    return mb().constexpr_sparse_to_dense(nonzero_data=numbers((int(mask.sum()),), 3).astype(np.float16), mask=mask)


def sparse_blockwise() -> Any:
    mask = integers("uint1", (8, 6))
    made = mb().constexpr_sparse_blockwise_shift_scale(
        data_mask=mask,
        nonzero_data=integers("int8", (int(mask.sum()),)),
        scale=numbers((8, 1), 4, 0.01).astype(np.float16),
        offset=integers("int8", (8, 1)),
    )
    return mb().constexpr_sparse_to_dense(nonzero_data=made[1], mask=made[0])


def sparse_palette() -> Any:
    mask = integers("uint1", (8, 6))
    made = mb().constexpr_lut_to_sparse(
        indices_mask=mask,
        indices_nonzero_data=integers("uint4", (int(mask.sum()),)),
        lut=numbers((2, 1, 16, 1), 2).astype(np.float16),
    )
    return mb().constexpr_sparse_to_dense(nonzero_data=made[1], mask=made[0])


def scaled_palette() -> Any:
    """A palette times a scale a row: one constexpr reads another."""
    return mb().constexpr_blockwise_shift_scale(data=palette(4, (2, 1)), scale=numbers((8, 1), 6).astype(np.float16))


def affine() -> Any:
    return mb().constexpr_affine_dequantize(
        quantized_data=integers("uint8", (6, 5)), zero_point=integers("uint8", (6,)), axis=0, scale=numbers((6,), 7)
    )


KINDS: dict[str, Callable[[], Any]] = {
    **{f"int8 {o}": lambda o=o: blockwise("int8", (6, 10), (6, 1), offset=o == "offset") for o in ("plain", "offset")},
    "int4 blocks": lambda: blockwise("int4", (6, 64), (6, 2), offset=False),
    "int4 odd count": lambda: blockwise("int4", (3, 5), (3, 1), offset=False),
    "uint4 blocks both ways": lambda: blockwise("uint4", (6, 64), (2, 4), offset=True),
    "int4 of a convolution": lambda: blockwise("int4", (4, 32, 1, 1), (4, 2, 1, 1), offset=False),
    "uint8 float32": lambda: blockwise("uint8", (6, 10), (6, 1), offset=True, half=False),
    **{f"palette of {bits} bits": lambda bits=bits: palette(bits, (1, 1)) for bits in (1, 2, 3, 4, 6, 8)},
    "palette a group of rows": lambda: palette(4, (4, 1)),
    "palette of vectors": lambda: palette(4, (1, 1), 2),
    "palette with scales": scaled_palette,
    "sparse": sparse,
    "sparse int8": sparse_blockwise,
    "sparse palette": sparse_palette,
    "iOS16 affine": affine,
}


@pytest.fixture(scope="module")
def decompressed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Array, Array]]:
    """Kind → what our executor and what coremltools makes of it: one package for each deployment target."""
    found = {}
    for target in ("iOS16", "iOS18"):
        kinds = [kind for kind in KINDS if ("iOS16" in kind) == (target == "iOS16")]
        theirs: list[Array] = []

        def build(x: Any, kinds: list[str] = kinds, theirs: list[Array] = theirs) -> list[Any]:
            products = []
            for i, kind in enumerate(kinds):
                weight = KINDS[kind]()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    theirs.append(np.asarray(weight.op.materialized_val_inference()))
                wide = weight.dtype == coremltools().converters.mil.mil.types.fp32
                products.append(mb().mul(x=x if wide else mb().cast(x=x, dtype="fp16"), y=weight, name=f"y{i}"))
            return products

        folder = tmp_path_factory.mktemp(target) / "p.mlpackage"
        package(folder, {"x": tensor((1,), "fp32")}, build, target=target)
        outputs = Executor(open_package(folder)).run({"x": np.ones(1, np.float32)}).outputs
        found |= {kind: (outputs[f"y{i}"], theirs[i]) for i, kind in enumerate(kinds)}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_decompressed_as_coremltools_does(kind: str, decompressed: dict[str, tuple[Array, Array]]) -> None:
    got, want = decompressed[kind]
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want.astype(np.float32), rtol=1e-3 if want.dtype == np.float16 else 1e-6)


FLOATS = {"fp16": np.float16, "fp32": np.float32}
STORED = (*FLOATS, "int8", "int16", "int32", "int4", "uint8", "uint16", *(f"uint{n}" for n in (1, 2, 3, 4, 6)))


def test_every_blob_and_immediate_is_what_coremltools_reads(tmp_path: Path) -> None:
    """Constants of 6 numbers are immediate, those of 77 in the weight file; coremltools' own reader is the truth."""
    from coremltools.converters.mil.frontend.milproto import load

    def build(x: Any) -> Any:
        for dtype in STORED:
            for count in (6, 77):
                made = numbers((count,), count).astype(FLOATS[dtype]) if dtype in FLOATS else integers(dtype, (count,))
                mb().const(val=made, name=f"{dtype}_{count}")
        return mb().identity(x=x)

    folder = package(tmp_path / "p.mlpackage", {"x": tensor((1,), "fp32")}, build)
    opened = open_package(folder)
    ours = {
        op.name: (op.attributes or {})["val"] for op in opened.functions["main"].block.operations if op.type == "const"
    }
    function = coremltools().models.utils.load_spec(str(folder)).mlProgram.functions["main"]
    context = load.TranscriptionContext(str(folder / "Data/com.apple.CoreML/weights"))
    compared = 0
    for op in function.block_specializations[function.opset].operations:
        if op.type == "const":
            theirs = np.asarray(load._load_value(context, op.attributes["val"]))
            got = np.asarray(opened.constant(ours[op.outputs[0].name]))
            np.testing.assert_array_equal(got, theirs.astype(got.dtype))
            compared += 1
    assert compared == 2 * len(STORED)
    assert weights(opened).tensors == dict.fromkeys(STORED, 1)


def test_functions_of_one_package_decode_equal_weights_once(tmp_path: Path) -> None:
    ct = coremltools()
    for name, rows in (("long", 4), ("short", 1)):

        def build(x: Any) -> Any:
            data = typed(np.arange(512).reshape(8, 64) % 15 - 7, "int4")
            scale = numbers((8, 2), 1, 0.01).astype(np.float16)
            return mb().linear(x=x, weight=mb().constexpr_blockwise_shift_scale(data=data, scale=scale), name="y")

        package(tmp_path / f"{name}.mlpackage", {"x": tensor((rows, 64))}, build)
    merged = ct.utils.MultiFunctionDescriptor()
    for name in ("long", "short"):
        merged.add_function(str(tmp_path / f"{name}.mlpackage"), "main", name)
    merged.default_function_name = "long"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ct.utils.save_multifunction(merged, str(tmp_path / "both.mlpackage"))
    executor = Executor(open_package(tmp_path / "both.mlpackage"))
    x = numbers((4, 64), 8)
    long = executor.run({"x": x}).outputs["y"]
    short = executor.run({"x": x[2:3]}, function="short").outputs["y"]
    np.testing.assert_allclose(short, long[2:3], rtol=2e-3, atol=1e-4)
    decoded = [value for value in executor._constants._decoded.values() if isinstance(value, np.ndarray)]
    assert sum(value.shape == (8, 64) for value in decoded) == 1
