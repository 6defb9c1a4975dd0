"""Engine coreml off a Mac: what it says on Linux, and that it drives Core ML's interface as coremltools defines it."""

from __future__ import annotations

import platform
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mil_programs
from vlm_export.coreml.sdk import coremltools
from vlm_models.errors import BundleError, DependencyError
from vlm_runtime.engine import find_engine
from vlm_runtime.engines.coreml import CoreMLFunctions, available
from vlm_runtime.mil import Executor, open_package


class FakeModel:
    """MLModel with the signature of coremltools 9, run by our executor."""

    made: list[FakeModel]

    def __init__(self, model: str, *, compute_units: str, function_name: str | None = None) -> None:
        assert compute_units == "ALL"
        self.package, self.function = open_package(model), function_name
        self.executor = Executor(self.package)
        FakeModel.made.append(self)

    def make_state(self) -> Any:
        return self.executor.new_state(self.function)

    def predict(self, data: dict[str, Any], state: Any = None) -> dict[str, Any]:
        feeds = dict(data)
        data.clear()  # coremltools changes what it is given
        return dict(self.executor.run(feeds, state, function=self.function).outputs)


@pytest.fixture
def stateful(tmp_path: Path) -> Path:
    return mil_programs.saved(mil_programs.with_state(), tmp_path / "stateful.mlpackage")


@pytest.fixture
def core_ml(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeModel.made = []
    fake = types.ModuleType("coremltools")
    fake.__dict__.update(models=types.SimpleNamespace(MLModel=FakeModel), ComputeUnit=types.SimpleNamespace(ALL="ALL"))
    monkeypatch.setitem(sys.modules, "coremltools", fake)


def test_off_a_mac_it_names_the_engine_that_reads_the_same_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    with pytest.raises(DependencyError, match="needs macOS 15 or later: use --engine mil") as caught:
        find_engine("coreml").available()
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("version", "runs"), [("14.7.1", False), ("15.0", True), ("26.1", True), ("", False)])
def test_it_asks_for_the_first_macos_with_states(monkeypatch: pytest.MonkeyPatch, version: str, runs: bool) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: (version, ("", "", ""), "arm64"))
    if runs:
        available()
    else:
        with pytest.raises(DependencyError, match="macOS 15"):
            available()


def test_the_state_lives_in_core_ml_and_is_made_once(stateful: Path, core_ml: None) -> None:
    functions = CoreMLFunctions(open_package(stateful))
    row, held = np.ones((1, 4), np.float32), {"cache": np.zeros((mil_programs.CONTEXT, 4), np.float16)}
    totals = [float(functions.run({"row": row}, held).outputs["total"].item()) for _ in range(3)]
    assert totals == [32, 64, 96], "the cache was made anew"
    assert not held["cache"].any(), "NumPy's cache is not the one that runs"
    assert len(FakeModel.made) == 1, "the package was loaded twice"
    assert FakeModel.made[0].function is None


def test_what_core_ml_says_becomes_one_line(stateful: Path, core_ml: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FakeModel, data: Any, state: Any = None) -> Any:
        raise Exception("Error compiling model:\nlong story")

    monkeypatch.setattr(FakeModel, "predict", refuse)
    with pytest.raises(
        BundleError, match=r"stateful\.mlpackage cannot be run by Core ML \(Error compiling model:\)"
    ) as caught:
        CoreMLFunctions(open_package(stateful)).run({"row": np.ones((1, 4), np.float32)}, {})
    assert "\n" not in str(caught.value)


def test_coremltools_still_has_the_calls_that_the_engine_makes() -> None:
    model = coremltools("models").MLModel
    names = model.__init__.__code__.co_varnames
    assert {"compute_units", "function_name"} <= set(names)
    assert model.predict.__code__.co_varnames[1:3] == ("data", "state")
    assert callable(model.make_state)
