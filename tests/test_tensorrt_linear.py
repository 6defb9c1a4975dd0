"""One linear layer as TensorRT reads it, at every precision: run by ONNX Runtime, and built by TensorRT-RTX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tensorrt_rtx as trt

from vlm_export.onnx import linear as streaming
from vlm_export.onnx.graph import Graph
from vlm_export.onnx.linear import Weight
from vlm_export.tensorrt.check_graph import write_check_graph
from vlm_export.tensorrt.linear import FP8_MAX, Linears, compute_type
from vlm_models.errors import RecipeError
from vlm_models.grid import Grid
from vlm_quant.blockwise import dequantize_blocks, quantize_blocks
from vlm_quant.grid import values
from vlm_quant.recipe import Precision, parse_recipe

RNG = np.random.default_rng(3)
RANGES = {"layer": (-3.0, 3.5), "lm_head": (-3.0, 3.5)}
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4:g32", "w8a8", "fp8")


def precision(text: str) -> Precision:
    return parse_recipe(f"language={text}").language


def built(
    path: Path,
    w: np.ndarray,
    text: str,
    bias: np.ndarray | None = None,
    *,
    name: str = "layer",
    head: bool = False,
    grid: Grid | None = None,
) -> Linears:
    """A graph of one layer: x (1, rows, columns) → y."""
    with Graph(path, "layer") as graph:
        linears = Linears(graph, precision(text), RANGES)
        graph.input("x", linears.onnx, (1, "rows", w.shape[1]))
        emit = linears.emit_head if head else linears.emit
        emit("x", Weight(name, *w.shape, lambda start, stop: w[start:stop], bias, grid=grid), "y")
        graph.output("y", linears.onnx, (1, "rows", w.shape[0]))
        graph.save({})
    return linears


def run(path: Path, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    # Otherwise ONNX Runtime rounds the rows that meet integer weights to 8 bits too, which TensorRT does not.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    dtype = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
    return np.asarray(session.run(None, {"x": x[None].astype(dtype)})[0])[0].astype(np.float32)


def stored(w: np.ndarray, text: str) -> np.ndarray:
    """The weights as the graph holds them."""
    if text in ("int8", "w8a8"):
        return dequantize_blocks(*quantize_blocks(w, w.shape[1], 8, np.float16))
    if text.startswith("int4"):
        return dequantize_blocks(*quantize_blocks(w, 32, 4, np.float16))
    if text == "fp8":
        scale = np.float32(np.float16(np.abs(w).max() / FP8_MAX))
        return (w / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    types = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
    return w.astype(types[text]).astype(np.float32)


def given(x: np.ndarray, text: str) -> np.ndarray:
    """x as the product sees it."""
    if text == "w8a8":
        scale = np.float32(np.float16(3.5 / 127))
        return np.clip(np.rint(x / scale), -128, 127) * scale
    if text == "fp8":
        scale = np.float32(np.float16(3.5 / FP8_MAX))
        return np.clip(x / scale, -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    return x


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("text", PRECISIONS)
def test_a_layer_computes_with_the_weights_and_the_rounding_that_its_precision_says(
    tmp_path: Path, text: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "CHUNK", 32)  # several chunks, the last one short
    w = RNG.standard_normal((80, 64)).astype(np.float32)
    b = RNG.standard_normal(80).astype(np.float32) * 5 if bias else None
    x = RNG.standard_normal((7, 64)).astype(np.float16).astype(np.float32)
    path = tmp_path / "layer.onnx"
    built(path, w, text, b)
    path = write_check_graph(path) if text in ("bf16", "fp8") else path
    want = given(x, text) @ stored(w, text).T + (0 if b is None else b)
    bound = {"fp32": 1e-6, "bf16": 6e-3}.get(text, 1e-3)  # of one rounding of y, and at bf16 of x
    assert relative(run(path, x), want) < bound


@pytest.mark.parametrize("text", PRECISIONS)
def test_only_standard_operators_of_few_kinds_are_written(tmp_path: Path, text: str) -> None:
    built(tmp_path / "layer.onnx", RNG.standard_normal((64, 64)).astype(np.float32), text)
    model = onnx.load(tmp_path / "layer.onnx", load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]
    wanted: dict[str, dict[str, int]] = {
        "w8a8": {"QuantizeLinear": 1, "DequantizeLinear": 2},
        "fp8": {"QuantizeLinear": 1, "DequantizeLinear": 2},
        "int8": {"DequantizeLinear": 1},
        "int4:g32": {"DequantizeLinear": 1},
    }
    assert operators(tmp_path / "layer.onnx") == {"MatMul": 1, **wanted.get(text, {})}


@pytest.mark.parametrize(
    ("asked", "columns", "rows", "found", "why"),
    [
        (128, 256, 64, "int4:g128", ""),
        (128, 576, 64, "int4:g64", "128 does not divide 576 inputs"),
        (256, 512, 64, "int4:g128", "128 is the largest"),
        (32, 72, 64, "int8", "no group of int4 divides 72 inputs"),
        (32, 64, 63, "int8", "63 outputs are odd"),
    ],
)
def test_a_group_that_does_not_divide_gives_way_to_one_that_does_and_is_reported(
    tmp_path: Path, asked: int, columns: int, rows: int, found: str, why: str
) -> None:
    w = RNG.standard_normal((rows, columns)).astype(np.float32)
    linears = built(tmp_path / "layer.onnx", w, f"int4:g{asked}")
    details = linears.tally.details()
    assert details["linears"] == {found: 1}
    assert details["kept"] == ({"layer": f"{found}: {why}"} if why else {})
    x = RNG.standard_normal((3, columns)).astype(np.float32)
    assert relative(run(tmp_path / "layer.onnx", x), x @ w.T) < 0.2


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("int4", "int8"),
        ("int8", "int8"),
        ("w8a8", "int8"),
        ("fp8", "int8"),
        ("fp16", "fp16"),
        ("int4;lm_head=fp16", "fp16"),
        ("int4;lm_head=int4:g64", "int4:g64"),
        ("bf16;lm_head=fp16", "bf16"),
    ],
)
def test_the_head_of_an_integer_part_has_int8_weights_unless_a_rule_says_otherwise(
    tmp_path: Path, text: str, found: str
) -> None:
    w = RNG.standard_normal((64, 64)).astype(np.float32)
    linears = built(tmp_path / "layer.onnx", w, text, name="lm_head", head=True)
    assert linears.tally.linears == {found: 1}
    assert operators(tmp_path / "layer.onnx")["QuantizeLinear"] == 0


def on_grid(rows: int, columns: int, bits: int, group: int, *, zeros: bool = False) -> tuple[np.ndarray, Grid]:
    """Integers of a quantizer, whose largest one says nothing of the scale."""
    top = 2 ** (bits - 1)
    numbers = RNG.integers(-top + (bits == 8), top, (rows, columns)) // 2
    scales = np.exp(RNG.normal(-4, 0.5, (rows, columns // group))).astype(np.float32)
    return numbers, Grid(bits, group, scales, np.full(scales.shape, 3, np.uint8) if zeros else None)


def digits(path: Path) -> np.ndarray:
    """The integers of a layer's weight (rows, columns)."""
    (tensor,) = (t for t in onnx.load(path).graph.initializer if t.name == "layer.weight")
    return np.asarray(onnx.numpy_helper.to_array(tensor)).astype(np.int16).T


