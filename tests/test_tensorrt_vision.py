"""Vision parts for TensorRT: right at every precision, in one float type, of standard operators, and buildable."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import nn

from conftest import MakeTiny
from vlm_export.onnx.trace import traced_graph
from vlm_export.tensorrt import vision
from vlm_export.tensorrt.build import build_engines
from vlm_export.tensorrt.vision import NAMES, EncoderPart, vision_part
from vlm_models.errors import RecipeError
from vlm_models.model import Model, load_model
from vlm_quant.recipe import parse_recipe
from vlm_runtime.manifest import Part

CLIP: dict[str, Any] = {}
SIGLIP: dict[str, Any] = {"tower": "siglip", "strategy": "full", "feature_layer": -1, "dtype": "bfloat16"}
LIST: dict[str, Any] = {"feature_layer": [-2, -1], "projector_bias": False}
TOWERS = {"clip": CLIP, "siglip": SIGLIP, "two-layers": LIST}
# Least cosine of features and of projected rows on random weights, which round worse than trained ones.
LIMITS = {"fp32": 1 - 1e-9, "fp16": 0.9999, "bf16": 0.9999, "int8": 0.999, "w8a8": 0.999, "fp8": 0.99, "int4:g16": 0.98}
ROUNDED = ("w8a8", "fp8")
PARTS: tuple[EncoderPart, ...] = ("vision_encoder", "projector")
Floats = NDArray[np.float32]


@pytest.fixture(autouse=True, scope="module")
def traced_once() -> Iterator[None]:
    """The same module is traced once for all precisions: tracing takes seconds, the rest of an export does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "traced_graph", functools.cache(traced_graph))
        yield


@pytest.fixture(scope="module")
def models(make_tiny: MakeTiny) -> Callable[[str], Model]:
    return functools.cache(lambda tower: load_model(make_tiny(**TOWERS[tower])))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tensorrt").mkdir()
    return tmp_path / "tensorrt"


def pictures(model: Model, count: int = 3) -> torch.Tensor:
    size = model.spec.vision.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def module(model: Model, part: EncoderPart) -> nn.Module:
    return model.vision_encoder() if part == "vision_encoder" else model.projector()


def inputs(model: Model, part: EncoderPart, count: int = 3) -> torch.Tensor:
    with torch.inference_mode():
        return pictures(model, count) if part == "vision_encoder" else model.vision_encoder()(pictures(model, count))


def given(layers: nn.Module, x: torch.Tensor, limit: float = np.inf) -> dict[str, tuple[float, float]]:
    """The range of what each linear layer is given for x, cut at `limit`."""
    ranges: dict[str, tuple[float, float]] = {}
    hooks = []
    for name, layer in layers.named_modules():
        if isinstance(layer, nn.Linear):

            def hook(layer: nn.Module, args: Any, name: str = name) -> None:
                ranges[name] = max(-limit, float(args[0].min())), min(limit, float(args[0].max()))

            hooks.append(layer.register_forward_pre_hook(hook))
    with torch.inference_mode():
        layers(x)
    for handle in hooks:
        handle.remove()
    return ranges


def exported(model: Model, part: EncoderPart, kind: str, folder: Path, limit: float = np.inf) -> Part:
    ranges = given(module(model, part), inputs(model, part), limit) if kind in ROUNDED else None
    return vision_part(model, part, parse_recipe(f"vision={kind}").vision, folder, ranges=ranges)


def run(folder: Path, part: Part, x: torch.Tensor) -> Floats:
    io = cast(Mapping[str, str], part.details["io"])
    path = folder.parent / io.get("check_graph", part.graph)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return np.asarray(result)


def cosine(a: Floats, b: torch.Tensor) -> float:
    x, y = a.astype(np.float64).ravel(), b.double().numpy().ravel()
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("tower", TOWERS)
def test_features_and_rows_are_those_of_the_checkpoint(
    models: Callable[[str], Model], folder: Path, tower: str, kind: str
) -> None:
    model = models(tower)
    for part in PARTS:
        made = exported(model, part, kind, folder)
        for count in (1, 3):
            x = inputs(model, part, count)
            got = run(folder, made, x)
            with torch.inference_mode():
                want = module(model, part)(x)
            assert got.dtype == np.float32
            assert got.shape == tuple(want.shape)
            assert cosine(got, want) >= LIMITS[kind], (part, count)
        assert made.precision == kind
        assert sum(cast(dict[str, int], made.details["linears"]).values()) == made.details["linears"][kind]


