"""The lint of Core ML packages: each rule finds its fault in a package that has it, and nothing in one that has not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mil_programs
from vlm_export.coreml import lint as rules
from vlm_export.coreml.lint import OPERATIONS, lint, notes
from vlm_export.coreml.sdk import coremltools
from vlm_models.errors import BundleError, CheckError

Build = Callable[[Any, Any], Any]


def package(folder: Path, build: Build, **shapes: tuple[int, ...]) -> Path:
    """A package whose function takes float16 inputs of `shapes`."""
    mil = coremltools("converters.mil.mil")
    specs = {name: mil.Builder.TensorSpec(shape, mil.types.fp16) for name, shape in shapes.items()}
    return mil_programs.saved(mil_programs.one_function(specs, build), folder / "part.mlpackage")


def change(path: Path, edit: Callable[[Any], object]) -> Path:
    """Let `edit` change the package's specification."""
    file = path / "Data/com.apple.CoreML/model.mlmodel"
    model = coremltools("proto.Model_pb2").Model()
    model.ParseFromString(file.read_bytes())
    edit(model)
    file.write_bytes(model.SerializeToString())
    return path


def operations(model: Any) -> Any:
    function = model.mlProgram.functions["main"]
    return function.block_specializations[function.opset].operations


@pytest.fixture
def stateful(tmp_path: Path) -> Path:
    return mil_programs.saved(mil_programs.with_state(), tmp_path / "stateful.mlpackage")


def test_a_sound_package_has_no_findings(tmp_path: Path) -> None:
    path = package(tmp_path, lambda mb, i: [mb.relu(x=i["x"], name="y")], x=(4, 64))
    assert lint(path) == notes(path) == []


def test_a_state_that_the_description_lacks_is_refused(stateful: Path) -> None:
    assert not any("refuses" in line for line in lint(stateful))
    change(stateful, lambda model: model.description.ClearField("state"))
    assert lint(stateful)[0] == "Core ML refuses it: state 'cache' of function 'main' is not in the description"
    with pytest.raises(CheckError, match=r"stateful\.mlpackage would not load: state 'cache'"):
        notes(stateful)


def test_a_state_that_no_function_takes_is_refused(stateful: Path) -> None:
    def rename(model: Any) -> None:
        model.description.state.add().CopyFrom(model.description.state[0])
        model.description.state[1].name = "other"

    assert "state 'other' is described, but no input of function 'main'" in lint(change(stateful, rename))[0]


def test_tensors_of_more_than_five_axes_are_refused(tmp_path: Path) -> None:
    path = package(tmp_path, lambda mb, i: [mb.square(x=mb.relu(x=i["x"], name="between"), name="y")], x=(4, 64))

    def lengthen(model: Any) -> None:  # coremltools writes none
        tensor = next(op for op in operations(model) if op.type == "relu").outputs[0].type.tensorType
        tensor.rank = 6
        for _ in range(4):
            tensor.dimensions.add().constant.size = 1

    assert lint(change(path, lengthen))[0] == "Core ML refuses it: relu 'between' has 6 axes, more than 5"


def test_an_operation_that_ios_18_does_not_know_is_refused(tmp_path: Path) -> None:
    path = package(tmp_path, lambda mb, i: [mb.relu(x=i["x"], name="y")], x=(4, 64))

    def rename(model: Any) -> None:
        next(op for op in operations(model) if op.type == "relu").type = "swish7"

    assert lint(change(path, rename)) == ["Core ML refuses it: operation 'swish7' is not one of iOS 18's"]


def test_outputs_described_with_another_type_or_shape_are_refused(tmp_path: Path) -> None:
    path = package(tmp_path, lambda mb, i: [mb.relu(x=i["x"], name="y")], x=(4, 64))

    def reshape(model: Any) -> None:
        model.description.output[0].type.multiArrayType.shape[:] = [64, 4]

    assert lint(change(path, reshape)) == [
        "Core ML refuses it: 'y' of function 'main' is described as fp16[64, 4], it is fp16[4, 64]"
    ]


