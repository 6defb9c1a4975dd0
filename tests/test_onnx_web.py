"""`--web`: the same integers in operators that onnxruntime-web runs fast in WebAssembly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

import vlm_export
from vlm_export.onnx import linear
from vlm_export.onnx.graph import Graph
from vlm_export.onnx.linear import Linears, Weight
from vlm_models.errors import InputError
from vlm_quant import affine
from vlm_quant.recipe import Precision
from vlm_runtime.manifest import read_manifest

RNG = np.random.default_rng(5)


def run(
    folder: Path, w: np.ndarray, bias: np.ndarray | None, precision: Precision, x: np.ndarray, *, head: bool, web: bool
) -> np.ndarray:
    """One layer, written for a browser or not, run here."""
    path = folder / f"{'web' if web else 'native'}.onnx"
    with Graph(path, "layer") as graph:
        graph.input("x", TensorProto.FLOAT, (1, "rows", w.shape[1]))
        linears = Linears(graph, precision, web=web)
        emit = linears.emit_head if head else linears.emit
        emit("x", Weight("layer", *w.shape, lambda start, stop: w[start:stop], bias), "y")
        graph.output("y", TensorProto.FLOAT, (1, "rows", w.shape[0]))
        graph.save({})
    assert ("MatMulNBits" in {node.op_type for node in graph.nodes}) is not web
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x[None]})[0])[0]


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (7, 50), (1030, 160), (1537, 96)])
def test_four_bit_layers_give_what_their_integers_stand_for(
    tmp_path: Path, rows: int, columns: int, bias: bool, group: int
) -> None:
    precision = Precision("int4", group)
    w, x = (RNG.standard_normal((n, columns)).astype(np.float32) for n in (rows, 5))
    w += 0.5  # zero points are not in the middle
    b = RNG.standard_normal(rows).astype(np.float32) if bias else None
    stored = affine.dequantize_int4(affine.quantize_int4(w, group), columns)
    got = run(tmp_path, w, b, precision, x, head=False, web=True)
    assert relative(got, x @ stored.T + (0 if b is None else b)) < 0.01
    assert relative(got, run(tmp_path, w, b, precision, x, head=False, web=False)) < 2e-3


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("columns", [128, 200])
def test_the_head_is_the_same_eight_bits_without_rounding_of_what_it_reads(
    tmp_path: Path, columns: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "CHUNK", 32)  # several chunks, the last one short
    w, x = (RNG.standard_normal((n, columns)).astype(np.float32) for n in (75, 3))
    b = RNG.standard_normal(75).astype(np.float32) if bias else None
    stored = affine.dequantize_int8_groups(affine.quantize_int8_groups(w, linear.HEAD_GROUP), columns)
    got = run(tmp_path, w, b, Precision("int8"), x, head=True, web=True)
    assert relative(got, x @ stored.T + (0 if b is None else b)) < 1e-6


def test_the_file_stays_as_small(tmp_path: Path) -> None:
    w = RNG.standard_normal((1024, 1024)).astype(np.float32)
    run(tmp_path, w, None, Precision("int4"), w[:1], head=False, web=True)
    run(tmp_path, w, None, Precision("int4"), w[:1], head=False, web=False)
    sizes = [(tmp_path / f"{name}.onnx.data").stat().st_size for name in ("web", "native")]
    assert sizes[0] < 1.06 * sizes[1]


def test_layers_that_read_the_same_rows_share_their_rounding(tmp_path: Path) -> None:
    w = RNG.standard_normal((8, 64)).astype(np.float32)
    with Graph(tmp_path / "layers.onnx", "layers") as graph:
        graph.input("x", TensorProto.FLOAT, (1, "rows", 64))
        linears = Linears(graph, Precision("int4"), web=True)
        for name in "ab":
            linears.emit("x", Weight(name, 8, 64, lambda start, stop: w[start:stop]), f"y.{name}")
            graph.output(f"y.{name}", TensorProto.FLOAT, (1, "rows", 8))
        graph.save({})
    operators = [node.op_type for node in graph.nodes]
    assert (operators.count("ReduceMax"), operators.count("MatMulIntegerToFloat")) == (1, 2)


def test_a_bundle_for_a_browser_passes_parity_and_says_what_is_different(tiny: Path, tmp_path: Path) -> None:
    manifest = vlm_export.export(tiny, "onnx", tmp_path / "web", precision="int4", web=True)
    assert manifest.parity["onnx"]["passed"]
    part = read_manifest(tmp_path / "web").parts["language_model"]["onnx"]
    assert part.details["web"] is True
    assert any("written for WebAssembly" in note for note in part.details["notes"])
    graph = onnx.load(tmp_path / "web" / part.graph, load_external_data=False).graph
    assert "MatMulNBits" not in {node.op_type for node in graph.node}


def test_web_without_an_onnx_graph_to_write_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--web is for target 'onnx' in a new bundle"):
        vlm_export.export(tiny, "gguf", tmp_path / "bundle", web=True)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(("weights", "head"), [("fp32", False), ("fp16", True), ("int8", False)])
def test_what_runs_fast_in_a_browser_stays_as_it_is(tmp_path: Path, weights: str, head: bool) -> None:
    w = RNG.standard_normal((40, 64)).astype(np.float32)
    contents = []
    for web in (False, True):
        with Graph(tmp_path / "layer.onnx", "layer") as graph:
            graph.input("x", TensorProto.FLOAT, (1, "rows", 64))
            linears = Linears(graph, Precision(weights), web=web)  # type: ignore[arg-type]
            emit = linears.emit_head if head else linears.emit
            graph.output(emit("x", Weight("layer", *w.shape, lambda *rows: w[slice(*rows)]), "y"), 1, (1, "rows", 40))
            graph.save({})
        contents.append((graph.path.read_bytes(), graph.data_path.read_bytes()))
    assert contents[0] == contents[1]
