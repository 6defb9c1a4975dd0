"""The executor on programs: states, branches, overflow, ranges, drift, and mutations that must not pass the gate."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from milpackages import coremltools, mb, numbers, package, state, tensor
from vlm_models.errors import BundleError
from vlm_runtime.mil import Executor, open_package
from vlm_runtime.mil.executor import _Prepared
from vlm_runtime.mil.watch import first_drift, ranges, relative_l2, values

Array = NDArray[Any]
ROWS, WIDTH = 4, 4
MASK = np.triu(np.full((ROWS, ROWS), -1e4, np.float32), 1)
MODEL, WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"
MATRICES = {name: numbers((WIDTH, WIDTH), seed) for seed, name in enumerate(("query", "key", "value"), 1)}


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masked attention of one head over its input; rows as many as channels, so that a wrong axis fits."""

    def build(x: Any, mask: Any) -> Any:
        q, k, v = (mb().linear(x=x, weight=matrix.astype(np.float16), name=name) for name, matrix in MATRICES.items())
        turned = mb().transpose(x=k, perm=[1, 0], name="turned")
        scores = mb().add(x=mb().matmul(x=q, y=turned), y=mask, name="masked")
        return mb().matmul(x=mb().softmax(x=scores, axis=-1), y=v, name="out")

    inputs = {"x": tensor((ROWS, WIDTH)), "mask": tensor(MASK.shape)}
    return package(tmp_path_factory.mktemp("attention") / "p.mlpackage", inputs, build)


X = numbers((ROWS, WIDTH), 9)
FEEDS = {"x": X, "mask": MASK}


def attended(x: Array) -> Array:
    q, k, v = (x @ matrix.T for matrix in MATRICES.values())
    scores = np.exp(q @ k.T + MASK - (q @ k.T + MASK).max(-1, keepdims=True))
    return np.asarray(scores / scores.sum(-1, keepdims=True) @ v)


def passes(folder: Path) -> bool:
    """The gate of an export at fp16: relative L2 of 1e-2 and the same largest number."""
    got, want = Executor(open_package(folder)).run(FEEDS).outputs["out"], attended(X)
    return relative_l2(got, want) <= 1e-2 and bool((got.argmax(-1) == want.argmax(-1)).all())


def rewrite(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    """Change one operation of a package."""
    model = coremltools().proto.Model_pb2.Model()
    model.ParseFromString((folder / MODEL).read_bytes())
    function = model.mlProgram.functions["main"]
    ops = function.block_specializations[function.opset].operations
    change(next(op for op in ops if op.outputs and op.outputs[0].name == name))
    (folder / MODEL).write_bytes(model.SerializeToString())


def drop_mask(op: Any) -> None:
    op.type = "identity"
    del op.inputs["y"]


def other_axis(op: Any) -> None:
    op.type = "identity"
    del op.inputs["perm"]


def changed_weight(folder: Path) -> None:
    """The sign of one weight of "key"."""
    raw, wanted = bytearray((folder / WEIGHTS).read_bytes()), MATRICES["key"].astype("<f2").tobytes()
    raw[raw.index(wanted) + 2 * int(np.abs(MATRICES["key"]).argmax()) + 1] ^= 0x80
    (folder / WEIGHTS).write_bytes(raw)


MUTATIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a changed weight": (changed_weight, "key"),
    "a transposed axis": (lambda folder: rewrite(folder, "turned", other_axis), "turned"),
    "a dropped mask": (lambda folder: rewrite(folder, "masked", drop_mask), "masked"),
}


def test_a_sound_package_passes_the_gate_and_drifts_nowhere(attention: Path) -> None:
    assert passes(attention)
    executor, exact = Executor(open_package(attention)), Executor(open_package(attention), exact=True)
    reference = values(exact, FEEDS)
    np.testing.assert_allclose(reference["out"], attended(X), rtol=1e-5, atol=1e-6)
    assert first_drift(executor, FEEDS, reference) is None
    drift = first_drift(executor, FEEDS, reference, limit=0.0)
    assert drift is not None
    assert (drift.name, drift.op) == ("query", "linear")


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_fails_the_gate_and_is_the_first_drift(mutation: str, attention: Path, tmp_path: Path) -> None:
    change, name = MUTATIONS[mutation]
    mutant = Path(shutil.copytree(attention, tmp_path / "p.mlpackage"))
    change(mutant)
    assert not passes(mutant)
    drift = first_drift(Executor(open_package(mutant)), FEEDS, values(Executor(open_package(attention)), FEEDS))
    assert drift is not None
    assert drift.name == name


def test_names_that_a_precision_changed_are_compared_all_the_same(attention: Path) -> None:
    reference = {"query_cast_fp16": 2 * X @ MATRICES["query"].T}
    drift = first_drift(Executor(open_package(attention)), FEEDS, reference)
    assert drift is not None
    assert drift.relative_l2 == pytest.approx(0.5, abs=1e-3)


