"""Engine "tensorrt" without a GPU: what it says, and that it drives both SDKs and CUDA as they ask, over stand-ins."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fake_cuda import Attribute, FakeCuda, Kind
from fake_tensorrt_runtime import VERSIONS, FakeTensorRT, Strategy, engine_file, install
from running import HIDDEN, IMAGE_TOKENS
from tensorrt_layout import CHUNK, CONTEXT, io, opened, plain_logits, replaced
from vlm_models.errors import BundleError, DependencyError, InputError, PromptError
from vlm_runtime import tensorrt_engine
from vlm_runtime.bundle import Bundle
from vlm_runtime.cuda import Gpu, Memory, check_device
from vlm_runtime.engine import Options, find_engine
from vlm_runtime.engines import tensorrt as engine
from vlm_runtime.engines import tensorrt_onnx
from vlm_runtime.vlm import load

FORMS = [(kv, dtype) for kv in ("concat", "scatter") for dtype in ("fp32", "fp16", "bf16")]
BATCH = 2


def built(
    folder: Path, kv: str, dtype: str = "fp32", sdk: str = "tensorrt_rtx", *, on_host: tuple[str, ...] = ()
) -> Bundle:
    """A bundle with an engine of each part for compute capability 8.9."""
    most = {"inputs_embeds": CHUNK, "pixel_values": BATCH, "image_features": BATCH}
    most |= {f"past_{kind}.{layer}": CONTEXT for kind in ("key", "value") for layer in range(2)}
    for part in ("vision_encoder", "projector", "language_model"):
        path = folder / f"tensorrt/engines/rtx40/{part}.engine"
        engine_file(path, folder / f"tensorrt/{part}.onnx", most, on_host if part == "language_model" else ())
    listed = {"file": "tensorrt/engines/rtx40/{part}.engine", "profile": "rtx40", "compute_capabilities": ["8.9"]}
    return opened(
        folder, kv, dtype, engines=[{**listed, "sdk": sdk, "version": VERSIONS[sdk], "bytes": 7, "layers": {}}]
    )


Built = Callable[..., Bundle]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Built:
    made: dict[tuple[Any, ...], Bundle] = {}

    def make(kv: str = "scatter", dtype: str = "fp32", sdk: str = "tensorrt_rtx", **options: Any) -> Bundle:
        key = (kv, dtype, sdk, *options.items())
        if key not in made:
            made[key] = built(tmp_path_factory.mktemp("built") / "bundle", kv, dtype, sdk, **options)
        return made[key]

    return make


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((CONTEXT, HIDDEN)).astype(np.float32)


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> FakeTensorRT:
    return install(monkeypatch, "tensorrt_rtx", cuda)


def assert_close(got: np.ndarray, want: np.ndarray, dtype: str = "fp32") -> None:
    close = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}[dtype]
    np.testing.assert_allclose(got, want, atol=close * np.abs(want).max())


@pytest.mark.parametrize("sdk", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize(("kv", "dtype"), FORMS)
def test_chunks_decode_and_rewind_equal_attention_without_a_cache(
    bundle: Built, rows: np.ndarray, kv: str, dtype: str, sdk: str, monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda
) -> None:
    install(monkeypatch, sdk, cuda)
    opened = bundle(kv, dtype, sdk)
    want = plain_logits(rows, opened.spec.language.vocab_size, dtype)
    decoder = engine.decoder(opened, Options())
    assert_close(decoder.prefill(rows[:17]), want[16], dtype)  # chunks of 8, 8 and 1
    for n in range(17, CONTEXT):
        assert_close(decoder.decode(rows[n]), want[n], dtype)
    decoder.rewind(7)
    decoder.prefill(rows[::-1][:5])
    decoder.rewind(9)
    decoder.rewind(7)
    assert_close(decoder.prefill(rows[7:12]), want[11], dtype)
    for n in range(12, 15):
        assert_close(decoder.decode(rows[n]), want[n], dtype)
    decoder.rewind(0)
    assert_close(decoder.decode(rows[0]), want[0], dtype)
    assert_close(decoder.decode(rows[1]), want[1], dtype)


def test_decode_is_captured_once_for_tensorrt_and_launched_from_then_on(
    bundle: Built, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda
) -> None:
    trt = install(monkeypatch, "tensorrt", cuda)
    opened = bundle("scatter", "fp16", "tensorrt")
    decoder = engine.decoder(opened, Options())
    decoder.prefill(rows[:9])
    for n in range(9, 15):
        decoder.decode(rows[n])
    prefill, decode = trt.contexts
    assert prefill.runs == 1, "the last row of the prompt went through another context than a decode step"
    assert decode.runs == 2, "one step as it is and one capture"
    assert cuda.launches == 6


def test_what_cannot_be_captured_runs_without(
    bundle: Built, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda
) -> None:
    trt = install(monkeypatch, "tensorrt", cuda)
    cuda.can_capture = False
    opened = bundle("scatter", "fp32", "tensorrt")
    want = plain_logits(rows, opened.spec.language.vocab_size, "fp32")
    decoder = engine.decoder(opened, Options())
    for n in range(5):
        assert_close(decoder.decode(rows[n]), want[n])
    assert cuda.launches == 0
    assert trt.contexts[1].runs == 6, "it tried to capture more than once"


def test_tensorrt_rtx_captures_only_decode_and_by_itself(bundle: Built, cuda: FakeCuda, rtx: FakeTensorRT) -> None:
    decoder = engine.decoder(bundle("scatter"), Options())
    assert [context.strategy for context in rtx.contexts] == [Strategy.DISABLED, Strategy.WHOLE_GRAPH_CAPTURE]
    decoder.prefill(np.ones((3, HIDDEN), np.float32))
    for _ in range(3):
        decoder.decode(np.ones(HIDDEN, np.float32))
    assert [context.runs for context in rtx.contexts] == [1, 3]
    assert cuda.launches == 0


def test_a_growing_cache_has_one_context_and_no_graph(bundle: Built, cuda: FakeCuda, rtx: FakeTensorRT) -> None:
    decoder = engine.decoder(bundle("concat"), Options())
    for _ in range(3):
        decoder.decode(np.ones(HIDDEN, np.float32))
    assert [context.strategy for context in rtx.contexts] == [Strategy.DISABLED]
    assert cuda.launches == 0


@pytest.mark.parametrize("kv", ["concat", "scatter"])
def test_a_position_that_decides_shapes_is_read_from_the_host(
    bundle: Built, rows: np.ndarray, kv: str, monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda
) -> None:
    install(monkeypatch, "tensorrt", cuda)
    opened = bundle(kv, "fp32", "tensorrt", on_host=("position",))
    want = plain_logits(rows, opened.spec.language.vocab_size, "fp32")
    decoder = engine.decoder(opened, Options())
    decoder.prefill(rows[:11])
    for n in range(11, 14):
        assert_close(decoder.decode(rows[n]), want[n])
    assert cuda.launches == 0, "a graph keeps the shapes that it was captured with"


def test_a_smaller_context_takes_less_memory_where_the_cache_grows(
    bundle: Built, rows: np.ndarray, cuda: FakeCuda, rtx: FakeTensorRT
) -> None:
    def used(**options: Any) -> int:
        decoder = engine.decoder(bundle("concat"), Options(**options))
        size = sum(map(len, cuda.device.values()))
        assert decoder.max_context == options.get("max_context", CONTEXT)
        return size

    assert used() - used(max_context=10) >= 2 * 4 * (CONTEXT - 10) * 2 * 16 * 4
    decoder = engine.decoder(bundle("concat"), Options(max_context=10))
    with pytest.raises(PromptError, match="0 \\+ 11 tokens do not fit the context of 10"):
        decoder.prefill(rows[:11])


def test_what_is_allocated_is_freed_with_the_decoder(bundle: Built, cuda: FakeCuda, rtx: FakeTensorRT) -> None:
    decoder = engine.decoder(bundle("scatter"), Options())
    decoder.decode(np.ones(HIDDEN, np.float32))
    assert cuda.device
    assert cuda.host
    assert cuda.streams
    del decoder
    rtx.contexts.clear()
    gc.collect()
    assert (cuda.device, cuda.host, cuda.streams) == ({}, {}, {})


@pytest.mark.parametrize(("part", "shape"), [("vision_encoder", (3, 32, 32)), ("projector", (IMAGE_TOKENS, 8))])
def test_pictures_beyond_the_engines_batch_take_turns(
    bundle: Built, part: str, shape: tuple[int, ...], cuda: FakeCuda, rtx: FakeTensorRT
) -> None:
    opened = bundle()
    x = np.random.default_rng(2).standard_normal((5, *shape)).astype(np.float32)
    want = tensorrt_onnx.encoder(opened, part, Options(threads=1)).run(x)
    encoder = engine.encoder(opened, part, Options())
    first = encoder.run(x)
    np.testing.assert_allclose(first, want, rtol=1e-5, atol=1e-5)
    assert rtx.contexts[0].runs == 3
    kept = first.copy()
    np.testing.assert_allclose(encoder.run(x[:1]), want[:1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(first, kept, err_msg="the result is not the caller's")


@pytest.mark.parametrize(("kv", "dtype"), [("concat", "fp16"), ("scatter", "bf16")])
def test_a_bundle_answers_as_its_graphs_do(bundle: Built, kv: str, dtype: str, rtx: FakeTensorRT) -> None:
    folder = bundle(kv, dtype).folder
    answers = [
        load(folder, engine=name, threads=1).answer("Hi", raw=True, max_new_tokens=4)
        for name in ("tensorrt", "tensorrt_onnx")
    ]
    assert answers[0].text == answers[1].text
    assert set(answers[0].engines.values()) == {"tensorrt"}


def test_where_a_gpu_is_it_comes_before_the_graphs(bundle: Built, rtx: FakeTensorRT) -> None:
    assert set(load(bundle().folder).engines.values()) == {"tensorrt"}


def listed(bundle: Bundle, **changes: Any) -> Bundle:
    """With `changes` in the engine that the language model lists."""
    part = bundle.part("language_model", "tensorrt")
    (one,) = part.details["engines"]
    return replaced(bundle, "language_model", details={**part.details, "engines": [{**one, **changes}]})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version": "1.6.0"}, r"rtx40 \(8\.9; tensorrt_rtx 1\.6\.0\)"),
        ({"compute_capabilities": ["8.6", "12.0"]}, r"rtx40 \(8\.6, 12\.0; tensorrt_rtx 1\.7\.1\.116\)"),
        ({"sdk": "tensorrt"}, r"with no tensorrt: .*rtx40 \(8\.9; tensorrt 1\.7\.1\.116\)"),
    ],
)
def test_an_engine_of_another_gpu_or_version_is_refused_before_it_is_read(
    bundle: Built, changes: dict[str, Any], told: str, rtx: FakeTensorRT
) -> None:
    opened = bundle()
    with pytest.raises(BundleError, match=told) as caught:
        engine.decoder(listed(opened, **changes), Options())
    assert "NVIDIA Pretended 4000 (compute capability 8.9)" in str(caught.value)
    assert f"vlm-export --build {opened.folder}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert rtx.loaded == 0
    if "sdk" not in changes:
        assert "with tensorrt_rtx 1.7.1.116" in str(caught.value)


def test_of_several_engines_the_one_that_fits_is_taken(
    bundle: Built, rows: np.ndarray, cuda: FakeCuda, rtx: FakeTensorRT
) -> None:
    opened = bundle()
    part = opened.part("language_model", "tensorrt")
    (fits,) = part.details["engines"]
    others = [{**fits, **change} for change in ({"compute_capabilities": ["12.0"]}, {"version": "1.6"})]
    several = replaced(opened, "language_model", details={**part.details, "engines": [*others, fits]})
    assert engine.decoder(several, Options()).max_context == CONTEXT


@pytest.mark.parametrize("engines", [[], None])
def test_a_bundle_without_engines_says_how_to_build_them(bundle: Built, engines: Any, rtx: FakeTensorRT) -> None:
    opened = replaced(bundle(), "projector", details={"engines": engines})
    with pytest.raises(BundleError, match=r"no TensorRT engine of the projector yet: .*vlm-export --build .*bundle"):
        engine.encoder(opened, "projector", Options())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "engines of the language_model.version"),
        ({"sdk": "trt"}, "'trt' is not one of tensorrt, tensorrt_rtx"),
        ({"file": "../x.engine"}, "'../x.engine' is not one of the files"),
    ],
)
def test_a_list_of_engines_that_is_none_is_one_line(
    bundle: Built, changes: dict[str, Any], message: str, rtx: FakeTensorRT
) -> None:
    with pytest.raises(BundleError, match=message):
        engine.decoder(listed(bundle(), **changes), Options())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "fp16"}, r"has inputs_embeds of \('fp32', .*says \('fp16'"),
        ({"kv": "concat"}, r"has key_cache.0 of .*says nothing of it"),
        ({"max_context": CONTEXT + 1}, r"has key_cache.0 of .*24.*says .*25"),
    ],
)
def test_an_engine_unlike_its_manifest_is_refused(
    bundle: Built, changes: dict[str, Any], message: str, rtx: FakeTensorRT
) -> None:
    opened = bundle("scatter")
    part = opened.part("language_model", "tensorrt")
    changed = {**part.details, "io": io("scatter", "fp32", **changes)}
    with pytest.raises(BundleError, match=message):
        engine.decoder(replaced(opened, "language_model", details=changed), Options())


def test_tensorrts_words_are_told_when_an_engine_does_not_load(tmp_path: Path, rtx: FakeTensorRT) -> None:
    opened = built(tmp_path / "bundle", "scatter")
    opened.path("tensorrt/engines/rtx40/projector.engine").write_bytes(b"nonsense")
    with pytest.raises(BundleError, match=r"does not load \(Serialization assertion magic tag") as caught:
        engine.encoder(opened, "projector", Options())
    assert "warning" not in str(caught.value)


def test_a_run_that_fails_tells_why(bundle: Built, rtx: FakeTensorRT) -> None:
    decoder = engine.decoder(bundle(), Options())
    rtx.fails = True
    with pytest.raises(BundleError, match=r"does not run \(Cuda Runtime \(an illegal memory access"):
        decoder.decode(np.ones(HIDDEN, np.float32))
    assert decoder.position == 0


def test_a_cache_larger_than_the_gpu_tells_what_is_free(bundle: Built, cuda: FakeCuda, rtx: FakeTensorRT) -> None:
    cuda.memory = 8000
    with pytest.raises(InputError, match=r"Pretended 4000 has no room for \d+ MiB more \(\d+ of \d+ MiB are free\)"):
        engine.decoder(bundle("concat"), Options())


@pytest.mark.parametrize("options", [Options(kv_cache="f16"), Options(flash_attention=False)])
def test_choices_that_the_engine_has_made_are_refused(bundle: Built, options: Options, rtx: FakeTensorRT) -> None:
    with pytest.raises(InputError, match="leave out --kv-cache and --flash-attention"):
        engine.decoder(bundle(), options)


@pytest.mark.parametrize("count", [0, -1])
def test_without_a_gpu_it_is_one_line(count: int, cuda: FakeCuda, rtx: FakeTensorRT) -> None:
    cuda.count = count
    with pytest.raises(DependencyError, match=r"needs an NVIDIA GPU .*--engine tensorrt_onnx") as caught:
        engine.available()
    assert caught.value.exit_code == 3
    assert ("cudaErrorInsufficientDriver" in str(caught.value)) == (count < 0)


def test_without_an_sdk_or_cuda_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, rtx: FakeTensorRT
) -> None:
    engine.available()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "cuda.bindings", None)  # type: ignore[arg-type]
        with pytest.raises(DependencyError, match=r"needs cuda-python: pip install 'vlm-export\[tensorrt\]'"):
            engine.available()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)  # type: ignore[arg-type]
    with pytest.raises(DependencyError, match=r"needs TensorRT or TensorRT-RTX: pip install 'vlm-export\[tensorrt\]'"):
        engine.available()


def test_cudas_errors_are_told_in_its_words(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, rtx: FakeTensorRT) -> None:
    gpu = Gpu("tensorrt")
    held = Memory(gpu, 16)
    cuda.can_capture = False
    with pytest.raises(DependencyError, match=r"CUDA's cudaStreamEndCapture failed on .*StreamCapture.*in words"):
        gpu.call("cudaStreamEndCapture", gpu._stream)
    assert held.size == 16


def test_tensorrt_rtx_still_has_the_calls_that_the_engine_makes(tmp_path: Path, bundle: Built) -> None:
    trt: Any = importlib.import_module("tensorrt_rtx")
    calls = {
        trt.ICudaEngine: (
            *("get_tensor_name", "num_io_tensors", "get_tensor_mode", "get_tensor_dtype", "get_tensor_shape"),
            *("get_tensor_profile_shape", "get_tensor_location", "create_runtime_config", "create_execution_context"),
        ),
        trt.IExecutionContext: ("set_input_shape", "set_tensor_address", "get_tensor_shape", "execute_async_v3"),
        trt.IRuntimeConfig: ("cuda_graph_strategy",),
        trt.CudaGraphStrategy: ("WHOLE_GRAPH_CAPTURE",),
        trt.TensorLocation: ("HOST",),
        trt.TensorIOMode: ("INPUT",),
    }
    assert [f"{c.__name__}.{n}" for c, names in calls.items() for n in names if not hasattr(c, n)] == []
    assert {kind for kind in tensorrt_engine.TYPES if hasattr(trt.DataType, kind)} == set(tensorrt_engine.TYPES)


def test_cuda_bindings_still_has_the_calls_that_are_made() -> None:
    real: Any = importlib.import_module("cuda.bindings.runtime")
    calls = [name for name in vars(FakeCuda) if name.startswith("cuda")]
    assert [name for name in calls if not hasattr(real, name)] == []
    assert [name for name in ("cudaErrorMemoryAllocation", "cudaSuccess") if not hasattr(real.cudaError_t, name)] == []
    for ours, theirs in ((Kind, real.cudaMemcpyKind), (Attribute, real.cudaDeviceAttr)):
        assert {one.name: int(getattr(theirs, one.name)) for one in ours} == {one.name: one.value for one in ours}
    assert hasattr(real.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")


def test_the_real_driver_answers_or_its_absence_is_one_line() -> None:
    told = ""
    try:
        check_device("tensorrt")
    except DependencyError as error:
        told = str(error)
    one_line = r"engine 'tensorrt' needs an NVIDIA GPU and its driver, which do not answer \(\w.*\): --engine .*"
    assert re.fullmatch(one_line, told) or re.fullmatch(r"\d+\.\d", Gpu("tensorrt").capability)


def test_the_real_runtime_refuses_what_is_no_engine_in_one_line(
    bundle: Built, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    opened = bundle()
    (file,) = tensorrt_engine.engine_files(opened, "projector", "tensorrt")
    with pytest.raises(BundleError, match=r"projector\.engine does not load \(.+\): build it again") as caught:
        tensorrt_engine.OpenEngine(opened, dataclasses.replace(file, sdk="tensorrt_rtx"), None)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_the_engine_is_found_by_its_name() -> None:
    assert find_engine("tensorrt").NAME == "tensorrt"
