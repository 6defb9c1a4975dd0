"""Core ML weights at every precision: each layer on its own axes, none passed over, what was kept written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import mil_programs
from vlm_export.coreml.activations import round_activations
from vlm_export.coreml.compress import compress
from vlm_export.coreml.layers import constants
from vlm_export.coreml.sdk import coremltools
from vlm_models.errors import RecipeError
from vlm_quant.blockwise import dequantize_blocks, quantize_blocks
from vlm_quant.coreml_types import COREML_TYPES, coreml_type
from vlm_quant.recipe import Precision
from vlm_runtime.mil import Executor, open_package

WEIGHTS = mil_programs.weights()
LAYERS = {"plain", "odd", "prime", "point", "kernel", "product"}
INT8, INT4 = Precision("int8"), Precision("int4")


@pytest.fixture(scope="module")
def floats() -> Any:
    """One layer of each kind, float16."""
    return mil_programs.layers(WEIGHTS)


def feeds(seed: int = 1) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    shapes = {"x": (8, 96), "y": (8, 48), "z": (8, 37), "image": (1, 3, 8, 8), "map": (1, 64, 2, 2), "wide": (8, 160)}
    return {name: rng.standard_normal(shape).astype(np.float16).astype(np.float32) for name, shape in shapes.items()}


def outputs(mlmodel: Any, folder: Path) -> dict[str, NDArray[Any]]:
    package = open_package(mil_programs.saved(mlmodel, folder / "model.mlpackage"))
    return dict(Executor(package).run(feeds()).outputs)


def expected(weight: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    f = feeds()
    patches = f["image"].reshape(3, 2, 4, 2, 4).transpose(1, 3, 0, 2, 4).reshape(4, 48)
    return {
        "plain_out": f["x"] @ weight["plain"].T,
        "odd_out": f["y"] @ weight["odd"].T,
        "prime_out": f["z"] @ weight["prime"].T,
        "point_out": (weight["point"][:, :, 0, 0] @ f["map"].reshape(64, 4)).reshape(1, 64, 2, 2),
        "kernel_out": (weight["kernel"].reshape(32, 48) @ patches.T).reshape(1, 32, 2, 2),
        "product_out": f["x"] @ weight["product"],
        "added_out": f["wide"] + weight["added"],
    }


def rounded(name: str, block: int) -> NDArray[np.float32]:
    """What a weight of WEIGHTS becomes: int4 in blocks of columns, or int8 rows for 0, by hand."""
    weight = WEIGHTS[name].astype(np.float32)
    matrix = weight.T if name == "product" else weight.reshape(len(weight), -1)
    size, limit = (block, 7) if block else (matrix.shape[1], 127)
    values, scales = quantize_blocks(matrix.astype(np.float16), size, 4 if block else 8)
    assert np.abs(values).max() <= limit + bool(block)
    back = dequantize_blocks(values, scales)
    return back.T if name == "product" else back.reshape(weight.shape)


@pytest.mark.parametrize(
    ("precision", "blocks", "size"),
    [
        (INT8, dict.fromkeys(LAYERS, 0), 0.62),
        (INT4, {"plain": 32, "odd": 16, "prime": 0, "point": 32, "kernel": 0, "product": 32}, 0.45),
        (Precision("int4", 64), {"plain": 32, "odd": 16, "prime": 37, "point": 64, "kernel": 0, "product": 32}, 0.42),
    ],
    ids=["int8", "int4", "int4:g64"],
)
def test_each_layer_is_rounded_along_its_own_rows_and_what_does_not_fit_is_written_down(
    floats: Any, tmp_path: Path, precision: Precision, blocks: dict[str, int], size: float
) -> None:
    made, details = compress(floats, precision)
    weight = {name: rounded(name, block) for name, block in blocks.items()} | {"added": WEIGHTS["added"]}
    got = outputs(made, tmp_path)
    for name, want in expected({k: v.astype(np.float32) for k, v in weight.items()}).items():
        np.testing.assert_allclose(got[name], want, atol=4e-3 * np.abs(want).max(), err_msg=name)
    assert constants(made.get_spec()).layers == {}, "a weight is still in floats"
    assert sum(details["linears"].values()) == len(LAYERS)
    asked = precision.group_size if precision.weights == "int4" else 0
    assert set(details.get("reblocked", {})) == {name for name, block in blocks.items() if block not in (0, asked)}
    assert set(details["kept"]) == {"added"} | {name for name in LAYERS if blocks[name] == 0 and asked}
    assert "1280 numbers of add" in details["kept"]["added"]
    before = mil_programs.saved(floats, tmp_path / "floats.mlpackage")
    assert weight_bytes(tmp_path / "model.mlpackage") < size * weight_bytes(before)


def weight_bytes(package: Path) -> int:
    return sum(file.stat().st_size for file in package.rglob("weight.bin"))


def test_float_weights_are_counted_and_left_alone(floats: Any) -> None:
    made, details = compress(floats, Precision("fp16"))
    assert made is floats
    assert details == {"linears": {"fp16": 6}, "kept": {}}


@pytest.mark.parametrize(("name", "error"), [("pal6", 0.05), ("pal4", 0.2)])
def test_palettes_take_every_layer_and_bring_their_warning(
    floats: Any, tmp_path: Path, name: str, error: float
) -> None:
    made, details = compress(floats, Precision(COREML_TYPES[name].weights, format=name))
    got = outputs(made, tmp_path)
    for key, want in expected({k: v.astype(np.float32) for k, v in WEIGHTS.items()}).items():
        assert np.linalg.norm(got[key] - want) < error * np.linalg.norm(want), key
    assert details["linears"] == {name: 6}
    assert "2716" in details["warning"]
    assert constants(made.get_spec()).layers == {}


def test_activations_are_rounded_over_the_ranges_of_all_samples(floats: Any, tmp_path: Path) -> None:
    wide, narrow = feeds(1), {name: value / 8 for name, value in feeds(2).items()}
    precision = Precision("int8", format="w8a8")
    made, details = compress(floats, precision, part="vision_encoder", samples=[wide, narrow])
    got = outputs(made, tmp_path)
    for name, want in expected({k: v.astype(np.float32) for k, v in WEIGHTS.items()}).items():
        assert np.linalg.norm(got[name] - want) < 0.04 * np.linalg.norm(want), name
    assert details["calibration_samples"] == 2
    scales = quantizers(tmp_path / "model.mlpackage")
    # conv and linear alone: a product with a constant and an addition keep their floats.
    assert set(scales) == {"x", "y", "z", "map", "image"}
    for name, scale in scales.items():  # the last sample is the narrow one
        assert scale == pytest.approx(np.abs(wide[name]).max() / 127, rel=2e-3), name


def quantizers(package: Path) -> dict[str, float]:
    """Input name → scale of what it is rounded with."""
    opened = open_package(package)
    operations = opened.functions["main"].block.operations
    values = {op.name: opened.constant((op.attributes or {})["val"]) for op in operations if op.type == "const"}
    found = {}
    for op in operations:
        if op.type == "quantize" and op.inputs["input"][0] in feeds():
            (scale,) = op.inputs["scale"]
            found[str(op.inputs["input"][0])] = float(
                np.asarray(values[scale] if isinstance(scale, str) else opened.constant(scale)).item()
            )
    return found


def test_coremltools_calibrates_as_before_once_we_are_done(floats: Any) -> None:
    module = coremltools("optimize.coreml._post_training_quantization")
    own = module._get_activation_calibration_stats

    def broken(package: Path, samples: Any) -> Any:
        return {}

    with pytest.raises(Exception, match=r".+"):
        round_activations(floats, [feeds()], broken)
    assert module._get_activation_calibration_stats is own


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_integers_lie_within_half_a_step_of_the_weights(bits: int, dtype: Any) -> None:
    rng = np.random.default_rng(3)
    matrix = (rng.standard_normal((40, 64)) * np.exp(rng.uniform(-9, 3, (40, 1)))).astype(dtype)
    matrix[5] = 0
    values, scales = quantize_blocks(matrix, 16, bits)
    assert values.dtype == np.int8
    assert scales.dtype == dtype
    assert not values[5].any()
    assert (scales[5] == 1).all()
    back, wide = dequantize_blocks(values, scales), matrix.astype(np.float32)
    step = np.repeat(scales.astype(np.float32), 16, axis=1)
    limit = {4: 0.5 + 0.2 * 7, 8: 0.501}[bits]  # int4 may cut a block's largest number by a fifth
    assert (np.abs(back - wide) <= limit * step).all()
    rounded_to_largest = np.abs(matrix.reshape(40, 4, 16)).max(2).astype(np.float32) / (2 ** (bits - 1) - 1)
    coarse = np.repeat(np.where(rounded_to_largest == 0, 1, rounded_to_largest), 16, axis=1)
    plain = np.rint(wide / coarse) * coarse
    ours, theirs = (np.square((x - wide) / np.maximum(step, 1e-9))[6:].mean() for x in (back, plain))
    assert ours < {4: 0.9, 8: 1.02}[bits] * theirs


@pytest.mark.parametrize(
    ("precision", "part", "message"),
    [
        (Precision("int4", format="q4_k_m"), "language_model", "no precision 'q4_k_m'"),
        (Precision("int8", format="w8a8"), "language_model", "choose of fp32, fp16, int8, int4, pal6, pal4"),
        (Precision("int8", format="w8a8"), "vision_encoder", "--calibration"),
    ],
    ids=["of gguf", "of the vision part", "without pictures"],
)
def test_a_precision_that_a_part_cannot_take_is_refused_in_one_line(
    floats: Any, precision: Precision, part: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        compress(floats, precision, part=part)
    assert "\n" not in str(caught.value)


def test_bits_of_a_type_are_those_of_its_weights_and_scales() -> None:
    bits = {
        str(p): coreml_type(p, "language_model").bits for p in (Precision("fp16"), INT8, INT4, Precision("int4", 64))
    }
    assert bits == {"fp16": 16, "int8": 8, "int4:g32": 4.5, "int4:g64": 4.25}