@pytest.mark.parametrize("kind", LIMITS)
def test_the_graph_is_standard_and_of_one_float_type(models: Callable[[str], Model], folder: Path, kind: str) -> None:
    """TensorRT's networks are strongly typed: one product of two types is refused."""
    own = {"fp32": TensorProto.FLOAT, "bf16": TensorProto.BFLOAT16}.get(kind, TensorProto.FLOAT16)
    for part in PARTS:
        made = exported(models("clip"), part, kind, folder)
        graph = onnx.load(folder / f"{part}.onnx", load_external_data=False)
        assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 23)]
        values = onnx.shape_inference.infer_shapes(graph, strict_mode=True).graph
        edges = [*values.value_info, *values.input, *values.output]
        types = {edge.name: edge.type.tensor_type.elem_type for edge in edges}
        types |= {tensor.name: tensor.data_type for tensor in values.initializer}
        floats = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
        outside = set(NAMES[part])
        assert {kind for name, kind in types.items() if name not in outside} & floats == {own}
        assert [types[name] for name in NAMES[part]] == [TensorProto.FLOAT, TensorProto.FLOAT]
        assert made.details["io"]["dtype"] == {TensorProto.FLOAT: "fp32", TensorProto.BFLOAT16: "bf16"}.get(own, "fp16")


@pytest.mark.parametrize(("kind", "weight"), [("w8a8", "INT8"), ("fp8", "FLOAT8E4M3FN")])
def test_weights_and_inputs_of_linear_layers_are_rounded_and_nothing_else(
    models: Callable[[str], Model], folder: Path, kind: str, weight: str
) -> None:
    """Six layers a block read four tensors; the products of attention are left alone."""
    made = exported(models("clip"), "vision_encoder", kind, folder)
    graph = onnx.load(folder / "vision_encoder.onnx", load_external_data=False).graph
    operators = Counter(node.op_type for node in graph.node)
    assert operators["Attention"] == 2
    assert operators["QuantizeLinear"] == 2 * 4
    assert operators["DequantizeLinear"] == 2 * (4 + 6)
    matrices = Counter(TensorProto.DataType.Name(t.data_type) for t in graph.initializer if len(t.dims) == 2)
    assert matrices == {weight: 12}
    assert made.details["linears"] == {kind: 12}
    assert list(made.details["kept"]) == ["tower.embeddings.patch_embedding.weight"]


