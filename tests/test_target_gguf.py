"""`--target gguf` as a user types it: what lies in the bundle, what is said, what is refused, and what runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import vlm_export
import vlm_runtime
from conftest import MakeTiny
from exporting import Command, command
from vlm_export.gguf.architecture import GRAPHS
from vlm_export.target import find_target
from vlm_models.errors import BundleError, CheckpointError, InputError, RecipeError
from vlm_models.model import load_model
from vlm_quant.gguf_types import GGUF_TYPES
from vlm_quant.recipe import Precision, parse_recipe
from vlm_runtime.gguf_header import ARCHITECTURES, read_header
from vlm_runtime.manifest import Manifest, Part, read_manifest

run = pytest.fixture(command)
WIDE = {"text_options": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}}


@pytest.fixture(scope="module")
def wide(make_tiny: MakeTiny) -> Path:
    """A tiny model whose rows fill the blocks of 256 weights of the K types."""
    return make_tiny(text="llama", tower="siglip", strategy="full", feature_layer=-1, **WIDE)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, picture: Image.Image) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for number, question in enumerate(("What is it?", "Which colour has the circle?", "Count the squares.")):
        picture.rotate(90 * number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(question)
    return folder


@pytest.fixture(scope="module")
def calibrated(wide: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("calibrated") / "bundle"
    vlm_export.export(wide, "gguf", output, precision="language=q5_k_m", calibration=pairs, greedy_tokens=4)
    return output


def part_of(manifest: Manifest) -> Part:
    return manifest.parts["language_model"]["gguf"]


def test_the_bundle_holds_one_language_model_its_mmproj_and_onnx_vision_parts(calibrated: Path) -> None:
    manifest = read_manifest(calibrated)
    assert {part: set(engines) for part, engines in manifest.parts.items()} == {
        "vision_encoder": {"onnx"},
        "projector": {"onnx"},
        "language_model": {"gguf"},
    }
    assert sorted(p.name for p in (calibrated / "gguf").iterdir()) == ["language_model.gguf", "mmproj.gguf"]
    assert set(part_of(manifest).files) <= set(manifest.files)
    assert part_of(manifest).precision == "q5_k_m"
    assert manifest.recipes == {"gguf": "vision=fp16,projector=fp16,language=q5_k_m"}


def test_calibration_pairs_are_named_by_their_hash(calibrated: Path) -> None:
    record = part_of(read_manifest(calibrated)).details["calibration"]
    assert (record["pairs"], record["of"], len(record["sha256"])) == (3, 3, 64)


def test_the_mmproj_carries_its_measured_deviation(calibrated: Path) -> None:
    measured = read_manifest(calibrated).parity["gguf"]["mmproj"]
    assert measured["prepared"]["image_embeds"]["relative_l2"] <= 5e-3
    assert "llama.cpp" in measured["note"]


def test_without_pairs_the_user_is_told(wide: Path, tmp_path: Path, run: Command) -> None:
    line = [wide, "--target", "gguf", "-o", tmp_path / "out", "--precision", "q5_k_m", "--greedy-tokens", "2"]
    done = run(*line)
    assert done.code == 0, done.err
    assert "give --calibration with image-text pairs" in done.out


def test_rows_that_fill_no_block_are_named_with_what_they_take(tiny: Path, tmp_path: Path, run: Command) -> None:
    done = run(tiny, "--target", "gguf", "-o", tmp_path / "out", "--precision", "language=q6_k", "--greedy-tokens", "2")
    assert done.code == 0, done.err
    assert "no multiple of blocks of 256" in done.out
    assert part_of(read_manifest(tmp_path / "out")).details["fallbacks"]


def test_two_targets_share_the_vision_parts(tiny: Path, tmp_path: Path) -> None:
    both = vlm_export.export(tiny, ["onnx", "gguf"], tmp_path / "both", precision="fp32", greedy_tokens=4)
    assert set(both.parts["language_model"]) == {"gguf", "onnx"}
    assert set(both.parts["vision_encoder"]) == {"onnx"}
    assert both.parity["onnx"]["passed"] is True
    assert both.parity["gguf"]["passed"] is True
    answers = {
        engine: vlm_runtime.load(tmp_path / "both", engine=engine, threads=1)
        .answer("What?", max_new_tokens=8)
        .token_ids
        for engine in ("language=gguf", "language=onnx")
    }
    assert answers["language=gguf"] == answers["language=onnx"]


def test_a_target_added_later_takes_the_vision_parts_that_are_there(tiny: Path, tmp_path: Path) -> None:
    vlm_export.export(tiny, "onnx", tmp_path / "out", precision="fp16", check=False)
    before = (tmp_path / "out/onnx/vision_encoder.onnx").stat().st_mtime_ns
    with pytest.raises(InputError, match=r"holds the vision_encoder for onnx at fp16, not int8: add vision=fp16"):
        vlm_export.export(tiny, "gguf", tmp_path / "out", precision="int8")
    vlm_export.export(tiny, "gguf", tmp_path / "out", precision="language=q8_0", greedy_tokens=2)
    assert (tmp_path / "out/onnx/vision_encoder.onnx").stat().st_mtime_ns == before
    assert set(read_manifest(tmp_path / "out").parts["language_model"]) == {"gguf", "onnx"}


def test_a_gguf_type_is_refused_for_parts_that_are_no_gguf(tiny: Path, tmp_path: Path) -> None:
    for targets, precision in (("onnx", "language=q4_k_m"), ("gguf", "vision=q4_k_m")):
        with pytest.raises(RecipeError, match="target 'onnx' has no precision 'q4_k_m'"):
            vlm_export.export(tiny, targets, tmp_path / "out", precision=precision)
    with pytest.raises(RecipeError, match="no precision 'int4:g64'"):
        vlm_export.export(tiny, "gguf", tmp_path / "out", precision="language=int4:g64")
    assert not (tmp_path / "out").exists()


def test_a_gguf_without_vocabulary_runs_in_our_runtime(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    vlm_export.export(tiny, "gguf", out, precision="fp32", gguf_tokenizer="none", greedy_tokens=2)
    assert read_header(out / "gguf/language_model.gguf").values["tokenizer.ggml.model"] in ("none", "no_vocab")
    assert vlm_runtime.load(out, threads=1).answer("What?", max_new_tokens=2).token_ids
    with pytest.raises(InputError, match="choose one of checked, none"):
        vlm_export.export(tiny, "gguf", tmp_path / "other", gguf_tokenizer="all")  # type: ignore[arg-type]


def test_the_weights_of_another_model_are_refused_even_unverified(
    tiny: Path, tiny_siglip: Path, tmp_path: Path, calibrated: Path
) -> None:
    vlm_export.export(tiny, "gguf", tmp_path / "out", check=False)
    path = tmp_path / "out/gguf/language_model.gguf"
    whole = path.read_bytes()
    other = (calibrated / "gguf/language_model.gguf").read_bytes()
    assert len(other) > len(whole)
    other_weights = whole.replace(load_model(tiny).spec.fingerprint.encode(), b"0" * 64)
    for damage in (b"GGML" + whole[4:], other_weights, whole[: len(whole) // 2], other):
        path.write_bytes(damage)
        with pytest.raises(BundleError) as caught:
            vlm_runtime.load(tmp_path / "out", verify=False)
        assert "\n" not in str(caught.value)


def test_a_model_that_llama_cpp_cannot_express_is_refused_before_work(make_tiny: MakeTiny, tmp_path: Path) -> None:
    sliding = make_tiny(text="mistral", text_options={"sliding_window": 16})
    with pytest.raises(CheckpointError, match="--max-context"):
        vlm_export.export(sliding, "gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_llama_cpp_rounds_by_itself_is_measured_as_such(make_tiny: MakeTiny, tmp_path: Path) -> None:
    gemma = make_tiny(text="gemma3_text", tower="siglip", strategy="full", feature_layer=-1)
    manifest = vlm_export.export(gemma, "gguf", tmp_path / "out", precision="fp32", greedy_tokens=8)
    logits = manifest.parity["gguf"]["stages"]["logits"]
    assert logits["threshold"] == {"cosine": 0.999, "kl": 0.01}
    assert any("table of fp16" in note for note in part_of(manifest).details["notes"])


def test_writer_and_reader_name_the_same_architectures() -> None:
    assert {kind: ARCHITECTURES.get(kind, kind) for kind in GRAPHS} == {kind: g.name for kind, g in GRAPHS.items()}


def test_every_type_parses_and_its_bytes_are_counted(tiny: Path) -> None:
    model, target = load_model(tiny), find_target("gguf")
    sizes = {}
    for name, kind in GGUF_TYPES.items():
        recipe = parse_recipe(f"language={name.upper()}")
        assert recipe.language == Precision(kind.weights, format=name)
        assert parse_recipe(str(recipe)) == recipe
        sizes[name] = target.bytes_needed(model, recipe, ["language_model"])
    assert sizes["f32"] > sizes["f16"] == sizes["bf16"] > sizes["q8_0"] > sizes["q5_1"] > sizes["q4_0"]
    assert sizes["q4_k_m"] > sizes["f32"]  # the exact copy that the quantizer reads stands beside it


def test_json_says_what_became_of_the_weights(tiny: Path, tmp_path: Path, run: Command) -> None:
    done = run(
        tiny, "--target", "gguf", "-o", tmp_path / "out", "--precision", "int8", "--greedy-tokens", "2", "--json"
    )
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert "gguf/language_model.gguf" in report["files"]
    assert report["parity"]["gguf"]["stages"]["logits"]["kl"] < 0.1
    assert part_of(read_manifest(tmp_path / "out")).details["tensors"]["q8_0"] > 0
