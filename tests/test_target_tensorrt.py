"""`--target tensorrt` as a user types it: export, engines, what is said and refused, what runs it, what two share."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
from PIL import Image

import vlm_export
import vlm_runtime
from exporting import Command, command
from vlm_export import preflight
from vlm_export.target import Job, find_target
from vlm_export.targets import tensorrt
from vlm_export.tensorrt import plan
from vlm_models.errors import RecipeError
from vlm_models.model import load_model
from vlm_quant.recipe import parse_recipe
from vlm_runtime.cli import app
from vlm_runtime.manifest import Part, read_manifest

run = pytest.fixture(command)
CONTEXT = 96
PARTS = ("vision_encoder", "projector", "language_model")
RULES = "language=int4:g32;lm_head=fp16;layers.1=int8;o_proj=fp16"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, picture: Image.Image) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for number in range(3):
        picture.rotate(90 * number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("What is it?")
    return folder


@pytest.fixture(scope="module")
def bundle(tiny: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two targets, int4 with rules, decided on pairs; no engines, which Orin builds itself."""
    output = tmp_path_factory.mktemp("tensorrt") / "bundle"
    options: dict[str, Any] = {"max_context": CONTEXT, "greedy_tokens": 4, "calibration": pairs}
    recipe = f"vision=fp16,projector=fp16,{RULES}"
    vlm_export.export(tiny, ["tensorrt", "onnx"], output, precision=recipe, device_profiles=["orin"], **options)
    return output


def language(bundle: Path) -> Part:
    return read_manifest(bundle).parts["language_model"]["tensorrt"]


