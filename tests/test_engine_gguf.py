"""Engine "gguf": embeddings in, llama.cpp's logits out, equal to plain attention; wrong files never reach llama.cpp."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from answering import from_scratch, painted
from ggufs import language_gguf, plain_logits
from running import HIDDEN, entry, running_bundle, running_spec
from vlm_bench import gguf_overhead
from vlm_models.errors import BundleError, DependencyError, InputError, PromptError
from vlm_runtime import cli, llama
from vlm_runtime.bundle import Bundle, open_bundle
from vlm_runtime.engine import Options, choose_engines, find_engine
from vlm_runtime.engines import gguf as engine
from vlm_runtime.engines import onnx as onnx_engine
from vlm_runtime.manifest import Part, write_manifest
from vlm_runtime.vlm import load

SPEC = running_spec(eos_token_ids=())
VOCAB = SPEC.language.vocab_size
WIDE = (1, 1, 32)  # heads of 32 channels, as a q8_0 cache needs


def gguf_bundle(folder: Path, *, precision: str = "fp32", details: dict[str, Any] | None = None, **file: Any) -> Path:
    """The running bundle with a GGUF language model instead of the ONNX one."""
    bundle = open_bundle(running_bundle(folder, SPEC))
    (folder / "gguf").mkdir()
    name = "gguf/language_model.gguf"
    language_gguf(folder / name, SPEC, **file)
    manifest = bundle.manifest
    parts = {**manifest.parts, "language_model": {"gguf": Part(name, (name,), precision, details or {})}}
    files = {**manifest.files, name: entry(folder / name)}
    write_manifest(folder, dataclasses.replace(manifest, parts=parts, files=files))
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(gguf_bundle(tmp_path_factory.mktemp("gguf") / "bundle"))


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((40, HIDDEN)).astype(np.float32)


@pytest.fixture(scope="module")
def want(rows: np.ndarray) -> np.ndarray:
    return plain_logits(rows, VOCAB)


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


open_file = functools.partial(engine.GgufDecoder, hidden_size=HIDDEN, vocab_size=VOCAB, max_context=96)


@pytest.mark.parametrize("chunk", [1, 7, 40, 512])
def test_prefill_in_chunks_and_decode_equal_plain_attention(
    bundle: Bundle, rows: np.ndarray, want: np.ndarray, chunk: int
) -> None:
    decoder = engine.decoder(bundle, Options(threads=1, prefill_chunk=chunk))
    assert relative(decoder.prefill(rows[:30]), want[29]) < 1e-5
    for i in range(30, 40):
        assert relative(decoder.decode(rows[i]), want[i]) < 1e-5
    assert decoder.position == 40


def test_more_threads_give_the_same_logits(bundle: Bundle, rows: np.ndarray, want: np.ndarray) -> None:
    assert relative(engine.decoder(bundle, Options(threads=2)).prefill(rows), want[-1]) < 1e-5


def test_rows_that_are_not_contiguous_or_not_float32_are_taken_as_numbers(
    bundle: Bundle, rows: np.ndarray, want: np.ndarray
) -> None:
    decoder = engine.decoder(bundle, Options(threads=1))
    assert relative(decoder.prefill(np.asfortranarray(rows[:30])), want[29]) < 1e-5
    assert relative(decoder.decode(rows[30].astype(np.float64)), want[30]) < 1e-5


@pytest.mark.parametrize(("kv_cache", "limit"), [("f32", 1e-5), ("f16", 1e-2), ("q8_0", 0.1)])
def test_a_coarser_kv_cache_deviates_as_much_as_it_may(
    tmp_path: Path, rows: np.ndarray, kv_cache: Any, limit: float
) -> None:
    path = language_gguf(tmp_path / "wide.gguf", SPEC, heads=WIDE)
    want = plain_logits(rows, VOCAB, WIDE)
    flash = None if kv_cache == "q8_0" else False
    decoder = open_file(path, kv_cache=kv_cache, flash_attention=flash)
    deviations = [relative(decoder.prefill(rows[:30]), want[29])]
    deviations += [relative(decoder.decode(rows[i]), want[i]) for i in range(30, 40)]
    assert np.median(deviations) < limit
    assert kv_cache == "f32" or np.median(deviations) > limit / 100  # the option reached llama.cpp


def test_the_cache_follows_the_precision_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, Any]] = []
    monkeypatch.setattr(engine, "GgufDecoder", lambda *_, **k: asked.append((k["kv_cache"], k["flash_attention"])))
    for precision in ("fp32", "q4_k_m"):
        opened = open_bundle(gguf_bundle(tmp_path / precision, precision=precision))
        for options in ({}, {"kv_cache": "f16"}, {"kv_cache": "f32"}, {"flash_attention": True}):
            engine.decoder(opened, Options(threads=1, **options))
    exact, auto = ("f32", False), ("f16", None)
    assert asked == [exact, auto, exact, ("f32", True), auto, auto, exact, ("f16", True)]


def test_a_q8_0_cache_that_cannot_be_is_one_line(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="a q8_0 KV cache needs flash attention"):
        engine.decoder(bundle, Options(threads=1, kv_cache="q8_0", flash_attention=False))
    with pytest.raises(InputError, match=r"block size 32 does not divide .*--kv-cache f16") as error:
        engine.decoder(bundle, Options(threads=1, kv_cache="q8_0"))
    assert "\n" not in str(error.value)


def test_the_scale_of_the_graph_is_divided_out(tmp_path: Path, rows: np.ndarray, want: np.ndarray) -> None:
    opened = open_bundle(gguf_bundle(tmp_path / "scaled", details={"embed_scale": 8.0}))
    decoder = engine.decoder(opened, Options(threads=1))
    assert relative(decoder.prefill(rows[:30] * 8), want[29]) < 1e-5
    assert relative(decoder.decode(rows[30] * 8), want[30]) < 1e-5


@pytest.mark.parametrize("scale", [0, -1.0, "8", None, [1]])
def test_a_scale_that_cannot_be_is_refused(bundle: Bundle, scale: Any) -> None:
    part = dataclasses.replace(bundle.part("language_model", "gguf"), details={"embed_scale": scale})
    parts = {**bundle.manifest.parts, "language_model": {"gguf": part}}
    with pytest.raises(BundleError, match="embed_scale is"):
        engine.decoder(Bundle(bundle.folder, dataclasses.replace(bundle.manifest, parts=parts)), Options(threads=1))


def test_rewinding_forgets_what_came_after(bundle: Bundle, rows: np.ndarray) -> None:
    decoder = engine.decoder(bundle, Options(threads=1))
    decoder.prefill(rows)
    decoder.rewind(10)
    other = np.concatenate([rows[:10], rows[20:25]])
    assert relative(decoder.prefill(other[10:]), plain_logits(other, VOCAB)[-1]) < 1e-5
    with pytest.raises(ValueError, match="cannot rewind to 16: 15 rows"):
        decoder.rewind(16)


def test_an_interrupted_prompt_leaves_nothing_behind(bundle: Bundle, rows: np.ndarray) -> None:
    """Ctrl-C comes when llama.cpp returns: its cache has the rows then, and nobody has counted them."""

    class Interrupted:
        def __init__(self, of: Any) -> None:
            self.of = of

        def __getattr__(self, name: str) -> Any:
            return getattr(self.of, name)

        def llama_decode(self, *arguments: Any) -> int:
            self.of.llama_decode(*arguments)
            raise KeyboardInterrupt

    decoder = engine.decoder(bundle, Options(threads=1))
    decoder.prefill(rows[:10])
    decoder._lib = Interrupted(decoder._lib)
    with pytest.raises(KeyboardInterrupt):
        decoder.prefill(rows[20:30])
    decoder._lib = decoder._lib.of
    decoder.rewind(10)
    assert relative(decoder.prefill(rows[10:20]), plain_logits(rows[:20], VOCAB)[-1]) < 1e-5


def test_rewinding_brings_back_rows_that_slid_out_of_a_window(tmp_path: Path) -> None:
    """Of 400 rows a cache for windows of 8 alone would have kept the last 256."""
    path = language_gguf(tmp_path / "gemma3.gguf", SPEC, arch="gemma3")
    many = np.random.default_rng(8).standard_normal((400, HIDDEN)).astype(np.float32)
    want, got = (
        open_file(path, max_context=512, prefill_chunk=16, kv_cache="f32", flash_attention=False) for _ in range(2)
    )
    got.prefill(many)
    got.rewind(60)
    assert relative(got.prefill(many[300:305]), want.prefill(np.concatenate([many[:60], many[300:305]]))) < 1e-5


def test_more_rows_than_the_context_are_refused_before_any_work(bundle: Bundle, rows: np.ndarray) -> None:
    decoder = engine.decoder(bundle, Options(threads=1, max_context=35, prefill_chunk=8))
    with pytest.raises(PromptError, match=r"0 \+ 40 tokens do not fit the context of 35"):
        decoder.prefill(rows)
    assert decoder.position == 0
    decoder.prefill(rows[:35])
    with pytest.raises(PromptError, match=r"35 \+ 1 tokens do not fit"):
        decoder.decode(rows[0])


def test_the_context_fills_to_its_last_position(bundle: Bundle) -> None:
    more = np.random.default_rng(6).standard_normal((96, HIDDEN)).astype(np.float32)
    decoder = engine.decoder(bundle, Options(threads=1, max_context=96, prefill_chunk=32))
    decoder.prefill(more[:95])
    assert relative(decoder.decode(more[95]), plain_logits(more, VOCAB)[-1]) < 1e-5


@pytest.mark.parametrize("shape", [(0, HIDDEN), (3, HIDDEN + 1), (HIDDEN,)])
def test_rows_of_a_wrong_shape_never_reach_the_engine(bundle: Bundle, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="prefill takes"):
        engine.decoder(bundle, Options(threads=1)).prefill(np.zeros(shape, np.float32))


def test_one_decode_step_allocates_no_array(bundle: Bundle, rows: np.ndarray) -> None:
    decoder = engine.decoder(bundle, Options(threads=1))
    first = decoder.decode(rows[0])
    assert decoder.decode(rows[1]) is first
    tracemalloc.start()
    for row in rows[2:]:
        decoder.decode(row)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * HIDDEN * 38


def test_logits_outlive_the_decoder_that_made_them(bundle: Bundle, rows: np.ndarray, want: np.ndarray) -> None:
    logits = engine.decoder(bundle, Options(threads=1)).prefill(rows)
    gc.collect()
    engine.decoder(bundle, Options(threads=1)).prefill(rows[:3])
    assert relative(logits, want[-1]) < 1e-5


def test_a_step_that_llama_cpp_refuses_is_one_line_and_leaves_the_cache_as_it_was(
    bundle: Bundle, rows: np.ndarray, want: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = engine.decoder(bundle, Options(threads=1))
    decoder.prefill(rows[:30])
    with monkeypatch.context() as patch:
        patch.setattr(decoder._lib, "llama_decode", lambda *_: -3)
        with pytest.raises(InputError, match=r"llama.cpp could not run 1 rows at position 30 \(code -3"):
            decoder.decode(rows[30])
    assert relative(decoder.decode(rows[30]), want[30]) < 1e-5


def test_answers_and_conversations_are_those_from_scratch(bundle: Bundle) -> None:
    vlm = load(bundle.folder, threads=1)
    assert vlm.engines == {"vision_encoder": "onnx", "projector": "onnx", "language_model": "gguf"}
    chat = vlm.chat()
    one = "".join(chat.ask("hi", [painted(0)], max_new_tokens=5))
    list(chat.ask("It is red", max_new_tokens=5))
    text = f"<|user|><image>\nhi</s>\n<|assistant|>{one}</s>\n<|user|>It is red</s>\n<|assistant|>"
    assert chat.last is not None
    assert list(chat.last.token_ids) == from_scratch(vlm, text, [painted(0)], 5)
    full = load(bundle.folder, threads=1, max_context=40).answer("hello", max_new_tokens=1000)
    assert full.finish_reason == "context"


def test_kv_cache_and_flash_attention_are_options_of_load(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="unknown KV cache type 'q4_0': choose one of f32, f16, q8_0"):
        load(bundle.folder, kv_cache="q4_0")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a q8_0 KV cache needs flash attention"):
        load(bundle.folder, kv_cache="q8_0", flash_attention=False)
    exact = load(bundle.folder, threads=1).decoder.prefill(np.ones((9, HIDDEN), np.float32))
    fused = load(bundle.folder, threads=1, kv_cache="f16", flash_attention=True)
    assert 1e-7 < relative(fused.decoder.prefill(np.ones((9, HIDDEN), np.float32)), exact) < 1e-2


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--kv-cache", "f16", "--flash-attention"], 0, ""),
        (["--kv-cache", "f32", "--no-flash-attention"], 0, ""),
        (["--kv-cache", "fp16"], 2, "unknown KV cache type 'fp16': choose one of f32, f16, q8_0"),
        (["--kv-cache", "q8_0", "--no-flash-attention"], 2, "a q8_0 KV cache needs flash attention"),
    ],
)
def test_the_command_takes_kv_cache_and_flash_attention(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
) -> None:
    line = ["vlm-run", str(bundle.folder), "hi", "--max-new-tokens", "2", "--threads", "1", *options]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capfd.readouterr()
    assert (end.value.code or 0) == code
    assert (bool(out.strip()), err.count("\n")) == ((True, 0) if not code else (False, 1))
    assert message in err


def test_the_benchmark_measures_ours_and_plain_calls_on_the_same_work(bundle: Bundle) -> None:
    contestants = gguf_overhead.make_ours, gguf_overhead.make_plain
    reps = [make(str(bundle.folder), 1, 60, 8, None) for make in contestants]
    for number in range(2):
        for rep in reps:
            assert all(value > 0 for value in rep(number).values())
    with pytest.raises(InputError, match=r"60 \+ 60 tokens do not fit the bundle's context of 96"):
        gguf_overhead.make_ours(str(bundle.folder), 1, 60, 60, None)


def test_engine_onnx_refuses_what_it_has_no_choice_of(tmp_path: Path) -> None:
    opened = open_bundle(running_bundle(tmp_path / "onnx"))
    for options in ({"kv_cache": "f16"}, {"flash_attention": True}, {"flash_attention": False}):
        with pytest.raises(InputError, match="engine 'onnx' has an f32 KV cache"):
            onnx_engine.decoder(opened, Options(threads=1, **options))
    assert onnx_engine.decoder(opened, Options(threads=1, kv_cache="f32")).position == 0


def test_the_engine_has_no_encoder(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="engine 'gguf' runs the language model only"):
        engine.encoder(bundle, "projector", Options())


def test_a_foreign_or_damaged_file_never_reaches_llama_cpp(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "load_model", lambda *_, **__: pytest.fail("llama.cpp saw the file"))
    other = Bundle(
        bundle.folder, dataclasses.replace(bundle.manifest, spec=dataclasses.replace(SPEC, fingerprint="0" * 64))
    )
    with pytest.raises(BundleError, match=r"language_model\.gguf is a part of another model"):
        engine.decoder(other, Options(threads=1))
    damaged = open_bundle(gguf_bundle(tmp_path / "damaged"))
    path = damaged.path("gguf/language_model.gguf")
    for content in (b"", b"GGML", path.read_bytes()[:-40]):
        path.write_bytes(content)
        with pytest.raises(BundleError, match="is not a sound GGUF file") as error:
            engine.decoder(damaged, Options(threads=1))
        assert "\n" not in str(error.value)


def test_a_file_of_another_width_is_refused_by_its_decoder(tmp_path: Path) -> None:
    path = language_gguf(tmp_path / "model.gguf", SPEC)
    with pytest.raises(BundleError, match="takes rows of 32 and has 320 tokens, its bundle says 64 and 320"):
        open_file(path, hidden_size=64)


def test_a_device_that_this_build_lacks_is_an_error_not_the_cpu(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.library(), "llama_supports_gpu_offload", lambda: False)
    with pytest.raises(DependencyError, match="built without a GPU") as error:
        engine.decoder(bundle, Options(threads=1, device="cuda"))
    assert error.value.exit_code == 3


def test_without_llama_cpp_the_error_names_the_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"needs llama-cpp-python 0\.3\.36: pip install 'vlm-export\[gguf\]'"):
        find_engine("gguf").available()
    with pytest.raises(DependencyError, match="nothing here can run the vision_encoder"):
        choose_engines(bundle, None)


def test_the_runtime_answers_without_torch_or_transformers(bundle: Bundle) -> None:
    code = (
        "import sys, json, numpy as np\nfrom pathlib import Path\nfrom vlm_runtime.engines.gguf import GgufDecoder\n"
        f"decoder = GgufDecoder(Path(sys.argv[1]), hidden_size={HIDDEN}, vocab_size={VOCAB}, max_context=96)\n"
        f"logits = decoder.prefill(np.ones((3, {HIDDEN}), np.float32))\n"
        "print(json.dumps([int(logits.argmax()), sorted({'torch', 'transformers', 'gguf'} & set(sys.modules))]))"
    )
    path = str(bundle.path("gguf/language_model.gguf"))
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    best, heavy = json.loads(done.stdout)
    assert heavy == []
    assert best == int(plain_logits(np.ones((3, HIDDEN)), VOCAB)[-1].argmax())
    assert done.stderr == ""
