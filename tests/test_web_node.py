"""The browser runtime in Node: what it computes equals what Python computes on the same bundle."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import web_cases
from exporting import exported
from running import running_bundle
from tiled import noise, tiny_tiled
from vlm_export import export
from web_package import WEB, built

MINUTES = 10


def node(test: str, cases: Path) -> str:
    """Run one test file of the package; its report where it fails."""
    package = built()
    line = ["node", "--test", "--test-reporter=spec", str(package / "test" / f"{test}.test.js")]
    ran = subprocess.run(
        line,
        cwd=WEB,
        env={**os.environ, "VLM_WEB_CASES": str(cases)},
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    return ran.stdout


@pytest.mark.parametrize("topic", ["resizing", "preprocessing", "tiling", "prompts", "sampling"])
def test_the_arithmetic_is_pythons(topic: str, tmp_path: Path) -> None:
    web_cases.write(tmp_path, topic, getattr(web_cases, topic)())
    assert "ℹ fail 0" in node(topic, tmp_path)


def test_tokenizers_of_known_families_give_pythons_ids_and_texts(tmp_path: Path) -> None:
    web_cases.write(tmp_path, "tokens", web_cases.tokens(tmp_path / "tokenizers"))
    node("tokens", tmp_path)


def test_bad_bundles_are_refused_in_one_line(tmp_path: Path) -> None:
    web_cases.write(tmp_path, "bundle", {"folder": str(running_bundle(tmp_path / "bundle"))})
    node("reading", tmp_path)


def test_golden_vectors_and_answers_equal_pythons(
    tiny: Path, picture: Image.Image, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = exported(tiny, tmp_path_factory)
    web_cases.write(tmp_path, "answers", web_cases.answers(bundle, [picture, noise((40, 50), 2)]))
    node("answers", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("web", [False, True], ids=["as-everywhere", "web"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_golden_vectors_of_fewer_bits_stay_within_the_manifests_tolerance(
    precision: str, web: bool, tiny: Path, picture: Image.Image, tmp_path: Path
) -> None:
    export(tiny, ["onnx"], tmp_path / "bundle", precision=precision, web=web)
    pictures = [picture, noise((40, 50), 2)]
    web_cases.write(tmp_path, "answers", web_cases.answers(tmp_path / "bundle", pictures, exact=False))
    node("answers", tmp_path)


@pytest.mark.slow
def test_answers_at_fp16_equal_pythons(tiny: Path, picture: Image.Image, tmp_path: Path) -> None:
    export(tiny, ["onnx"], tmp_path / "bundle", precision="fp16")
    web_cases.write(tmp_path, "answers", web_cases.answers(tmp_path / "bundle", [picture, noise((40, 50), 2)]))
    node("answers", tmp_path)


@pytest.mark.slow
def test_pictures_in_tiles_answer_as_in_python(tmp_path: Path, picture: Image.Image) -> None:
    checkpoint = tiny_tiled(tmp_path / "checkpoint", "llava_onevision", max_grid=4)
    export(checkpoint, ["onnx"], tmp_path / "bundle", precision="fp32")
    web_cases.write(tmp_path, "answers", web_cases.answers(tmp_path / "bundle", [picture, noise((90, 50), 2)]))
    node("answers", tmp_path)