def test_two_targets_share_everything_but_their_graphs(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    owned = Counter(file.split("/")[0] for file in manifest.files)
    assert owned["tensorrt"] == 7  # three graphs with their weights, and the script
    assert owned["onnx"] == 6
    shared = {file for file in manifest.files if file.split("/")[0] not in ("tensorrt", "onnx")}
    assert manifest.golden is not None
    assert {"embedding.bin", "tokenizer.json", manifest.golden} <= shared
    assert Counter(Path(file).suffix for file in shared) == {".bin": 1, ".json": 1, ".safetensors": 1, ".png": 1}
    assert set(manifest.parity) == {"tensorrt", "onnx"}
    for part in PARTS:
        assert set(manifest.parts[part]) == {"tensorrt", "tensorrt_onnx", "onnx"}
        assert manifest.parts[part]["tensorrt"] == manifest.parts[part]["tensorrt_onnx"]
        assert set(manifest.parts[part]["tensorrt"].files) <= set(manifest.files)


def test_layers_take_their_rules_and_the_integers_that_were_decided(bundle: Path) -> None:
    details = language(bundle).details
    # 112 columns of down_proj take groups of 16; layer 1 is int8 but for its o_proj.
    assert details["linears"] == {"int4:g32": 2 * 5, "int4:g16": 2, "int8": 6, "fp16": 4}
    assert details["rounding"]["algorithm"] == "awq+gptq"
    assert details["grids"] == 2 * 6 + 6
    assert details["rounded_again"] == []
    assert details["kept"]["layers.0.mlp.down_proj"] == "int4:g16: 32 does not divide 112 inputs"
    assert details["kept"]["lm_head"] == details["kept"]["layers.1.self_attn.o_proj"] == "fp16: asked for by a rule"
    (line,) = (note for note in details["notes"] if note.startswith("language_model: "))
    assert line.startswith("language_model: 6 tensors are not int4:g32: 4 fp16: asked for by a rule; 2 int4:g16")
    assert any("engines for orin are built there" in note for note in details["notes"])
    graph = onnx.load(bundle / "tensorrt/language_model.onnx", load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["DequantizeLinear"] == 2 * 6 + 6
    assert kinds["QuantizeLinear"] == 0


def test_both_targets_are_as_near_to_the_checkpoint(bundle: Path) -> None:
    parity = read_manifest(bundle).parity
    for name in ("tensorrt", "onnx"):
        assert parity[name]["stages"]["image_embeds"]["cosine"] >= 0.9999
        assert parity[name]["stages"]["logits"]["cosine"] >= 0.9
    assert "not measured" in parity["tensorrt"]["device"]["note"]


def test_engines_are_added_to_the_bundle_and_the_graphs_answer(
    bundle: Path, tmp_path: Path, picture_file: Path, run: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    done = run("--build", copy, "--device-profile", "rtx40")
    assert done.code == 0, done.err
    manifest = read_manifest(copy)
    for part in PARTS:
        (engine,) = manifest.parts[part]["tensorrt"].details["engines"]
        assert (engine["profile"], engine["compute_capabilities"]) == ("rtx40", ["8.9"])
        assert engine["bytes"] == (copy / engine["file"]).stat().st_size == manifest.files[engine["file"]].bytes
    with pytest.raises(SystemExit) as exited:
        app([str(copy), "--image", str(picture_file), "What is it?", "--engine", "tensorrt_onnx", "--threads", "1"])
    said = capfd.readouterr()
    assert exited.value.code in (0, None), said.err
    answers = [vlm_runtime.load(path, engine="tensorrt_onnx", threads=1) for path in (copy, bundle)]
    first, second = (model.answer("What is it?", [picture_file], max_new_tokens=6).token_ids for model in answers)
    assert first == second


def test_rounded_inputs_are_ranged_on_the_smoothed_model_and_the_pictures_run_once(
    tiny: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[str, Any]] = []
    for name in ("vision_ranges", "language_ranges"):
        real = getattr(tensorrt, name)

        def measure(model: Any, *args: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            measured.append((name, model))
            return real(model, *args, **options)

        monkeypatch.setattr(tensorrt, name, measure)
    options: dict[str, Any] = {"max_context": CONTEXT, "calibration": pairs, "greedy_tokens": 4}
    recipe = "vision=w8a8,projector=w8a8,language=w8a8;down_proj=int8"
    manifest = vlm_export.export(
        tiny, "tensorrt", tmp_path / "out", precision=recipe, device_profiles=["orin"], **options
    )
    assert [name for name, _ in measured] == ["language_ranges", "vision_ranges"]
    decided = measured[0][1].checkpoint
    assert decided.grid("language_model.layers.0.mlp.up_proj.weight") is not None
    details = manifest.parts["language_model"]["tensorrt"].details
    assert details["linears"] == {"w8a8": 3 * 6, "int8": 3 + 1}
    assert details["rounding"]["algorithm"] == "gptq+smoothquant"
    assert (details["grids"], details["rounded_again"]) == (3 * 7, [])
    assert manifest.parity["tensorrt"]["stages"]["logits"]["cosine"] >= 0.98


def test_what_cannot_be_is_refused_before_work_in_one_line(tiny: Path, tmp_path: Path, run: Command) -> None:
    for recipe, said in (
        ("language=int4;lm_hed=fp16", "rule lm_hed=fp16 fits no linear layer of the language part"),
        ("language=q4_k_m", "target 'tensorrt' has no precision 'q4_k_m'"),
        ("language=w8a8", "give --calibration"),
        ("vision=int8;fc9=fp16", "rule fc9=fp16 fits no linear layer of the vision part"),
    ):
        done = run(
            tiny, "--target", "tensorrt", "-o", tmp_path / "out", "--precision", recipe, "--device-profile", "orin"
        )
        assert done.code == 2, done.err
        assert said in " ".join(done.err.split())
        assert not (tmp_path / "out").exists()


def test_the_disk_is_asked_for_graphs_and_for_the_engines_that_are_built_here(tiny: Path) -> None:
    model, recipe = load_model(tiny), parse_recipe("fp16")
    graphs = find_target("tensorrt").bytes_needed(model, recipe, PARTS)
    assert graphs == pytest.approx(2 * sum(preflight.weights(model, part) for part in PARTS))
    engines = {
        names: plan.check(names.split(), model, recipe, PARTS, CONTEXT, "concat")
        for names in ("orin", "rtx40", "rtx30 rtx40 rtx50", "t4 rtx40")
    }
    assert engines["orin"] == 0
    assert graphs < engines["rtx40"] == engines["rtx30 rtx40 rtx50"]
    assert engines["t4 rtx40"] == 2 * engines["rtx40"]  # Turing has its own
    mixed = parse_recipe("language=fp32;layers.1=int4")
    assert tensorrt.bytes_needed(model, mixed, ["language_model"]) < tensorrt.bytes_needed(
        model, parse_recipe("language=fp32"), ["language_model"]
    )


def test_a_job_without_pairs_names_the_part_that_needs_them(tiny: Path, tmp_path: Path) -> None:
    job = Job(load_model(tiny), parse_recipe("projector=w8a8"), tmp_path, CONTEXT, ("projector",))
    with pytest.raises(RecipeError, match="projector=w8a8 rounds activations"):
        find_target("tensorrt").build(job)
