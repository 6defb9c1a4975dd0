"""What the README tells a newcomer to type exists and runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from PIL import Image

import vlm_runtime
from running import running_bundle
from vlm_export.target import target_names
from vlm_quant.recipe import parse_recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], picture: Image.Image
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    running_bundle(tmp_path / "bundle", max_context=1024)
    (tmp_path / "demo").mkdir()
    picture.save(tmp_path / "demo" / "sample.png")
    monkeypatch.chdir(tmp_path)
    load = vlm_runtime.load
    monkeypatch.setattr(vlm_runtime, "load", lambda folder: load(folder, threads=1))
    exec(code, {})
    assert "prefill" in capsys.readouterr().out


def test_every_command_named_exists() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    assert set(re.findall(r"\bvlm-(?:assemble|export|run|serve|bench|demo)\b", README)) == set(scripts)
    for module in re.findall(r"python -m vlm_bench\.(\w+)", README):
        assert (ROOT / f"benchmarks/vlm_bench/{module}.py").is_file(), module
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert set(re.findall(r"make (demo|test|lint|clean)\b", README)) <= set(targets)


def test_every_target_stands_in_the_table_with_its_state() -> None:
    table = README.split("## Targets")[1].split("##")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    there = {name for row in rows if "planned" not in row for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert there == set(target_names())


def test_every_precision_named_is_a_recipe() -> None:
    table = README.split("| `--precision`")[1].split("\n\n")[0]
    names = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert {"fp32", "int4", "auto"} < set(names)
    for name in set(names) - {"auto"}:
        assert str(parse_recipe(name))