def test_a_newer_specification_or_opset_is_refused(tmp_path: Path) -> None:
    path = package(tmp_path, lambda mb, i: [mb.relu(x=i["x"], name="y")], x=(4, 64))
    change(path, lambda model: setattr(model, "specificationVersion", 10))
    assert "specification version 10 is newer than iOS 18's 9" in lint(path)[0]

    def older(model: Any) -> None:
        function = model.mlProgram.functions["main"]
        function.block_specializations["CoreML7"].CopyFrom(function.block_specializations[function.opset])
        function.opset = "CoreML7"

    assert any("opset CoreML7, not CoreML8" in line for line in lint(change(path, older)))


@pytest.mark.parametrize(("rows", "found"), [(70000, True), (60000, False)])
def test_rows_beyond_a_16_bit_index_are_noted(tmp_path: Path, rows: int, found: bool) -> None:
    def build(mb: Any, inputs: Any) -> list[Any]:
        index = mb.cast(x=inputs["x"], dtype="int32")
        return [mb.gather(x=np.ones((rows, 32), np.float16), indices=index, axis=0, name="y")]

    lines = lint(package(tmp_path, build, x=(4,)))
    assert any(f"picks among {rows} rows: a 16-bit index reaches 65536" in line for line in lines) == found


def test_axes_that_the_neural_engine_pads_are_noted_with_the_largest(tmp_path: Path) -> None:
    def build(mb: Any, inputs: Any) -> list[Any]:
        return [mb.transpose(x=mb.relu(x=inputs["x"]), perm=[1, 0], name="y")]

    (line,) = lint(package(tmp_path, build, x=(4, 64)))
    assert line == (
        "function 'main': the Neural Engine pads 1 of 2 tensors to twice their size or more; "
        "the largest is 'y' fp16[64, 4], 8 times"
    )


def test_control_flow_is_noted(tmp_path: Path) -> None:
    def build(mb: Any, inputs: Any) -> list[Any]:
        first = mb.reduce_max(x=inputs["x"], axes=[0], keep_dims=False)
        return [mb.cond(pred=mb.greater(x=first, y=np.float16(0)), _true_fn=lambda: mb.relu(x=inputs["x"], name="a"),
                        _false_fn=lambda: mb.square(x=inputs["x"], name="b"), name="y")]  # fmt: skip

    assert "function 'main' has 1 cond, which the Neural Engine does not run" in lint(package(tmp_path, build, x=(64,)))


def test_memory_is_set_against_what_an_app_may_use(stateful: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("memory" in line for line in lint(stateful))
    monkeypatch.setattr(rules, "_DEVICES", {"100 bytes": 100, "1 GB": 1 << 30})
    lines = [line for line in lint(stateful) if "half of a device's memory" in line]
    assert len(lines) == 1
    assert lines[0].endswith("so not on those of 100 bytes")


def test_weights_that_iphones_refuse_on_the_neural_engine_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = np.ones((64, 64), np.float16)
    path = package(tmp_path, lambda mb, i: [mb.linear(x=i["x"], weight=table, name="y")], x=(4, 64))
    assert lint(path) == []
    monkeypatch.setattr(rules, "_ENGINE_WEIGHTS", 8000)
    (line,) = lint(path)
    assert "more than about 1 GB in one package" in line


def test_a_damaged_package_is_an_error_and_no_finding(stateful: Path) -> None:
    (stateful / "Manifest.json").write_text("{}")
    with pytest.raises(BundleError, match="Manifest"):
        lint(stateful)


def test_the_list_of_operations_is_coremltools_own_for_ios_18() -> None:
    registry, target = coremltools("converters.mil.mil.ops.registry").SSAOpRegistry, coremltools().target
    known = {name for name, made in registry.core_ops.items() if any(t <= target.iOS18 for t in made)}
    left_out = known - OPERATIONS
    assert OPERATIONS - known == {"write_state", "coreml_update_state"} - known
    assert all(
        name.startswith(("random_", "list_")) or name in ("make_list", "classify", "_const_symbolic")
        for name in left_out
    )
