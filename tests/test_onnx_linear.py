"""One linear layer at every precision, run by ONNX Runtime against the weights it was given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from vlm_export.onnx import linear
from vlm_export.onnx.graph import Graph
from vlm_export.onnx.linear import Linears, Weight
from vlm_models.errors import RecipeError
from vlm_quant import affine
from vlm_quant.recipe import Precision

RNG = np.random.default_rng(3)
PRECISIONS = ("fp32", "fp16", "int8", "int4")


def built(path: Path, w: np.ndarray, bias: np.ndarray | None, precision: Precision, *, head: bool = False) -> Graph:
    """A graph of one layer: x (1, rows, columns) → y."""
    with Graph(path, "layer") as graph:
        graph.input("x", TensorProto.FLOAT, (1, "rows", w.shape[1]))
        linears = Linears(graph, precision)
        emit = linears.emit_head if head else linears.emit
        emit("x", Weight("layer", *w.shape, lambda start, stop: w[start:stop], bias), "y")
        graph.output("y", TensorProto.FLOAT, (1, "rows", w.shape[0]))
        graph.save({"vlm.part": "test"})
    return graph


def run(path: Path, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x[None]})[0])[0]


def stored(w: np.ndarray, precision: Precision, *, head: bool = False) -> np.ndarray:
    """The weights as the graph holds them."""
    if head and precision.weights in ("int8", "int4"):
        return affine.dequantize_int8_groups(affine.quantize_int8_groups(w, linear.HEAD_GROUP), w.shape[1])
    if precision.weights == "int8":
        return affine.dequantize_int8(affine.quantize_int8(w))
    if precision.weights == "int4":
        return affine.dequantize_int4(affine.quantize_int4(w, precision.group_size), w.shape[1])
    return w.astype(np.float16 if precision.weights == "fp16" else np.float32).astype(np.float32)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("head", [False, True], ids=["layer", "head"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("columns", [64, 50])
@pytest.mark.parametrize("weights", PRECISIONS)
def test_a_layer_computes_with_the_weights_that_it_stores(
    tmp_path: Path, weights: str, columns: int, bias: bool, head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "CHUNK", 32)  # several chunks, the last one short
    precision = Precision(weights)  # type: ignore[arg-type]
    w = RNG.standard_normal((80, columns)).astype(np.float32)
    b = RNG.standard_normal(80).astype(np.float32) * 5 if bias else None
    x = RNG.standard_normal((7, columns)).astype(np.float32)
    built(tmp_path / "layer.onnx", w, b, precision, head=head)
    want = x @ stored(w, precision, head=head).T + (0 if b is None else b)
    assert relative(run(tmp_path / "layer.onnx", x), want) < (1e-6 if weights.startswith("fp") else 0.01)


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
def test_every_int4_group_size_is_one_that_onnx_runtime_runs(tmp_path: Path, group: int) -> None:
    w, x = (RNG.standard_normal((n, 300)).astype(np.float32) for n in (24, 3))
    precision = Precision("int4", group)
    built(tmp_path / "layer.onnx", w, None, precision)
    assert relative(run(tmp_path / "layer.onnx", x), x @ stored(w, precision).T) < 0.02


def test_int8_rounds_each_row_on_its_own(tmp_path: Path) -> None:
    """A row of outliers (an attention sink) must not cost the others their digits, nor a chunk its neighbours."""
    w, x = (RNG.standard_normal((n, 64)).astype(np.float32) for n in (48, 6))
    x[0] *= 1e4
    x[1] = 0
    built(tmp_path / "layer.onnx", w, None, Precision("int8"))
    together = run(tmp_path / "layer.onnx", x)
    want = x @ stored(w, Precision("int8")).T
    assert all(relative(together[i], want[i]) < 0.02 for i in (0, 2, 3, 4, 5))
    assert not together[1].any()
    assert np.array_equal(run(tmp_path / "layer.onnx", x[3:4])[0], together[3])


def test_layers_that_read_the_same_rows_share_their_rounding(tmp_path: Path) -> None:
    w = RNG.standard_normal((8, 32)).astype(np.float32)
    with Graph(tmp_path / "layers.onnx", "layers") as graph:
        graph.input("x", TensorProto.FLOAT, (1, "rows", 32))
        linears = Linears(graph, Precision("int8"))
        for name in "ab":
            linears.emit("x", Weight(name, 8, 32, lambda start, stop: w[start:stop]), f"y.{name}")
            graph.output(f"y.{name}", TensorProto.FLOAT, (1, "rows", 8))
        graph.save({})
    operators = [node.op_type for node in graph.nodes]
    assert operators.count("ReduceMax") == 1
    assert operators.count("MatMulIntegerToFloat") == 2
    assert linears.tally.details()["linears"] == {"int8": 2}


def test_a_weight_beyond_fp16_is_refused_by_name(tmp_path: Path) -> None:
    w = np.full((4, 8), 1e5, np.float32)
    with pytest.raises(RecipeError, match=r"layer.weight reaches 1e\+05, beyond fp16"):
        built(tmp_path / "layer.onnx", w, None, Precision("fp16"))


@pytest.mark.parametrize(("weights", "bits"), [("fp32", 32), ("fp16", 16), ("int8", 8), ("int4", 5)])
def test_the_file_is_as_small_as_the_precision_promises(tmp_path: Path, weights: str, bits: int) -> None:
    w = RNG.standard_normal((512, 512)).astype(np.float32)
    graph = built(tmp_path / "layer.onnx", w, None, Precision(weights))  # type: ignore[arg-type]
    size = graph.data_path.stat().st_size
    assert size == graph.size
    assert w.size * bits / 8 <= size <= w.size * bits / 8 + 12_000


def test_large_tensors_start_on_a_page_and_stay_outside_the_graph(tmp_path: Path) -> None:
    w = RNG.standard_normal((64, 64)).astype(np.float32)
    built(tmp_path / "layer.onnx", w, None, Precision("fp32"))
    model = onnx.load(tmp_path / "layer.onnx", load_external_data=False)
    (tensor,) = model.graph.initializer
    entries = {entry.key: entry.value for entry in tensor.external_data}
    assert entries["location"] == "layer.onnx.data"
    assert int(entries["offset"]) % 4096 == 0
    assert (tmp_path / "layer.onnx").stat().st_size < 1000
    assert {p.key: p.value for p in model.metadata_props} == {"vlm.part": "test"}
