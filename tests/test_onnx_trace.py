"""Traced vision encoders and projectors: right for any batch, every weight matmul at its precision, no dead layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from conftest import MakeTiny
from vlm_export.target import Job
from vlm_export.targets.onnx import build
from vlm_models.model import Model, load_model
from vlm_quant.recipe import parse_recipe
from vlm_runtime.manifest import Part

SIGLIP: dict[str, Any] = {"tower": "siglip", "strategy": "full", "feature_layer": -1, "dtype": "bfloat16"}
LIST: dict[str, Any] = {"feature_layer": [-2, -1], "projector_bias": False}


def exported(model: Model, folder: Path, weights: str) -> Mapping[str, Part]:
    recipe = parse_recipe(f"vision={weights},projector={weights}")
    return build(Job(model, recipe, folder, 32, ("vision_encoder", "projector", "language_model")))


def run(folder: Path, part: str, feed: str, values: torch.Tensor) -> np.ndarray:
    session = ort.InferenceSession(str(folder / f"onnx/{part}.onnx"), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {feed: values.numpy()})[0])


def relative(got: np.ndarray, want: torch.Tensor) -> float:
    return float(np.linalg.norm(got - want.numpy()) / np.linalg.norm(want.numpy()))


@pytest.mark.parametrize(
    ("options", "weights", "bound"),
    [
        ({}, "fp32", 1e-6),
        (SIGLIP, "fp32", 1e-6),
        (LIST, "fp32", 1e-6),
        ({}, "fp16", 1e-3),
        ({}, "int8", 0.03),
        (SIGLIP, "int8", 0.03),
        ({}, "int4", 0.25),
    ],
    ids=["clip", "siglip", "two-layers", "clip-fp16", "clip-int8", "siglip-int8", "clip-int4"],
)
def test_features_and_projected_rows_are_those_of_the_checkpoint(
    make_tiny: MakeTiny,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    options: dict[str, Any],
    weights: str,
    bound: float,
) -> None:
    model = load_model(make_tiny(**options))
    capfd.readouterr()
    parts = exported(model, tmp_path, weights)
    assert capfd.readouterr() == ("", ""), "the exporter's noise reached the user"
    size = model.spec.vision.image_size
    for count in (1, 3):
        pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            features = model.vision_encoder()(pixels)
            rows = model.projector()(features)
        assert relative(run(tmp_path, "vision_encoder", "pixel_values", pixels), features) < bound
        assert relative(run(tmp_path, "projector", "image_features", features), rows) < bound
    for part in ("vision_encoder", "projector"):
        onnx.checker.check_model(tmp_path / parts[part].graph)
        assert parts[part].precision == str(parse_recipe(f"vision={weights}").vision)


@pytest.mark.parametrize(("weights", "operator"), [("int8", "MatMulIntegerToFloat"), ("int4", "MatMulNBits")])
def test_every_weight_matmul_is_quantized_and_the_unused_layer_is_not_in_the_file(
    make_tiny: MakeTiny, tmp_path: Path, weights: str, operator: str
) -> None:
    model = load_model(make_tiny())
    parts = exported(model, tmp_path, weights)
    graph = onnx.load(tmp_path / "onnx/vision_encoder.onnx", load_external_data=False).graph
    operators = Counter(node.op_type for node in graph.node)
    # feature layer -2 of three: two live layers of q, k, v, out, fc1, fc2.
    assert operators[operator] == 12
    constants = {tensor.name for tensor in graph.initializer}
    assert not any(n.op_type in ("MatMul", "Gemm") and set(n.input) & constants for n in graph.node)
    details = parts["vision_encoder"].details
    assert details["linears"] == {str(parse_recipe(f"vision={weights}").vision): 12}
    assert list(details["kept"]) == ["tower.embeddings.patch_embedding.weight"]
    assert not any("layers.2." in name or "post_layernorm" in name for name in constants)
    live = sum(p.numel() for n, p in model.vision_encoder().named_parameters() if "layers.2." not in n)
    assert (tmp_path / "onnx/vision_encoder.onnx.data").stat().st_size < live * 2.5


@pytest.mark.parametrize("options", [{}, SIGLIP], ids=["clip", "siglip"])
def test_attention_of_towers_is_one_operator_from_projections_to_projection(
    make_tiny: MakeTiny, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Heads that are turned apart, and scores that are written out, cost a tenth of the tower's attention."""
    exported(load_model(make_tiny(**options)), tmp_path, "fp32")
    graph = onnx.load(tmp_path / "onnx/vision_encoder.onnx", load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["MultiHeadAttention"] > 0
    assert kinds["Attention"] == 0
    assert not [n for n in graph.node for a in n.attribute if a.name == "perm" and list(a.ints) == [0, 2, 1, 3]]


def test_a_picture_does_not_change_its_neighbours_at_int8(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model = load_model(make_tiny())
    exported(model, tmp_path, "int8")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    pixels[1] *= 50
    both = run(tmp_path, "vision_encoder", "pixel_values", pixels)
    alone = run(tmp_path, "vision_encoder", "pixel_values", pixels[:1])
    assert relative(both[:1], torch.from_numpy(alone)) < 1e-3
