"""Engine "tensorrt_onnx": both KV caches in three types give what attention without a cache gives."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from running import HIDDEN
from tensorrt_layout import CHUNK, CONTEXT, io, language_graph, opened, plain_logits, replaced, rounded, save, weights
from vlm_models.errors import BundleError, DependencyError, InputError, PromptError
from vlm_runtime.bundle import Bundle
from vlm_runtime.engine import Options, choose_engines, engine_names, find_engine
from vlm_runtime.engines import tensorrt_onnx as engine
from vlm_runtime.vlm import load

FORMS = [(kv, dtype) for kv in ("concat", "scatter") for dtype in ("fp32", "fp16", "bf16")]
Open = Callable[..., Bundle]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Open:
    made: dict[tuple[str, str], Bundle] = {}

    def make(kv: str, dtype: str = "fp32") -> Bundle:
        if (kv, dtype) not in made:
            made[kv, dtype] = opened(tmp_path_factory.mktemp(f"{kv}-{dtype}") / "bundle", kv, dtype)
        return made[kv, dtype]

    return make


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((CONTEXT, HIDDEN)).astype(np.float32)


def assert_close(got: np.ndarray, want: np.ndarray, dtype: str) -> None:
    """float32 sums may differ in order; a rounded cache may then round a value the other way."""
    close = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}[dtype]
    np.testing.assert_allclose(got, want, atol=close * np.abs(want).max())


@pytest.mark.parametrize(("kv", "dtype"), FORMS)
def test_chunks_decode_and_rewind_equal_attention_without_a_cache(
    bundle: Open, rows: np.ndarray, kv: str, dtype: str
) -> None:
    opened = bundle(kv, dtype)
    want = plain_logits(rows, opened.spec.language.vocab_size, dtype)
    decoder = engine.decoder(opened, Options(threads=1))
    assert_close(decoder.prefill(rows[:19]), want[18], dtype)
    for n in range(19, CONTEXT):
        assert_close(decoder.decode(rows[n]), want[n], dtype)
    assert decoder.position == CONTEXT
    other = rows[::-1]
    decoder.rewind(7)
    decoder.prefill(other[:5])
    decoder.rewind(9)
    decoder.rewind(7)
    assert_close(decoder.prefill(rows[7:12]), want[11], dtype)
    decoder.rewind(0)
    assert_close(decoder.decode(rows[0]), want[0], dtype)


@pytest.mark.parametrize("kv", ["concat", "scatter"])
@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_the_chunk_changes_nothing_and_never_exceeds_what_the_engines_take(
    bundle: Open, rows: np.ndarray, kv: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, taken = bundle(kv), list[int]()
    decoder = engine.decoder(opened, Options(threads=1, prefill_chunk=chunk))
    step = decoder._step

    def counted(given: np.ndarray) -> np.ndarray:
        taken.append(len(given))
        return step(given)

    monkeypatch.setattr(decoder, "_step", counted)
    want = plain_logits(rows, opened.spec.language.vocab_size, "fp32")
    assert_close(decoder.prefill(rows[:20]), want[19], "fp32")
    assert max(taken) == min(chunk, CHUNK)
    assert sum(taken) == 20


@pytest.mark.parametrize("kv", ["concat", "scatter"])
def test_a_smaller_context_is_kept_and_a_full_one_is_refused(bundle: Open, rows: np.ndarray, kv: str) -> None:
    opened = bundle(kv)
    decoder = engine.decoder(opened, Options(threads=1, max_context=10))
    assert decoder.max_context == 10
    with pytest.raises(PromptError, match="0 \\+ 11 tokens do not fit the context of 10"):
        decoder.prefill(rows[:11])
    logits = decoder.prefill(rows[:10])
    assert_close(logits, plain_logits(rows, opened.spec.language.vocab_size, "fp32")[9], "fp32")
    with pytest.raises(PromptError, match="10 \\+ 1 tokens do not fit"):
        decoder.decode(rows[0])
    assert engine.decoder(opened, Options(threads=1, max_context=10**6)).max_context == CONTEXT


def test_a_fixed_cache_is_written_where_it_lies(bundle: Open, rows: np.ndarray) -> None:
    decoder = engine.decoder(bundle("scatter"), Options(threads=1))
    (value,) = decoder._caches["key_cache.0", "new_key_cache.0"]
    address = value.data_ptr()
    decoder.prefill(rows[:5])
    held = value.numpy().reshape(-1, CONTEXT, 16)
    assert value.data_ptr() == address
    assert held[:, :5].all(axis=-1).any()
    assert not held[:, 5:].any()


@pytest.mark.parametrize(("kv", "dtype"), [("concat", "fp16"), ("scatter", "bf16")])
def test_a_bundle_answers_with_the_engine_named_for_all_parts(bundle: Open, kv: str, dtype: str) -> None:
    vlm = load(bundle(kv, dtype).folder, engine="tensorrt_onnx", threads=1)
    answer = vlm.answer("Hi", raw=True, max_new_tokens=3)
    assert set(answer.engines.values()) == {"tensorrt_onnx"}
    assert vlm.max_context == CONTEXT


def test_it_comes_after_the_engines_that_serve() -> None:
    assert "tensorrt_onnx" in engine_names()
    assert find_engine("tensorrt_onnx").NAME == "tensorrt_onnx"


def test_where_no_other_engine_runs_it_is_chosen(bundle: Open) -> None:
    assert set(choose_engines(bundle("concat"), None).values()) == {"tensorrt_onnx"}


def test_the_graph_for_the_cpu_is_opened_in_the_place_of_the_other(
    bundle: Open, rows: np.ndarray, tmp_path: Path
) -> None:
    opened = bundle("scatter", "bf16")
    graph = language_graph(weights(opened.spec.language.vocab_size), "scatter", "fp32")
    save(graph, opened.folder / "tensorrt/check.onnx", "language_model", opened.spec.fingerprint)
    name = "tensorrt/check.onnx"
    with_check = replaced(
        opened,
        "language_model",
        files=(*opened.part("language_model", "tensorrt_onnx").files, name),
        details={"io": io("scatter", "bf16", check_graph=name)},
    )
    decoder = engine.decoder(with_check, Options(threads=1))
    want = plain_logits(rows, opened.spec.language.vocab_size, "fp32")
    assert_close(decoder.prefill(rows[:9]), want[8], "fp32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, "3 layers of 2 × 16 in its cache, its spec says 2 of 2 × 16"),
        ({"head_dim": "16"}, "io.*head_dim"),
        ({"kv": "paged"}, "'paged' is not one of concat, scatter"),
        ({"kv": "concat"}, "as 'concat' it takes inputs_embeds, position and 4"),
        ({"max_context": 25}, "key_cache.0 is .*, the manifest says 2 × 25 × 16"),
        ({"prefill_chunk": 0}, "takes 0 rows in a context of 24"),
    ],
)
def test_a_graph_unlike_its_manifest_is_one_line(bundle: Open, changes: dict[str, Any], message: str) -> None:
    changed = replaced(bundle("scatter"), "language_model", details={"io": io("scatter", "fp32", **changes)})
    with pytest.raises(BundleError, match=message) as caught:
        engine.decoder(changed, Options(threads=1))
    assert "export the model again" in str(caught.value) or "export again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bundle_that_says_nothing_of_its_inputs_is_refused(bundle: Open) -> None:
    with pytest.raises(BundleError, match=r"io of tensorrt/language_model.onnx: expected an object"):
        engine.decoder(replaced(bundle("concat"), "language_model", details={}), Options())


def test_a_part_of_another_model_is_refused(bundle: Open) -> None:
    opened = bundle("concat")
    spec = dataclasses.replace(opened.spec, fingerprint="0" * 64)
    other = Bundle(opened.folder, dataclasses.replace(opened.manifest, spec=spec))
    with pytest.raises(BundleError, match="is a part of another model"):
        engine.encoder(other, "projector", Options(threads=1))


@pytest.mark.parametrize("options", [Options(kv_cache="f16"), Options(flash_attention=True)])
def test_choices_that_the_graph_has_made_are_refused(bundle: Open, options: Options) -> None:
    with pytest.raises(InputError, match="leave out --kv-cache and --flash-attention"):
        engine.decoder(bundle("concat"), options)


def test_cuda_that_is_not_there_is_an_error_not_the_cpu(bundle: Open) -> None:
    with pytest.raises(DependencyError, match="cannot use device 'cuda'"):
        engine.decoder(bundle("concat"), Options(device="cuda"))


def test_without_onnxruntime_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"engine 'tensorrt_onnx' needs onnxruntime: pip install"):
        engine.available()


def test_bfloat16_rounds_to_even_and_keeps_what_is_not_a_number() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -3.4e38, 3.4e38, np.inf, np.nan, 1e-40], np.float32)
    got = rounded(values, "bf16")
    np.testing.assert_array_equal(got[:3], np.array([1.0, 1.0, 1.015625], np.float32))
    assert got[3:6].tolist() == [-np.inf, np.inf, np.inf]
    assert np.isnan(got[6])
