"""Core ML packages that lie, are cut short or are random bytes: refused in one line, without a large allocation."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from milpackages import coremltools, mb, numbers, package, state, tensor
from vlm_models.errors import BundleError
from vlm_runtime.mil import Executor, open_package
from vlm_runtime.mil.wire import Unsound, fields

MODEL, WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"
X = numbers((2, 16), 1)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with a weight file, a state and compressed weights. Read only."""

    def build(x: Any, kept: Any) -> Any:
        data = np.arange(512).reshape(32, 16) % 15 - 7
        weight = mb().constexpr_blockwise_shift_scale(
            data=data.astype(np.int8), scale=numbers((32, 1), 2, 0.01).astype(np.float16)
        )
        y = mb().add(x=mb().linear(x=x, weight=weight), y=mb().read_state(input=kept))
        return mb().mul(x=mb().coreml_update_state(state=kept, value=y), y=numbers((32,), 3).astype(np.float16))

    inputs = {"x": tensor(X.shape), "kept": state((2, 32))}
    return package(tmp_path_factory.mktemp("sound") / "p.mlpackage", inputs, build)


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "p.mlpackage"))


def use(folder: Path) -> None:
    """Open and run; whatever is wrong must be one line of BundleError, found with little memory."""
    tracemalloc.start()
    try:
        executor = Executor(open_package(folder))
        executor.run({"x": X}, executor.new_state())
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 64 << 20


