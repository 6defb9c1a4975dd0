"""`--target coreml` as a user types it: what lies in the bundle, what is said and refused, what runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlm_export
import vlm_runtime
from exporting import Command, command, rewrite
from vlm_models.errors import BundleError, CheckError, DependencyError, InputError, RecipeError
from vlm_runtime.bundle import Bundle
from vlm_runtime.engine import choose_engines
from vlm_runtime.manifest import Manifest, Part, read_manifest

run = pytest.fixture(command)
CONTEXT = 96


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, picture: Image.Image) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for number in range(3):
        picture.rotate(90 * number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("What is it?")
    return folder


@pytest.fixture(scope="module")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("coreml") / "bundle"
    vlm_export.export(tiny, "coreml", output, max_context=CONTEXT, greedy_tokens=16)
    return output


def language_part(manifest: Manifest) -> Part:
    return manifest.parts["language_model"]["mil"]


def test_the_bundle_holds_three_packages_for_two_engines(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    for part, engines in manifest.parts.items():
        assert set(engines) == {"mil", "coreml"}
        assert engines["mil"] == engines["coreml"]
        assert engines["mil"].graph == f"coreml/{part}.mlpackage/Manifest.json"
        assert set(engines["mil"].files) <= set(manifest.files)
    assert language_part(manifest).details["functions"] == {"prefill": 64, "decode": 1}


def test_it_is_near_the_checkpoint_and_says_what_was_not_measured(bundle: Path) -> None:
    parity = read_manifest(bundle).parity["coreml"]
    assert parity["passed"] is True
    assert parity["stages"]["logits"]["relative_l2"] <= 1e-2
    assert parity["stages"]["logits"]["top1"] == 1.0
    assert parity["greedy"] == {"equal": 16, "of": 16}
    assert parity["device"]["measured"] is False
    assert "not measured" in parity["device"]["note"]


def test_a_picture_is_answered_where_core_ml_is_not(bundle: Path, picture: Image.Image) -> None:
    model = vlm_runtime.load(bundle, engine="mil", threads=1)
    assert set(model.engines.values()) == {"mil"}
    once = model.answer("What colour is it?", [picture], max_new_tokens=8)
    assert once.token_ids == model.answer("What colour is it?", [picture], max_new_tokens=8).token_ids
    assert once.image_tokens == 16


def test_an_engine_made_for_checking_comes_last(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    others = {part: dict.fromkeys(("coreai", "onnx"), engines["mil"]) for part, engines in manifest.parts.items()}
    parts = {part: {**engines, **others[part]} for part, engines in manifest.parts.items()}
    several = Bundle(bundle, dataclasses.replace(manifest, parts=parts))
    assert set(choose_engines(several, None).values()) == {"onnx"}
    assert set(choose_engines(Bundle(bundle, manifest), None).values()) == {"mil"}


def test_overflows_of_float16_are_named(tiny: Path, tmp_path: Path) -> None:
    loud = tmp_path / "loud"
    shutil.copytree(tiny, loud)
    rewrite(loud, lambda tensors: [t.mul_(3000) for name, t in tensors.items() if "multi_modal_projector" in name])
    with contextlib.suppress(CheckError):
        vlm_export.export(loud, "coreml", tmp_path / "out", max_context=CONTEXT, greedy_tokens=1)
    found = read_manifest(tmp_path / "out").parity["coreml"]["overflows"]
    assert set(found["parts"]) >= {"projector"}
    assert "overflow float16" in found["note"]


@pytest.mark.parametrize("options", [{"coreml_kv": "io"}, {"coreml_layout": "ane"}])
def test_policies_of_cache_and_layout_compute_the_same(
    options: dict[str, Any], tiny: Path, tmp_path: Path, bundle: Path
) -> None:
    manifest = vlm_export.export(tiny, "coreml", tmp_path / "out", max_context=CONTEXT, greedy_tokens=16, **options)
    assert manifest.parity["coreml"]["greedy"] == {"equal": 16, "of": 16}
    details, plain = language_part(manifest).details, language_part(read_manifest(bundle)).details
    (name, value) = next(iter(options.items()))
    key = name.removeprefix("coreml_")
    assert details[key] == value
    assert plain[key] != value


def test_states_of_float16_are_not_held_to_fp32(tiny: Path, tmp_path: Path) -> None:
    manifest = vlm_export.export(
        tiny, "coreml", tmp_path / "out", precision="fp32", max_context=CONTEXT, greedy_tokens=4
    )
    assert "float16" in language_part(manifest).details["inexact"]
    assert manifest.parity["coreml"]["stages"]["image_embeds"]["threshold"] == {"relative_l2": 1e-4}
    assert manifest.parity["coreml"]["stages"]["logits"]["threshold"] == {"cosine": 0.999, "kl": 0.01}
    exact = vlm_export.export(
        tiny, "coreml", tmp_path / "io", precision="fp32", max_context=CONTEXT, greedy_tokens=4, coreml_kv="io"
    )
    assert exact.parity["coreml"]["stages"]["logits"]["threshold"] == {"relative_l2": 1e-4}


def test_activations_are_calibrated_on_pictures(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    recipe = "language=int8,vision=w8a8,projector=fp16"
    with pytest.raises(RecipeError, match="--calibration"):
        vlm_export.export(tiny, "coreml", tmp_path / "out", precision=recipe, max_context=CONTEXT)
    assert not (tmp_path / "out").exists()
    manifest = vlm_export.export(
        tiny, "coreml", tmp_path / "out", precision=recipe, max_context=CONTEXT, calibration=pairs, greedy_tokens=2
    )
    assert manifest.parts["vision_encoder"]["mil"].precision == "w8a8"


def test_palettes_come_with_their_warning(tiny: Path, tmp_path: Path, run: Command) -> None:
    options = ["--precision", "language=pal6", "--max-context", str(CONTEXT), "--greedy-tokens", "2"]
    done = run(tiny, "--target", "coreml", "-o", tmp_path / "out", *options)
    assert done.code in (0, 1), done.err
    assert "palettized weights are a choice" in done.out


@pytest.mark.parametrize(
    ("target", "precision"),
    [("onnx", "language=pal4"), ("gguf", "language=pal4"), ("coreml", "language=q4_k_m"), ("coreml", "language=w8a8")],
)
def test_types_of_one_target_are_refused_by_the_others(target: str, precision: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"target '{target}' has no precision"):
        vlm_export.export(tiny, target, tmp_path / "out", precision=precision)


def test_a_policy_that_is_not_is_refused(tiny: Path, tmp_path: Path, run: Command) -> None:
    for option, allowed in (("--coreml-kv", "state, io"), ("--coreml-layout", "plain, ane")):
        done = run(tiny, "--target", "coreml", "-o", tmp_path / "out", option, "other")
        assert done.code == 2
        assert f"choose one of {allowed}" in done.err
    with pytest.raises(InputError):
        vlm_export.export(tiny, "coreml", tmp_path / "out", coreml_kv="other")  # type: ignore[arg-type]


def test_a_missing_sdk_and_a_numpy_too_new_say_what_to_install(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version: Callable[[str], str] = importlib.metadata.version
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "2.4.6" if name == "numpy" else version(name))
        with pytest.raises(DependencyError, match=r"numpy>=2\.3,<2\.4"):
            vlm_export.export(tiny, "coreml", tmp_path / "out")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "coremltools" else find(name))
    with pytest.raises(DependencyError, match=r"vlm-export\[coreml\]"):
        vlm_export.export(tiny, "coreml", tmp_path / "out")


def test_damaged_packages_are_refused_in_one_line(tiny: Path, tmp_path: Path) -> None:
    vlm_export.export(tiny, "coreml", tmp_path / "out", max_context=CONTEXT, check=False)
    data = tmp_path / "out/coreml/language_model.mlpackage/Data/com.apple.CoreML"
    whole = (data / "model.mlmodel").read_bytes()
    size = len(whole)
    for damage in (whole[: size // 2], whole[: size // 2] + b"\xff" * (size - size // 2), b"\0" * size):
        (data / "model.mlmodel").write_bytes(damage)
        with pytest.raises(BundleError) as caught:
            vlm_runtime.load(tmp_path / "out", engine="mil", verify=False)
        assert "\n" not in str(caught.value)
    (data / "model.mlmodel").write_bytes(whole)
    (data / "weights/weight.bin").write_bytes(b"")
    with pytest.raises(BundleError):
        vlm_runtime.load(tmp_path / "out", engine="mil", verify=False)