@pytest.mark.parametrize(
    ("text", "bits", "group"),
    [
        ("int4:g32", 4, 32),
        ("int4:g32", 4, 128),  # a scale for 128 columns is one for each 32 of them
        ("int4:g256", 4, 256),
        ("int8", 8, 256),
        ("w8a8", 8, 256),
        ("bf16;layer=int4:g32", 4, 32),
        ("fp32;layer=int8", 8, 256),
    ],
)
def test_a_quantizers_integers_are_packed_as_they_are(
    tmp_path: Path, text: str, bits: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "CHUNK", 32)
    numbers, grid = on_grid(80, 256, bits, group)
    w = values(numbers, grid)
    linears = built(tmp_path / "layer.onnx", w, text, grid=grid)
    assert (linears.tally.grids, linears.tally.rounded_again) == (1, [])
    np.testing.assert_array_equal(digits(tmp_path / "layer.onnx"), numbers)
    assert not np.array_equal(numbers, np.round(w / np.abs(w).max(1, keepdims=True) * (2 ** (bits - 1) - 1)))
    x = RNG.standard_normal((5, 256)).astype(np.float32)
    if text in ("int4:g32", "int8"):
        assert relative(run(tmp_path / "layer.onnx", x), x @ w.T) < 1e-3


@pytest.mark.parametrize(
    ("text", "bits", "group", "zeros"),
    [("int4:g64", 4, 32, False), ("int4:g32", 4, 32, True), ("int8", 8, 64, False), ("w8a8", 4, 256, False)],
)
def test_a_grid_that_has_no_such_form_is_rounded_again_and_named(
    tmp_path: Path, text: str, bits: int, group: int, zeros: bool
) -> None:
    numbers, grid = on_grid(16, 256, bits, group, zeros=zeros)
    linears = built(tmp_path / "layer.onnx", values(numbers, grid), text, grid=grid)
    details = linears.tally.details()
    assert (details["grids"], details["rounded_again"]) == (0, ["layer"])


def test_layers_that_stay_in_floats_and_the_head_are_listed_with_the_reason(tmp_path: Path) -> None:
    w = RNG.standard_normal((64, 64)).astype(np.float32)
    for text, reason in (("int4;layer=fp32", "fp32: asked for"), ("w8a8;layer=fp16", "fp16: asked for"), ("int8", "")):
        found = built(tmp_path / "layer.onnx", w, text).tally.kept.get("layer", "")
        assert found.startswith(reason), text
        assert bool(found) is bool(reason)
    for text, reason in (("int4", "int8: its errors count most"), ("fp8", "int8: its errors count most"), ("int8", "")):
        found = built(tmp_path / "layer.onnx", w, text, name="lm_head", head=True).tally.kept.get("lm_head", "")
        assert found.startswith(reason), text
        assert bool(found) is bool(reason)


