"""Core ML vision encoder and projector, read back from their packages by our executor, against the checkpoint's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from conftest import MakeTiny
from vlm_export.coreml.lint import notes
from vlm_export.coreml.vision import EncoderPart, convert_encoder, names
from vlm_models.errors import RecipeError
from vlm_models.model import Model, load_model
from vlm_quant.calibration import Calibration, Pair
from vlm_quant.recipe import Precision
from vlm_runtime.mil import Executor, open_package

SIGLIP: dict[str, Any] = {
    "text": "qwen2",
    "tower": "siglip",
    "strategy": "full",
    "feature_layer": -1,
    "dtype": "bfloat16",
}
LIST: dict[str, Any] = {"feature_layer": [-2, -1], "projector_bias": False}
FP32, FP16, W8A8 = Precision("fp32"), Precision("fp16"), Precision("int8", format="w8a8")


def inputs(model: Model, part: EncoderPart, seed: int = 1) -> torch.Tensor:
    """What the part is given for a picture of noise."""
    size = model.spec.vision.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return pixels if part == "vision_encoder" else model.vision_encoder()(pixels)


def reference(model: Model, part: EncoderPart, given: torch.Tensor) -> NDArray[np.float32]:
    with torch.inference_mode():
        return np.asarray((model.vision_encoder() if part == "vision_encoder" else model.projector())(given))


def run(path: Path, part: EncoderPart, given: torch.Tensor) -> NDArray[np.float32]:
    source, result = names(part)
    outcome = Executor(open_package(path)).run({source: given.numpy()})
    assert outcome.overflows == ()
    return np.asarray(outcome.outputs[result])


def relative(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize(
    ("options", "precision", "bound"),
    [({}, FP32, 1e-6), ({}, FP16, 2e-3), (SIGLIP, FP16, 2e-3), (LIST, FP32, 1e-6), (LIST, Precision("int8"), 0.03)],
    ids=["clip-fp32", "clip-fp16", "siglip-fp16", "two-layers-fp32", "two-layers-int8"],
)
def test_features_and_projected_rows_are_those_of_the_checkpoint(
    make_tiny: MakeTiny,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    options: dict[str, Any],
    precision: Precision,
    bound: float,
) -> None:
    model = load_model(make_tiny(**options))
    seen: list[tuple[str, int, int]] = []
    for part in get_args(EncoderPart):
        path, given = tmp_path / f"{part}.mlpackage", inputs(model, part)
        capfd.readouterr()
        details = convert_encoder(model, part, precision, path, progress=lambda *step: seen.append(step))
        assert capfd.readouterr() == ("", ""), "coremltools' noise reached the user"
        assert relative(run(path, part, given), reference(model, part, given)) < bound
        package, (source, result) = open_package(path), names(part)
        assert package.metadata["vlm.fingerprint"] == model.spec.fingerprint
        assert package.metadata["vlm.part"] == part
        told = package.descriptions["main"]
        dtype = "fp32" if precision == FP32 else "fp16"
        assert {n: f.dtype for n, f in (told.inputs | told.outputs).items()} == {source: dtype, result: dtype}
        assert all(note.startswith("function 'main': the Neural Engine pads") for note in notes(path))
        # feature layer -2 of three has two live layers of six matrices, -1 three; one convolution.
        layers = 2 if part == "projector" else (2 if not options else 3) * 6 + 1
        assert details["linears"] == {str(precision): layers}
        assert details["kept"] == {}, "a bias or a norm was taken for a weight"
        if part == "vision_encoder" and options == {}:  # the third layer, which nobody reads, is not in the package
            live = sum(p.numel() for n, p in model.vision_encoder().named_parameters() if "layers.2." not in n)
            stored = sum(file.stat().st_size for file in path.rglob("weight.bin"))
            assert stored < 1.15 * live * (4 if precision == FP32 else 2)
    assert {stage for stage, _, _ in seen} >= {"vision_encoder", "projector"}
    assert all(0 <= done <= of for _, done, of in seen)


def test_w8a8_is_calibrated_on_the_pictures_of_the_pairs(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model = load_model(make_tiny())
    rng = np.random.default_rng(5)
    pairs = []
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / f"{i}.png")
        pairs.append(Pair(tmp_path / f"{i % 2}.png", "What is this?"))
    for part in get_args(EncoderPart):
        path, given = tmp_path / f"{part}.mlpackage", inputs(model, part)
        details = convert_encoder(model, part, W8A8, path, calibration=Calibration(tuple(pairs)))
        assert details["calibration_samples"] == 2, "each picture counts once"
        types = [op.type for op in open_package(path).functions["main"].block.operations]
        assert types.count("quantize") >= details["linears"]["w8a8"]
        if part == "vision_encoder":
            given = given.clamp(-1, 1)  # the noise of a picture: values beyond its ranges are cut
        assert relative(run(path, part, given), reference(model, part, given)) < 0.15


@pytest.mark.parametrize("part", get_args(EncoderPart))
def test_w8a8_without_pictures_is_refused(make_tiny: MakeTiny, tmp_path: Path, part: EncoderPart) -> None:
    with pytest.raises(RecipeError, match="--calibration"):
        convert_encoder(load_model(make_tiny()), part, W8A8, tmp_path / "part.mlpackage")
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_float16_are_refused_by_name(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model = load_model(make_tiny())
    with torch.no_grad():
        model.projector().linear_2.weight[3, 1] = 1e5
    with pytest.raises(
        RecipeError, match=r"'linear_2\.weight' is beyond float16 \(up to 1e\+05\): use fp32 for this part"
    ):
        convert_encoder(model, "projector", FP16, tmp_path / "projector.mlpackage")
