"""Engine "onnx": the in-place KV cache gives what plain attention gives, and wrong files are refused at load."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from running import HEAD, HEADS, HIDDEN, KV, LAYERS, running_bundle, running_spec
from vlm_models.errors import BundleError, DependencyError, InputError, PromptError
from vlm_runtime.bundle import Bundle, open_bundle
from vlm_runtime.engine import Options, choose_engines, engine_names, find_engine, thread_count
from vlm_runtime.engines import onnx as engine
from vlm_runtime.manifest import Part


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(running_bundle(tmp_path_factory.mktemp("running") / "bundle"))


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((40, HIDDEN)).astype(np.float32)


def plain_logits(bundle: Bundle, embeds: np.ndarray) -> np.ndarray:
    """Logits (S, V) of the tiny language model in NumPy, without any cache."""
    graph = onnx.load(bundle.path("onnx/language_model.onnx")).graph
    w = {i.name: numpy_helper.to_array(i).astype(np.float64) for i in graph.initializer}
    x, count = embeds.astype(np.float64), len(embeds)
    cos, sin = w["cos"][:count, None], w["sin"][:count, None]

    def rotate(y: np.ndarray) -> np.ndarray:
        a, b = np.split(y, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    for n in range(LAYERS):
        q, k, v = np.split((x @ w[f"qkv{n}"]).reshape(count, -1, HEAD), [HEADS, HEADS + KV], axis=1)
        q, k = rotate(q), np.repeat(rotate(k), HEADS // KV, axis=1)
        v = np.repeat(v, HEADS // KV, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD)
        scores = np.where(np.tri(count, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weights, v).reshape(count, -1) @ w[f"o{n}"]
    return x @ w["head"]


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("chunk", [1, 7, 40, 512])
def test_prefill_in_chunks_and_decode_equal_plain_attention(bundle: Bundle, rows: np.ndarray, chunk: int) -> None:
    want = plain_logits(bundle, rows)
    decoder = engine.decoder(bundle, Options(threads=1, prefill_chunk=chunk))
    assert_close(decoder.prefill(rows[:30]), want[29])
    for i in range(30, 40):
        assert_close(decoder.decode(rows[i]), want[i])
    assert decoder.position == 40


def test_a_graph_that_leaves_the_cache_length_open_takes_the_length_asked_for(tmp_path: Path, rows: np.ndarray) -> None:
    bundle = open_bundle(running_bundle(tmp_path / "open", dynamic=True))
    decoder = engine.decoder(bundle, Options(threads=1, max_context=16))
    assert_close(decoder.prefill(rows[:16]), plain_logits(bundle, rows[:16])[-1])
    assert decoder.max_context == 16


def test_rewinding_forgets_what_came_after(bundle: Bundle, rows: np.ndarray) -> None:
    decoder = engine.decoder(bundle, Options(threads=1))
    decoder.prefill(rows)
    decoder.rewind(10)
    other = np.concatenate([rows[:10], rows[20:25]])
    assert_close(decoder.prefill(other[10:]), plain_logits(bundle, other)[-1])
    with pytest.raises(ValueError, match="cannot rewind to 16: 15 rows"):
        decoder.rewind(16)


def test_more_rows_than_the_context_are_refused_before_any_work(bundle: Bundle, rows: np.ndarray) -> None:
    decoder = engine.decoder(bundle, Options(threads=1, max_context=35, prefill_chunk=8))
    with pytest.raises(PromptError, match=r"0 \+ 40 tokens do not fit the context of 35"):
        decoder.prefill(rows)
    assert decoder.position == 0
    decoder.prefill(rows[:35])
    with pytest.raises(PromptError, match=r"35 \+ 1 tokens do not fit"):
        decoder.decode(rows[0])


def test_one_decode_step_binds_nothing(bundle: Bundle, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = engine.decoder(bundle, Options(threads=1))
    decoder.prefill(rows[:5])

    def refuse(*args: Any) -> None:
        raise AssertionError("a decode step made an OrtValue")

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", refuse)
    assert_close(decoder.decode(rows[5]), plain_logits(bundle, rows[:6])[-1])


@pytest.mark.parametrize("shape", [(0, HIDDEN), (3, HIDDEN + 1), (HIDDEN,)])
def test_rows_of_a_wrong_shape_never_reach_the_engine(bundle: Bundle, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="prefill takes"):
        engine.decoder(bundle, Options(threads=1)).prefill(np.zeros(shape, np.float32))


def test_an_encoder_takes_any_number_of_pictures(bundle: Bundle) -> None:
    vision = engine.encoder(bundle, "vision_encoder", Options(threads=1))
    projector = engine.encoder(bundle, "projector", Options(threads=1))
    pixels = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    rows = projector.run(vision.run(pixels))
    assert rows.shape == (3, 4, HIDDEN)
    np.testing.assert_allclose(projector.run(vision.run(pixels[1:2]))[0], rows[1], atol=1e-5)


def part_of(bundle: Bundle, part: str, graph: str) -> Bundle:
    """`bundle` with another graph as its `part`."""
    parts = {**bundle.manifest.parts, part: {"onnx": Part(graph, (graph,), "fp32")}}
    return Bundle(bundle.folder, dataclasses.replace(bundle.manifest, parts=parts))


def test_a_part_of_another_model_is_refused(bundle: Bundle) -> None:
    other = dataclasses.replace(bundle.spec, fingerprint="0" * 64)
    foreign = Bundle(bundle.folder, dataclasses.replace(bundle.manifest, spec=other))
    with pytest.raises(BundleError, match=r"vision_encoder\.onnx is a part of another model"):
        engine.encoder(foreign, "vision_encoder", Options(threads=1))
    with pytest.raises(BundleError, match=r"language_model\.onnx is a part of another model"):
        engine.decoder(foreign, Options(threads=1))
    with pytest.raises(BundleError, match=r"vision_encoder\.onnx is a part of another model: it is not the projector"):
        engine.encoder(part_of(bundle, "projector", "onnx/vision_encoder.onnx"), "projector", Options(threads=1))


def test_a_language_model_of_other_heads_is_refused(bundle: Bundle) -> None:
    for change in ({"kv_heads": 2}, {"head_dim": 8}, {"layers": 3}):
        language = dataclasses.replace(bundle.spec.language, **change)
        spec = dataclasses.replace(bundle.spec, language=language)
        with pytest.raises(BundleError, match="its spec says"):
            engine.decoder(Bundle(bundle.folder, dataclasses.replace(bundle.manifest, spec=spec)), Options(threads=1))


def test_a_cache_shorter_than_the_manifest_says_is_refused(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="holds 96 positions, the manifest says 200"):
        engine.decoder(Bundle(bundle.folder, dataclasses.replace(bundle.manifest, max_context=200)), Options(threads=1))


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x0a" * 50])
def test_a_file_that_is_no_graph_is_one_line(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = open_bundle(running_bundle(tmp_path / "bundle"))
    bundle.path("onnx/projector.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"projector\.onnx cannot be opened by ONNX Runtime") as error:
        engine.encoder(bundle, "projector", Options(threads=1))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_cuda_that_is_not_there_is_an_error_not_the_cpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DependencyError, match="cannot use device 'cuda'") as error:
        engine.encoder(bundle, "projector", Options(threads=1, device="cuda"))
    assert error.value.exit_code == 3
    # onnxruntime-gpu without a driver: the provider is listed, then left out of the session without an error
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(DependencyError, match="its libraries or driver did not load"),
    ):
        engine.encoder(bundle, "projector", Options(threads=1, device="cuda"))


def test_without_onnxruntime_the_error_names_the_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"pip install 'vlm-export\[cpu\]'"):
        find_engine("onnx").available()
    with pytest.raises(
        DependencyError, match="nothing here can run the vision_encoder: engine 'onnx' needs onnxruntime"
    ):
        choose_engines(bundle, None)


def test_an_unknown_engine_lists_the_names() -> None:
    with pytest.raises(InputError, match=r"unknown engine 'onxx': choose one of .*onnx"):
        find_engine("onxx")
    assert "onnx" in engine_names()


def test_engines_are_chosen_for_each_part(bundle: Bundle) -> None:
    every = dict.fromkeys(("vision_encoder", "projector", "language_model"), "onnx")
    for wanted in (None, "onnx", "vision=onnx", "vision_encoder=onnx, language=onnx", "language_model=onnx"):
        assert choose_engines(bundle, wanted) == every


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("gguff", "unknown engine 'gguff': choose one of"),
        ("", "unknown engine ''"),
        ("vision=gguff", "unknown engine 'gguff'"),
        ("vison=onnx", "write it as vision=NAME"),
        ("vision=", "write it as vision=NAME"),
        ("vision=onnx,vision_encoder=onnx", "each at most once"),
    ],
)
def test_an_engine_that_cannot_be_chosen_says_what_can(bundle: Bundle, wanted: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_engines(bundle, wanted)


def test_an_engine_that_the_bundle_lacks_says_what_it_has(bundle: Bundle) -> None:
    parts = {part: {"other": entry["onnx"]} for part, entry in bundle.manifest.parts.items()}
    without = Bundle(bundle.folder, dataclasses.replace(bundle.manifest, parts=parts))
    with pytest.raises(InputError, match="nothing for engine 'onnx'; it has vision_encoder: other; projector: other"):
        choose_engines(without, "onnx")
    with pytest.raises(BundleError, match="no language_model for engine 'onnx'; it has other"):
        choose_engines(without, "language=onnx")
    with pytest.raises(DependencyError, match="engine 'other' is not known to this version"):
        choose_engines(without, None)


@pytest.mark.parametrize("field", ["threads", "prefill_chunk", "max_context"])
def test_options_below_one_are_refused(field: str) -> None:
    with pytest.raises(InputError, match=f"{field} is 0"):
        Options(**{field: 0})


def test_threads_default_to_cores_this_process_may_use() -> None:
    assert thread_count(Options(threads=3)) == 3
    assert 1 <= thread_count(Options()) <= (os.cpu_count() or 1)


def test_the_spec_of_the_tiny_model_is_what_its_graphs_are() -> None:
    language = running_spec().language
    assert (language.layers, language.kv_heads, language.head_dim) == (LAYERS, KV, HEAD)