def test_a_rule_keeps_a_layer_at_float32_in_a_part_of_fewer_bits(tmp_path: Path) -> None:
    w, x = RNG.standard_normal((64, 64)).astype(np.float32), RNG.standard_normal((3, 64)).astype(np.float16)
    bias = RNG.standard_normal(64).astype(np.float32)
    linears = built(tmp_path / "layer.onnx", w, "int4;layer=fp32", bias)
    assert linears.tally.linears == {"fp32": 1}
    assert operators(tmp_path / "layer.onnx") == {"Cast": 2, "MatMul": 1, "Add": 1}
    assert relative(run(tmp_path / "layer.onnx", x.astype(np.float32)), x.astype(np.float32) @ w.T + bias) < 5e-4


def test_layers_that_read_the_same_rows_share_their_rounding(tmp_path: Path) -> None:
    w = RNG.standard_normal((8, 32)).astype(np.float32)
    with Graph(tmp_path / "layers.onnx", "layers") as graph:
        linears = Linears(graph, precision("w8a8"), {"a": (-1, 1), "b": (-1, 1)})
        graph.input("x", linears.onnx, (1, "rows", 32))
        for name in "ab":
            linears.emit("x", Weight(name, 8, 32, lambda start, stop: w[start:stop]), f"y.{name}")
            graph.output(f"y.{name}", linears.onnx, (1, "rows", 8))
        graph.save({})
    assert operators(tmp_path / "layers.onnx") == {"QuantizeLinear": 1, "DequantizeLinear": 3, "MatMul": 2}


def test_rounding_without_a_range_and_weights_beyond_fp16_are_refused_by_name(tmp_path: Path) -> None:
    w = np.full((4, 8), 1e5, np.float32)
    with Graph(tmp_path / "layer.onnx", "layer") as graph, pytest.raises(RecipeError, match="range of what layer is"):
        Linears(graph, precision("w8a8")).emit("x", Weight("layer", 4, 8, lambda *_: w), "y")
    for text in ("fp16", "int8"):
        with pytest.raises(RecipeError, match=r"layer.weight reaches 1e\+05, beyond fp16"):
            built(tmp_path / "layer.onnx", w, text)
    built(tmp_path / "layer.onnx", w, "bf16")


@pytest.mark.parametrize("text", PRECISIONS)
def test_a_row_of_zeros_and_one_of_tiny_weights_stay_numbers(tmp_path: Path, text: str) -> None:
    w = RNG.standard_normal((4, 64)).astype(np.float32)
    w[1], w[2] = 0, w[2] * 1e-6
    built(tmp_path / "layer.onnx", w, text)
    path = write_check_graph(tmp_path / "layer.onnx") if text in ("bf16", "fp8") else tmp_path / "layer.onnx"
    x = RNG.standard_normal((3, 64)).astype(np.float32)
    y = run(path, x)
    assert np.isfinite(y).all()
    assert not y[:, 1].any()
    assert np.abs(y[:, 2]).max() < 1e-3 * np.abs(y[:, 0]).max()


@pytest.mark.parametrize(("text", "bits"), [("fp32", 32), ("bf16", 16), ("int8", 8), ("int4:g128", 4.2), ("fp8", 8)])
def test_the_file_is_as_small_as_the_precision_promises(tmp_path: Path, text: str, bits: float) -> None:
    w = RNG.standard_normal((512, 512)).astype(np.float32)
    size = built(tmp_path / "layer.onnx", w, text).graph.data_path.stat().st_size
    assert w.size * bits / 8 <= size + 12_000
    assert size <= w.size * bits / 8 + 12_000


def engine_bytes(path: Path, capability: str, columns: int) -> int:
    """Bytes of the engine that TensorRT-RTX builds, 0 where it refuses."""
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse_from_file(str(path))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("x", (1, 1, columns), (1, 1, columns), (1, 32, columns))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    engine = builder.build_serialized_network(network, config)
    return 0 if engine is None else int(engine.nbytes)


@pytest.mark.parametrize("text", ["fp32", "fp16", "bf16", "int8", "int4:g128", "int4:g32", "w8a8", "fp8"])
def test_tensorrt_builds_the_layer_and_keeps_its_weights_as_small_as_they_are_given(tmp_path: Path, text: str) -> None:
    size = 2048
    w = RNG.standard_normal((size, size)).astype(np.float32)
    built(tmp_path / "layer.onnx", w, text)
    scales = size * (size // int(text.removeprefix("int4:g"))) * 2 if text.startswith("int4") else 0
    bits = {"fp32": 32, "fp16": 16, "bf16": 16}.get(text, 4 if scales else 8)
    for capability in ("SM89", "SM120"):
        found = engine_bytes(tmp_path / "layer.onnx", capability, size)
        assert 0 < found < size * size * bits / 8 + scales + 1_000_000, capability


def test_the_type_in_which_a_part_computes_is_its_own_or_fp16() -> None:
    asked: Callable[[str], Any] = lambda text: compute_type(precision(text))  # noqa: E731
    assert [asked(text) for text in PRECISIONS] == ["fp32", "fp16", "bf16", "fp16", "fp16", "fp16", "fp16"]
