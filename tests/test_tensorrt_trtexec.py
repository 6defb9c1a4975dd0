"""build.sh: what it asks of trtexec, and that it goes on, stops and says why as `--build` does."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tensorrt_layout import CHUNK, CONTEXT, HEADS, LAYERS, tensorrt_bundle
from vlm_export.tensorrt.trtexec import SCRIPT, write_script
from vlm_runtime.manifest import read_manifest

Script = Callable[..., subprocess.CompletedProcess[str]]
FAKE = """\
#!/usr/bin/env bash
if [ "$1" = --help ]; then echo "$FLAGS"; exit; fi
printf '%s\\n' "$@" >> "$CALLS"
echo "&&&&" >> "$CALLS"
if [ -n "$FAILS" ]; then echo "[I] begin"; echo "[E] Error[4]: no tactic"; echo "[E] later"; exit 1; fi
for argument in "$@"; do
  case $argument in --saveEngine=*) echo engine > "${argument#--saveEngine=}" ;; esac
done
"""


def written(folder: Path, kv: str) -> Path:
    tensorrt_bundle(folder, kv, "fp16")
    manifest = read_manifest(folder)
    parts = {name: engines["tensorrt"] for name, engines in manifest.parts.items()}
    assert write_script(folder, manifest.spec, parts) == SCRIPT
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return written(tmp_path / "a bundle", "concat")


@pytest.fixture
def script(tmp_path: Path, bundle: Path) -> Script:
    """Run build.sh with a trtexec that writes down what it is asked."""
    trtexec = tmp_path / "trtexec"
    trtexec.write_text(FAKE)
    trtexec.chmod(0o755)

    def run(*arguments: str, fails: str = "", flags: str = "--stronglyTyped  Create a network") -> object:
        env = {**os.environ, "TRTEXEC": str(trtexec), "CALLS": str(tmp_path / "calls"), "FAILS": fails, "FLAGS": flags}
        command = ["bash", str(bundle / SCRIPT), *arguments]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run  # type: ignore[return-value]


def calls(tmp_path: Path) -> list[list[str]]:
    return [call.splitlines() for call in (tmp_path / "calls").read_text().split("&&&&\n") if call]


@pytest.mark.parametrize("kv", ["concat", "scatter"])
def test_the_script_is_sound_shell(kv: str, tmp_path: Path) -> None:
    path = written(tmp_path / "bundle", kv) / SCRIPT
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    assert ("past_key.0:" in text) == (kv == "concat")
    assert f"inputs_embeds:1x{CHUNK}x32" in text


def test_each_part_is_asked_for_with_its_three_shapes(bundle: Path, script: Script, tmp_path: Path) -> None:
    ran = script("orin")
    assert (ran.returncode, ran.stderr) == (0, "")
    asked = {re.sub(r".*/|\.onnx", "", call[0]): call for call in calls(tmp_path)}
    assert set(asked) == {"vision_encoder", "projector", "language_model"}
    for part, call in asked.items():
        assert call[:3] == [
            f"--onnx=tensorrt/{part}.onnx",
            f"--saveEngine=tensorrt/engines/orin/{part}.engine.partial",
            "--skipInference",
        ]
        assert call[3:5] == ["--timingCacheFile=tensorrt/timing.cache", "--stronglyTyped"]
        assert (bundle / f"tensorrt/engines/orin/{part}.engine").is_file()
    assert asked["vision_encoder"][5:] == [
        f"--{which}=pixel_values:{n}x3x32x32" for which, n in (("minShapes", 1), ("optShapes", 1), ("maxShapes", 4))
    ]
    least, usual, most = asked["language_model"][5:]
    kinds = [f"past_{kind}.{n}" for n in range(LAYERS) for kind in ("key", "value")]
    for text, which, rows, past in (
        (least, "minShapes", 1, 0),
        (usual, "optShapes", 1, CONTEXT // 2),
        (most, "maxShapes", CHUNK, CONTEXT - 1),
    ):
        shapes = [f"inputs_embeds:1x{rows}x32", *(f"{name}:1x{HEADS}x{past}x16" for name in kinds)]
        assert text == f"--{which}={','.join(shapes)}"
    assert "vlm-export --build ." in ran.stdout


def test_a_flag_that_trtexec_no_longer_knows_is_left_out(script: Script, tmp_path: Path) -> None:
    assert script(flags="--onnx").returncode == 0
    assert not any("--stronglyTyped" in call for call in calls(tmp_path))


def test_finished_engines_are_left_alone(bundle: Path, script: Script, tmp_path: Path) -> None:
    folder = bundle / "tensorrt/engines/device"
    assert script().returncode == 0
    (folder / "projector.engine").unlink()
    before = len(calls(tmp_path))
    assert script().returncode == 0
    assert [call[0] for call in calls(tmp_path)[before:]] == ["--onnx=tensorrt/projector.onnx"]


def test_a_failure_shows_trtexecs_first_error_and_leaves_no_engine(bundle: Path, script: Script) -> None:
    ran = script(fails="yes")
    assert ran.returncode == 1
    assert "trtexec failed; its first error:\n[E] Error[4]: no tactic\n" in ran.stderr
    assert not list(bundle.rglob("*.engine*"))


def test_too_little_memory_is_said_before_the_build(
    bundle: Path, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle / SCRIPT
    text = path.read_text()
    for place, words in ((2, "of memory"), (3, "of disk")):
        lines = [re.sub(r"^build (\w+) (\d+) (\d+)", _huge(place), line) for line in text.splitlines(keepends=True)]
        path.write_text("".join(lines))
        ran = script()
        assert ran.returncode == 2
        assert f"takes about 999999999 MiB {words}" in ran.stderr or f"takes 999999999 MiB {words}" in ran.stderr
        assert not (tmp_path / "calls").exists()
    monkeypatch.setenv("FORCE", "1")
    assert script().returncode == 0


def _huge(place: int) -> Callable[[re.Match[str]], str]:
    return lambda m: " ".join(["build", m[1], *("999999999" if i == place else m[i] for i in (2, 3))])


def test_without_trtexec_it_says_what_to_install(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTEXEC", str(bundle / "none"))
    ran = subprocess.run(["bash", str(bundle / SCRIPT)], capture_output=True, text=True, check=False)
    assert ran.returncode == 3
    assert "install TensorRT (Jetson: JetPack), or set TRTEXEC" in ran.stderr