def test_overflow_of_float16_is_reported_by_operation_and_a_mask_of_infinities_is_not(attention: Path) -> None:
    executor = Executor(open_package(attention))
    infinite = {"x": X, "mask": np.where(MASK < 0, np.float32(-np.inf), 0)}
    outcome = executor.run(infinite)
    assert outcome.overflows == ()
    np.testing.assert_allclose(outcome.outputs["out"], attended(X), atol=1e-2)
    large = executor.run({"x": X * 20_000, "mask": MASK})
    first = large.overflows[0]
    assert (first.name, first.op) == ("query", "linear")
    assert first.largest == pytest.approx(np.abs(20_000 * X @ MATRICES["query"].T).max(), rel=1e-3)
    assert Executor(open_package(attention), exact=True).run({"x": X * 20_000, "mask": MASK}).overflows == ()


def test_ranges_are_those_of_all_samples(attention: Path) -> None:
    found = ranges(attention, [{"x": X * n, "mask": MASK} for n in (3, 1)])
    assert found["x"] == (pytest.approx(3 * X.min(), rel=1e-3), pytest.approx(3 * X.max(), rel=1e-3))
    assert found["query"][1] == pytest.approx((3 * X @ MATRICES["query"].T).max(), rel=1e-3)
    assert set(found) >= {"x", "mask", "query", "key", "value", "turned", "masked", "out"}


def test_feeds_and_functions_that_are_not_the_packages_are_refused(attention: Path) -> None:
    executor = Executor(open_package(attention))
    with pytest.raises(BundleError, match="takes x, mask and states none; it was given x"):
        executor.run({"x": X})
    with pytest.raises(BundleError, match=r"'x' is declared as fp16\[4, 4\], it is \(2, 4\)"):
        executor.run({"x": X[:2], "mask": MASK})
    with pytest.raises(BundleError, match="no function 'decode'; it has main"):
        executor.run(FEEDS, function="decode")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of a cache written at `position`, one after the other, and a part that was read before."""

    def build(rows: Any, position: Any, kept: Any) -> list[Any]:
        held = mb().read_state(input=kept)
        before = mb().slice_by_size(x=held, begin=[2, 0, 0], size=[1, 8, 2], name="before")
        seen = []
        for layer in range(3):
            begin = mb().concat(values=[np.int32([layer]), position, np.int32([0])], axis=0)
            stop = mb().add(x=position, y=np.int32([2]))
            end = mb().concat(values=[np.int32([layer + 1]), stop, np.int32([2])], axis=0)
            update = mb().mul(x=rows, y=np.float16(layer + 1))
            held = mb().coreml_update_state(
                state=kept, value=mb().slice_update(x=held, update=update, begin=begin, end=end)
            )
            seen.append(mb().identity(x=mb().slice_by_size(x=held, begin=[layer, 0, 0], size=[1, 8, 2])))
        picked = mb().cond(
            pred=mb().squeeze(x=mb().greater(x=position, y=np.int32([0]))),
            _true_fn=lambda: mb().add(x=rows, y=np.float16(1)),
            _false_fn=lambda: mb().identity(x=rows),
            name="picked",
        )
        return [mb().identity(x=before, name="old"), mb().concat(values=seen, axis=0, name="new"), picked]

    inputs = {"rows": tensor((1, 2, 2)), "position": tensor((1,), "int32"), "kept": state((3, 8, 2))}
    return package(tmp_path_factory.mktemp("cache") / "p.mlpackage", inputs, build)


def test_states_are_written_where_they_lie_and_what_was_read_before_stays(cache: Path) -> None:
    executor = Executor(open_package(cache))
    kept, want = executor.new_state(), np.zeros((3, 8, 2), np.float32)
    for step, position in enumerate((0, 2, 1)):
        rows, old = numbers((1, 2, 2), step), want[2:].copy()
        want[:, position : position + 2] = rows * np.arange(1, 4, dtype=np.float32)[:, None, None]
        want = want.astype(np.float16).astype(np.float32)
        outputs = executor.run({"rows": rows, "position": np.int32([position])}, kept).outputs
        np.testing.assert_array_equal(outputs["old"], old)
        np.testing.assert_array_equal(outputs["new"], want)
        np.testing.assert_array_equal(kept["kept"], want)
        picked = (rows + 1).astype(np.float16) if position else rows
        np.testing.assert_array_equal(outputs["picked"], picked)


def test_a_cache_is_copied_only_while_an_older_reading_of_it_is_alive(cache: Path) -> None:
    executor = Executor(open_package(cache))
    function = executor.package.functions["main"]
    prepared = _Prepared(function, executor._constants)
    updates = [step for step in prepared.steps(function.block) if step.op.type == "slice_update"]
    # "before" is read at the end; so is each layer's own part, which later layers must not touch.
    assert [step.in_place for step in updates] == [False, False, False]


def test_a_state_of_another_shape_or_type_is_refused(cache: Path) -> None:
    executor = Executor(open_package(cache))
    feeds = {"rows": numbers((1, 2, 2)), "position": np.int32([0])}
    with pytest.raises(BundleError, match="states kept; it was given"):
        executor.run(feeds)
    with pytest.raises(BundleError, match=r"'kept' is declared as fp16\[3, 8, 2\], it is \(3, 8\)"):
        executor.run(feeds, {"kept": np.zeros((3, 8), np.float16)})
    with pytest.raises(BundleError, match="make it with new_state"):
        executor.run(feeds, {"kept": np.zeros((3, 8, 2), np.int8)})