def refused(folder: Path, words: str = "p.mlpackage") -> None:
    with pytest.raises(BundleError, match=words) as caught:
        use(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def rewrite(folder: Path, change: Callable[[Any], None]) -> None:
    """Change the specification through coremltools' own classes."""
    model = coremltools().proto.Model_pb2.Model()
    model.ParseFromString((folder / MODEL).read_bytes())
    change(model)
    (folder / MODEL).write_bytes(model.SerializeToString())


def operations(model: Any) -> Any:
    function = model.mlProgram.functions["main"]
    return function.block_specializations[function.opset].operations


def blob(model: Any) -> Any:
    """The first constant in the weight file; asking a map of protobuf for what it lacks would put it in."""
    consts = [op.attributes["val"] for op in operations(model) if op.type == "const"]
    return next(value for value in consts if value.HasField("blobFileValue"))


def test_the_sound_package_runs(sound: Path) -> None:
    use(sound)


def test_metadata_and_description_are_what_coremltools_wrote(sound: Path) -> None:
    opened, spec = open_package(sound), coremltools().models.utils.load_spec(str(sound))
    assert opened.version == spec.specificationVersion
    assert dict(opened.metadata) == dict(spec.description.metadata.userDefined)
    assert {name: list(one.shape) for name, one in opened.descriptions["main"].inputs.items()} == {
        one.name: list(one.type.multiArrayType.shape) for one in spec.description.input
    }
    ours = [(op.type, [name for name, _ in op.outputs]) for op in opened.functions["main"].block.operations]
    assert ours == [(op.type, [one.name for one in op.outputs]) for op in operations(spec)]


def shape_of(op: Any) -> Any:
    return op.outputs[0].type.tensorType.dimensions


def set_offset(model: Any, offset: int) -> None:
    blob(model).blobFileValue.offset = offset


def set_file(model: Any, name: str) -> None:
    blob(model).blobFileValue.fileName = name


def absurd_shape(model: Any) -> None:
    for op in operations(model):
        if op.type == "linear":
            shape_of(op)[0].constant.size = 1 << 40


def absurd_constant(model: Any) -> None:
    blob(model).type.tensorType.dimensions[0].constant.size = 1 << 28


def absurd_state(model: Any) -> None:
    model.description.state[0].type.stateType.arrayType.shape[0] = 1 << 50


def cycle(model: Any) -> None:
    ops = operations(model)
    linear = next(op for op in ops if op.type == "linear")
    linear.inputs["x"].arguments[0].name = ops[-1].outputs[0].name


def deep_blocks(model: Any) -> None:
    op = operations(model)[-1]
    for _ in range(60):
        op = op.blocks.add().operations.add()
        op.type = "cond"


def twice(model: Any) -> None:
    last = operations(model)[-1]
    operations(model).add().CopyFrom(last)


def unknown_operation(model: Any) -> None:
    next(op for op in operations(model) if op.type == "linear").type = "sorcery"


def unknown_input(model: Any) -> None:
    op = next(op for op in operations(model) if op.type == "linear")
    op.inputs["magic"].CopyFrom(op.inputs["x"])


def wrong_type(model: Any) -> None:
    blob(model).type.tensorType.dataType = 11


def huge_fill(model: Any) -> None:
    """Two small inputs, one enormous result."""
    op = next(op for op in operations(model) if op.type == "mul")
    op.type = "tile"
    op.inputs["reps"].arguments.add().value.CopyFrom(immediate([1 << 20, 1 << 20]))
    del op.inputs["y"]


def immediate(numbers: list[int]) -> Any:
    value = coremltools().proto.MIL_pb2.Value()
    value.type.tensorType.dataType, value.type.tensorType.rank = 23, 1
    value.type.tensorType.dimensions.add().constant.size = len(numbers)
    value.immediateValue.tensor.ints.values.extend(numbers)
    return value


LIES: dict[str, tuple[Callable[[Any], None], str]] = {
    "a blob behind the end of the file": (lambda m: set_offset(m, 1 << 40), "blob's header is at"),
    "a blob off its boundary": (lambda m: set_offset(m, 65), "blob's header is at"),
    "a blob that is none": (lambda m: set_offset(m, 0), "blob's header is at"),
    "a blob outside the package": (lambda m: set_file(m, "@model_path/../../../secret"), "not a path in the package"),
    "a blob at an absolute path": (lambda m: set_file(m, "/etc/passwd"), "not a path in the package"),
    "a blob of another type": (wrong_type, "the program says fp32"),
    "an absurd result": (absurd_shape, "is declared with"),
    "an absurd constant": (absurd_constant, "a blob of [0-9]+ bytes for"),
    "an absurd state": (absurd_state, "described with"),
    "a value that depends on itself": (cycle, "before it is computed"),
    "blocks in blocks in blocks": (deep_blocks, "nested too deep"),
    "a value computed twice": (twice, "computed twice"),
    "an unknown operation": (unknown_operation, "operation 'sorcery'"),
    "an unknown input": (unknown_input, "unknown input 'magic'"),
    "an enormous result": (huge_fill, "too large"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_specification_that_lies_is_refused(lie: str, damaged: Path) -> None:
    change, words = LIES[lie]
    rewrite(damaged, change)
    refused(damaged, words)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: shutil.rmtree(p),
        lambda p: (p / "Manifest.json").write_text("{}"),
        lambda p: (p / "Manifest.json").write_text("[" * 100_000),
        lambda p: (p / "Manifest.json").write_text(
            json.dumps({"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "../../outside"}}})
        ),
        lambda p: (p / MODEL).unlink(),
        lambda p: (p / MODEL).write_bytes(b""),
        lambda p: (p / WEIGHTS).unlink(),
        lambda p: (p / WEIGHTS).write_bytes(b""),
        lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:200]),
    ],
    ids=["gone", "empty manifest", "deep manifest", "outside", "no model", "empty", "no weights", "void", "cut"],
)
def test_a_package_with_missing_or_cut_files_is_refused(damaged: Path, damage: Callable[[Path], None]) -> None:
    damage(damaged)
    refused(damaged)


def test_a_link_out_of_the_package_is_refused(damaged: Path, tmp_path: Path) -> None:
    (damaged / WEIGHTS).rename(tmp_path / "elsewhere.bin")
    (damaged / WEIGHTS).symlink_to(tmp_path / "elsewhere.bin")
    refused(damaged, "not a path in the package")


def test_a_blob_whose_header_lies_is_refused(damaged: Path) -> None:
    raw = bytearray((damaged / WEIGHTS).read_bytes())
    for place, words in ((8, "bytes"), (16, "bytes at")):
        changed = bytearray(raw)
        struct.pack_into("<Q", changed, 64 + place, 1 << 50)
        (damaged / WEIGHTS).write_bytes(changed)
        refused(damaged, words)


def test_a_specification_cut_at_any_place_is_refused(damaged: Path) -> None:
    raw = (damaged / MODEL).read_bytes()
    for length in range(0, len(raw), max(1, len(raw) // 150)):
        (damaged / MODEL).write_bytes(raw[:length])
        refused(damaged)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_random_damage_is_refused_in_one_line_or_runs(
    sound: Path, damaged: Path, damage: list[tuple[float, int]]
) -> None:
    raw = bytearray((sound / MODEL).read_bytes())
    for place, byte in damage:
        raw[int(place * len(raw))] = byte
    (damaged / MODEL).write_bytes(raw)
    try:
        use(damaged)
    except BundleError as error:
        assert "\n" not in str(error)  # noqa: PT017 - damage may also fall on what nothing reads


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_a_message_or_unsound(data: bytes) -> None:
    try:
        found = fields(memoryview(data))
    except Unsound:
        return
    assert sum(len(one) for many in found.values() for one in many if not isinstance(one, int)) <= len(data)
