"""`vlm-export` as a shell sees it: exit codes, streams, one JSON object."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from exporting import Command, command, copy_parts, exported
from vlm_export import parity
from vlm_runtime.bundle import open_bundle

run = pytest.fixture(command)
STAGES = ("pixel_values", "image_features", "image_embeds", "inputs_embeds", "logits")


@pytest.fixture
def copied(tiny: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_parts(exported(tiny, tmp_path_factory), monkeypatch)


@pytest.mark.usefixtures("copied")
def test_the_parity_table_and_the_output_are_printed(tiny: Path, tmp_path: Path, run: Command) -> None:
    ran = run(tiny, "--target", "onnx", "-o", tmp_path / "out", "--precision", "fp32", "--greedy-tokens", "4")
    assert (ran.code, ran.err) == (0, "")
    for stage in STAGES:
        assert stage in ran.out
    assert "greedy tokens equal: 4 of 4" in ran.out
    assert f"{tmp_path / 'out'} " in ran.out
    assert max(map(len, ran.out.splitlines()[:-1])) <= 80
    assert open_bundle(tmp_path / "out").manifest.parity["onnx"]["passed"]


@pytest.mark.usefixtures("copied")
def test_json_is_one_object_and_nothing_else(tiny: Path, tmp_path: Path, run: Command) -> None:
    output = tmp_path / "out"
    ran = run(tiny, "--target", "onnx", "-o", output, "--json", "--greedy-tokens", "2")
    assert (ran.code, ran.err) == (0, "")
    report = json.loads(ran.out)
    assert set(report) == {"output", "targets", "bytes", "files", "seconds", "parity"}
    assert report["output"] == str(output)
    assert report["bytes"] == sum(
        p.stat().st_size for p in output.rglob("*") if p.name != "manifest.json" and p.is_file()
    )
    assert set(report["parity"]["onnx"]["stages"]) == set(STAGES)
    assert report["seconds"]["total"] >= report["seconds"]["language_model"] >= 0


@pytest.mark.usefixtures("copied")
def test_without_the_check_it_says_not_measured(tiny: Path, tmp_path: Path, run: Command) -> None:
    ran = run(tiny, "--target", "onnx", "-o", tmp_path / "out", "--no-check")
    assert ran.code == 0
    assert "onnx: parity: not measured" in ran.out
    ran = run(tiny, "--target", "onnx", "-o", tmp_path / "json", "--no-check", "--json")
    assert json.loads(ran.out)["parity"] == {"onnx": None}


@pytest.mark.usefixtures("copied")
def test_quiet_prints_nothing(tiny: Path, tmp_path: Path, run: Command) -> None:
    ran = run(tiny, "-t", "onnx", "-o", tmp_path / "out", "--no-check", "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


@pytest.mark.usefixtures("copied")
def test_missed_parity_is_exit_1_with_table_and_bundle(
    tiny: Path, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.LOGITS, "fp16", {"kl": -1.0})
    ran = run(tiny, "-t", "onnx", "-o", tmp_path / "out", "--greedy-tokens", "2")
    assert ran.code == 1
    assert "FAIL" in ran.out
    assert ran.err.startswith("error: parity failed: logits kl ")
    assert f"(the bundle is written to {tmp_path / 'out'})" in ran.err
    assert not open_bundle(tmp_path / "out").manifest.parity["onnx"]["passed"]
    ran = run(tiny, "-t", "onnx", "-o", tmp_path / "json", "--greedy-tokens", "2", "--json")
    assert ran.code == 1
    assert json.loads(ran.out)["parity"]["onnx"]["passed"] is False


def test_usage_mistakes_are_exit_2(tiny: Path, tmp_path: Path, run: Command) -> None:
    assert run(tiny, "-o", tmp_path / "out").code == 2
    assert run(tiny, "--target", "onnx").code == 2
    assert run(tiny, "--target", "onnx", "-o", tmp_path / "out", "--max-context", "many").code == 2
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_flag_and_an_example(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    ran = run("--help")
    assert ran.code == 0
    for text in (
        "--target",
        "--output",
        "--precision",
        "--max-context",
        "--no-check",
        "--greedy-tokens",
        "--json",
        "--quiet",
        "vlm-export llava-1.5-7b-hf --target onnx -o llava-onnx",
        "Exit codes",
    ):
        assert text in ran.out


def test_help_and_mistakes_do_not_load_torch() -> None:
    script = (
        "import sys, vlm_export.cli\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
