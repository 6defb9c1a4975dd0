"""Device profiles: what a device cannot take is refused before work, and refused rightly: the builder agrees."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tensorrt_rtx

from tensorrt_graphs import linear, save
from vlm_export.tensorrt import devices, plan, sdk, worker
from vlm_export.tensorrt.devices import DEVICES, GIB, find_device, kv_bytes, refuse_memory, why_not
from vlm_export.tensorrt.sdk import Gpu, Sdk
from vlm_models.errors import DependencyError, InputError, RecipeError
from vlm_models.spec import LanguageSpec
from vlm_quant.recipe import Precision, parse_recipe

RTX = Sdk("tensorrt_rtx", "1.7.1.116", ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"))
FULL = Sdk("tensorrt", "10.13.3.9")
LANGUAGE = cast(LanguageSpec, SimpleNamespace(layers=32, kv_heads=32, head_dim=128))  # LLaVA-1.5-7B
KINDS = ("fp32", "fp16", "bf16", "int8", "int4", "w8a8", "fp8")


def precision(text: str) -> Precision:
    return parse_recipe(f"language={text}").language


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`machine(sdks, gpu)`: by default one without a GPU, where TensorRT-RTX is installed."""

    def of(sdks: list[Sdk], gpu: Gpu | None = None) -> None:
        for module in (plan, sdk):
            monkeypatch.setattr(module, "gpu_at_hand", lambda: gpu)
        monkeypatch.setattr(plan, "find_sdks", lambda: {one.name: one for one in sdks})

    of([RTX])
    return of


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Whether the builder itself makes an engine of a linear layer at a precision, for a compute capability."""
    folder = tmp_path_factory.mktemp("linears")

    def build(kind: str, capability: str) -> bool:
        graph = folder / f"{kind}.onnx"
        if not graph.exists():
            save(linear(kind), graph)
        engine, asked = str(folder / "engine"), [capability]
        request = {"graph": str(graph), "io": {}, "capabilities": asked, "engine": engine, "timing_cache": None}
        with contextlib.suppress(worker.RefusedError):
            return bool(worker._build(tensorrt_rtx, request, lambda message: None)["bytes"])
        return False

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_the_builder_takes_what_the_table_allows_and_nothing_else(kind: str, builds: Any) -> None:
    for name in ("t4", "a100", "rtx30", "rtx40", "rtx50", "spark"):
        allowed = why_not(DEVICES[name], precision(kind)) is None
        assert builds(kind, DEVICES[name].capability) == allowed, f"{kind} on {name}"


def test_the_sdk_is_asked_what_it_builds_for() -> None:
    assert {DEVICES[name].capability for name in ("t4", "a100", "rtx30", "rtx40", "rtx50", "spark")} == set(
        worker._probe(tensorrt_rtx)["capabilities"]
    )


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("orin", "fp8", "8-bit floats came with Ada (8.9): take int8 or w8a8"),
        ("rtx30", "fp16;lm_head=fp8", "8-bit floats came with Ada"),
        ("t4", "int4:g128", "4-bit weights need Ampere"),
        ("t4", "bf16", "bfloat16 came with Ampere"),
    ],
)
def test_a_precision_that_a_device_cannot_take_is_refused_with_the_reason(name: str, text: str, reason: str) -> None:
    with pytest.raises(RecipeError) as error:
        plan.devices_of([name], {"language_model": precision(text)})
    assert reason in str(error.value)
    assert f"device profile {name!r} (compute capability {DEVICES[name].capability}) cannot take" in str(error.value)
    assert f"language={precision(text)}" in str(error.value)


def test_one_device_with_an_old_parser_keeps_all_graphs_old() -> None:
    assert devices.opset_of([]) == devices.opset_of(["rtx40", "rtx50"]) == 23
    assert devices.opset_of(["rtx40", "orin:16"]) == 21


def test_an_unknown_profile_lists_them_all() -> None:
    with pytest.raises(InputError, match=r"unknown device profile 'rtx60': choose one of t4, rtx20, .*orin.*thor"):
        find_device("rtx60")


def test_a_profile_may_name_the_memory_of_the_board() -> None:
    assert find_device("rtx40:24").memory == find_device("RTX40:24GB").memory == 24 * GIB
    for wrong in ("rtx40:", "rtx40:lots", "rtx40:0", "rtx40:1.5"):
        with pytest.raises(InputError, match=r"write whole GB, as in 'rtx40:24'"):
            find_device(wrong)


def test_a_cache_that_does_not_fit_is_refused_with_the_sum_and_a_context_that_fits() -> None:
    weights = {"language_model": 3.6 * GIB, "vision_encoder": 0.3 * GIB}
    per_position = kv_bytes(LANGUAGE, Precision("int4"), "scatter")
    assert per_position == 2 * 32 * 32 * 128 * 2
    assert kv_bytes(LANGUAGE, Precision("fp32"), "concat") == 4 * per_position
    with pytest.raises(InputError) as error:
        refuse_memory(DEVICES["orin"], weights, per_position, 8192)
    text = "language_model 3.60 + vision_encoder 0.30 + KV cache of 8192 positions 4.00 = 7.90 GiB do not fit"
    assert text in str(error.value)
    assert "device profile 'orin': 8 GB leave 6.00 GiB" in str(error.value)
    fits = int(str(error.value).split("--max-context to ")[1].split(",")[0])
    refuse_memory(DEVICES["orin"], weights, per_position, fits)
    with pytest.raises(InputError):
        refuse_memory(DEVICES["orin"], weights, per_position, fits + 1)
    refuse_memory(find_device(str(error.value).rsplit("'", 2)[1]), weights, per_position, 8192)  # the board it names


def test_weights_alone_that_do_not_fit_ask_for_fewer_bits() -> None:
    with pytest.raises(InputError, match=r"take fewer bits"):
        refuse_memory(DEVICES["orin"], {"language_model": 13 * GIB}, 1 << 20, 100)


def test_without_a_gpu_engines_are_for_the_usual_boards_that_take_the_precision() -> None:
    def names(text: str) -> list[str]:
        return [device.name for device in plan.devices_of([], {"language_model": precision(text)})]

    assert names("int4") == ["rtx30", "rtx40", "rtx50"]
    assert names("fp8") == ["rtx40", "rtx50"]


def test_boards_share_one_engine_but_turing_has_its_own_and_jetsons_build_for_themselves() -> None:
    names = ["rtx30", "a10", "rtx40", "t4", "orin"]
    steps, later = plan.steps(plan.devices_of(names, {"language_model": Precision("fp16")}))
    assert [(step.name, step.capabilities) for step in steps] == [
        ("rtx30-a10-rtx40", ["8.6", "8.9"]),
        ("t4", ["7.5"]),
    ]
    assert [device.name for device in later] == ["orin"]
    with pytest.raises(DependencyError, match=r"'orin'.*vlm-export --build BUNDLE or the bundle's tensorrt/build\.sh"):
        plan.refuse_later(later)


def test_tensorrt_builds_for_the_gpu_at_hand_and_rtx_for_the_others(machine: Any) -> None:
    machine([FULL, RTX], Gpu("Orin", "8.7", 16 * GIB))
    fp16 = {"language_model": Precision("fp16")}
    (at_hand,) = plan.devices_of([], fp16)
    assert (at_hand.name, at_hand.memory) == ("orin", 16 * GIB)
    steps, later = plan.steps([at_hand, DEVICES["rtx40"]])
    assert [(step.sdk, step.name) for step in steps] == [(FULL, "orin"), (RTX, "rtx40")]
    assert later == []
    machine([FULL], Gpu("GB300", "10.3", 200 * GIB))
    assert [device.name for device in plan.devices_of([], fp16)] == ["sm103"]


def test_a_gpu_that_rtx_does_not_know_leaves_the_usual_boards(machine: Any) -> None:
    machine([RTX], Gpu("H200", "9.0", 139 * GIB))
    devices = plan.devices_of([], {"language_model": Precision("fp16")})
    assert [device.name for device in devices] == ["rtx30", "rtx40", "rtx50"]


def test_without_an_sdk_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdk.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"neither .* is installed\): pip install 'vlm-export\[tensorrt\]'"):
        sdk.find_sdks()


def test_a_folder_called_tensorrt_is_not_the_sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sdk, "gpu_at_hand", lambda: Gpu("any", "8.6", GIB))
    assert list(sdk.find_sdks()) == ["tensorrt_rtx"]


def test_an_sdk_that_does_not_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sdk, "LABELS", {"tensorrt": "TensorRT"})
    monkeypatch.setattr(sdk, "gpu_at_hand", lambda: Gpu("any", "8.6", GIB))
    with pytest.raises(DependencyError, match=r"tensorrt is installed but does not load: libnvinfer\.so\.10: cannot"):
        sdk.find_sdks()


def test_every_profile_can_be_named_in_a_folder() -> None:
    assert all(name.isalnum() and name.islower() and device.name == name for name, device in DEVICES.items())
    assert set(devices.DEFAULTS) <= set(DEVICES)