def rounded(layers: nn.Module, x: torch.Tensor, kind: str, limit: float) -> torch.Tensor:
    """The module with weights and inputs of its linear layers rounded: by torch alone, in float32."""
    ranges = given(layers, x, limit)

    def levels(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        if kind == "fp8":
            scale = largest / 448
            return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        return (values / (largest / 127)).round().clamp(-128, 127) * (largest / 127)

    weights = {}
    hooks = []
    for name, layer in layers.named_modules():
        if isinstance(layer, nn.Linear) and name in ranges:
            largest = layer.weight.abs().amax(1, keepdim=True) if kind == "w8a8" else layer.weight.abs().max()
            weights[layer] = layer.weight.data
            layer.weight.data = levels(layer.weight.data, largest)
            span = torch.tensor(max(map(abs, ranges[name])))
            hooks.append(layer.register_forward_pre_hook(lambda _, args, span=span: (levels(args[0], span),)))
    try:
        with torch.inference_mode():
            return cast(torch.Tensor, layers(x))
    finally:
        for layer, weight in weights.items():
            layer.weight.data = weight
        for handle in hooks:
            handle.remove()


@pytest.mark.parametrize("kind", ROUNDED)
@pytest.mark.parametrize("part", PARTS)
def test_rounding_is_that_of_a_simulation(
    models: Callable[[str], Model], folder: Path, part: EncoderPart, kind: str
) -> None:
    """Ranges are too narrow on purpose: what lies beyond them is clipped. Few values fall on the other side in fp16."""
    model = models("siglip")
    x, limit = inputs(model, part), 1.5
    got = torch.from_numpy(run(folder, exported(model, part, kind, folder, limit), x))
    want = rounded(module(model, part), x, kind, limit)
    with torch.inference_mode():
        plain = module(model, part)(x)
    assert (want - plain).norm() > 0.02 * plain.norm()
    assert (got - want).norm() < 0.15 * (want - plain).norm()


@pytest.mark.parametrize("kind", ["fp16", "w8a8", "int4:g16"])
def test_opset_21_has_only_what_older_tensorrt_knows(models: Callable[[str], Model], folder: Path, kind: str) -> None:
    """JetPack 6 has TensorRT 10.3: ONNX of opset 21, without Attention."""
    model, part = models("clip"), "vision_encoder"
    x = inputs(model, part)
    usual = run(folder, exported(model, part, kind, folder), x)
    ranges = given(module(model, part), x)
    precision = parse_recipe(f"vision={kind}").vision
    made = vision_part(model, part, precision, folder, ranges=ranges, opset=21)
    graph = onnx.load(folder / "vision_encoder.onnx", load_external_data=False)
    assert (graph.opset_import[0].version, graph.ir_version) == (21, 10)
    assert "Attention" not in {node.op_type for node in graph.graph.node}
    assert np.linalg.norm(run(folder, made, x) - usual) < 0.01 * np.linalg.norm(usual)
    built = build_engines(folder.parent, {part: made}, ("rtx30",), lambda *step: None)[part]
    assert all("SOFTMAX" in engine["layers"] for engine in cast(list[dict[str, Any]], built.details["engines"]))


def test_the_bf16_graph_is_checked_by_one_that_rounds_to_bf16(models: Callable[[str], Model], folder: Path) -> None:
    model = models("clip")
    made = exported(model, "vision_encoder", "bf16", folder)
    assert made.files == tuple(f"tensorrt/vision_encoder{end}" for end in (".onnx", ".onnx.data", ".check.onnx"))
    real, check = (onnx.load(folder.parent / made.files[i], load_external_data=False).graph for i in (0, 2))
    assert [(i.name, i.type) for i in real.input] == [(i.name, i.type) for i in check.input]
    assert [(o.name, o.type) for o in real.output] == [(o.name, o.type) for o in check.output]
    assert {t.name for t in real.initializer} == {t.name for t in check.initializer}
    assert (folder / "vision_encoder.check.onnx").stat().st_size < 64_000
    x = inputs(model, "vision_encoder")
    got = torch.from_numpy(run(folder, made, x))
    assert torch.equal(got, got.bfloat16().float())
    exact = module(model, "vision_encoder")
    with torch.inference_mode():
        want = exact(x)
        halves = load_model(model.checkpoint.folder).vision_encoder().bfloat16()(x.bfloat16()).float()
    assert 0.2 < (got - want).norm() / (halves - want).norm() < 1.5, "not the noise of bfloat16"


def test_a_rule_gives_a_layer_its_own_precision(models: Callable[[str], Model], folder: Path) -> None:
    """By the module's name, also where no bias bears it."""
    model = models("two-layers")
    made = vision_part(model, "projector", parse_recipe("projector=int8;linear_2=fp16").projector, folder)
    assert made.details["linears"] == {"int8": 1, "fp16": 1}
    made = vision_part(model, "vision_encoder", parse_recipe("vision=fp16;layers.1.mlp=int8").vision, folder)
    assert made.details["linears"] == {"fp16": 16, "int8": 2}


def test_a_precision_that_rounds_inputs_needs_their_ranges(models: Callable[[str], Model], folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"w8a8 needs the range .*q_proj"):
        vision_part(models("clip"), "vision_encoder", parse_recipe("vision=w8a8").vision, folder)


def test_weights_beyond_fp16_are_refused(make_tiny: MakeTiny, folder: Path) -> None:
    model = load_model(make_tiny())
    model.projector().linear_1.weight.data[3, 5] = 7e4
    for kind in ("fp16", "int8"):
        with pytest.raises(RecipeError, match=r"linear_1\.weight reaches 7e\+04, beyond fp16"):
            vision_part(model, "projector", parse_recipe(f"projector={kind}").projector, folder)
    vision_part(model, "projector", parse_recipe("projector=bf16").projector, folder)


@pytest.mark.parametrize("kind", LIMITS)
def test_every_precision_builds_for_the_devices_that_have_it(
    models: Callable[[str], Model], folder: Path, kind: str
) -> None:
    """fp32 has no fused attention in the SDK, so its is written out."""
    tower = "siglip" if kind in ("fp16", "w8a8") else "clip"
    parts: dict[str, Part] = {"vision_encoder": exported(models(tower), "vision_encoder", kind, folder)}
    if kind in ("bf16", "w8a8"):
        parts["projector"] = exported(models(tower), "projector", kind, folder)
    profiles = ("rtx40", "rtx50") if kind == "fp8" else ("rtx30", "rtx40", "rtx50")
    for part, built in build_engines(folder.parent, parts, profiles, lambda *step: None).items():
        engines = cast(list[dict[str, Any]], built.details["engines"])
        capabilities = {"8.9", "12.0"} | ({"8.6"} if kind != "fp8" else set())
        assert {c for engine in engines for c in engine["compute_capabilities"]} >= capabilities
        fused = {"clip": 2, "siglip": 3}[tower] if part == "vision_encoder" and kind != "fp32" else 0
        assert {engine["layers"].get("ATTENTION", 0) for engine in engines} == {fused}
