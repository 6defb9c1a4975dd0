"""The comparison of GGUF types measures what it says: nothing for an exact file, more for coarser ones, in pairs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import MakeTiny
from vlm_bench import gguf_quality, report
from vlm_bench.gguf_quality import Quality, Truth, compared, held_out, intervals, rows, together
from vlm_export.gguf.architecture import architecture
from vlm_export.gguf.file import write_gguf
from vlm_export.gguf.tensors import tensors
from vlm_export.importance import measure
from vlm_export.target import silent
from vlm_models.demo.scenes import write_calibration
from vlm_models.errors import InputError
from vlm_models.model import Model, load_model
from vlm_quant.calibration import Calibration, Pair
from vlm_quant.gguf_types import GGUF_TYPES
from vlm_runtime.engines.gguf import GgufDecoder

QUESTIONS = (("What colour is it?", "It is red."), ("What colour is the square?", "Red"), ("How many?", None))


@pytest.fixture(scope="module")
def model(make_tiny: MakeTiny) -> Model:
    return load_model(make_tiny())


@pytest.fixture(scope="module")
def truths(model: Model, tmp_path_factory: pytest.TempPathFactory) -> list[Truth]:
    folder, rng, pairs = tmp_path_factory.mktemp("held"), np.random.default_rng(1), []
    for i in range(2):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        pairs += [Pair(folder / f"{i}.png", prompt, answer) for prompt, answer in QUESTIONS[: 2 + i]]
    kept = [truth for truth in held_out(model, Calibration(tuple(pairs))) if len(truth.log_probs)]
    assert len(kept) == 4  # a question without an answer has no row to compare
    return kept


def quality(model: Model, truths: list[Truth], path: Path, type: str) -> Quality:
    language = model.spec.language
    arch = architecture(language, 128)
    parts = tensors(model.checkpoint, model.spec)
    write_gguf(path, arch, {}, parts, GGUF_TYPES[type], {"tokenizer.ggml.model": "none"}, progress=silent)
    sizes = {"hidden_size": language.hidden_size, "vocab_size": language.vocab_size, "max_context": 128}
    return compared(GgufDecoder(path, **sizes, kv_cache="f32", flash_attention=False), truths, path.stat().st_size)


def test_an_exact_file_has_no_divergence_and_a_coarse_one_has(
    model: Model, truths: list[Truth], tmp_path: Path
) -> None:
    exact, coarse = (quality(model, truths, tmp_path / f"{type}.gguf", type) for type in ("f32", "q4_0"))
    assert exact.agree == exact.tokens.sum() == sum(len(truth.log_probs) for truth in truths)
    assert np.abs(exact.kl).max() < 1e-6
    assert coarse.mean > 1e-3
    assert coarse.bytes < exact.bytes


def test_truths_are_those_of_whole_sequences(model: Model, truths: list[Truth]) -> None:
    """Questions about one picture share its rows in the cache; the distributions must not notice."""
    for truth in truths:
        language = model.language_model()
        logits = language.forward(truth.example.embeds, last_row=False)[truth.example.first_read : -1]
        np.testing.assert_allclose(truth.log_probs, logits.log_softmax(-1).numpy(), atol=2e-4)
    assert [truth.picture for truth in truths] == [0, 0, 1, 1]


def test_shared_rows_end_before_the_first_that_is_read(truths: list[Truth]) -> None:
    first, second = truths[:2]
    common = gguf_quality.shared(first.example.embeds, second.example)
    assert torch.equal(first.example.embeds[:common], second.example.embeds[:common])
    assert not torch.equal(first.example.embeds[common], second.example.embeds[common])
    assert gguf_quality.shared(first.example.embeds, first.example) == first.example.first_read
    assert gguf_quality.shared(torch.empty(0, 0), first.example) == 0


def test_files_of_several_samples_count_alike() -> None:
    tokens = np.array([2, 2])
    both = together([Quality(np.array(kl), tokens, agree, 9) for kl, agree in (([1.0, 3.0], 4), ([3.0, 1.0], 2))])
    assert both.kl.tolist() == [2.0, 2.0]
    assert (both.mean, both.agree, both.bytes, both.files) == (1.0, 3.0, 9, (1.0, 1.0))


def test_intervals_are_of_pairs() -> None:
    """A file that is always a tenth better is so in every resample, however much pictures differ."""
    rng = np.random.default_rng(2)
    kl, tokens, pictures = rng.exponential(size=60), np.full(60, 3), np.repeat(np.arange(20), 3)
    base, better = Quality(kl, tokens, 0, 0), Quality(0.9 * kl, tokens, 0, 0)
    found = intervals(better, base, pictures)
    assert found["ratio_interval"] == pytest.approx([0.9, 0.9])
    low, high = found["kl_interval"]
    assert low < better.mean < high


def test_rows_compare_with_the_same_type() -> None:
    def flat(value: float) -> Quality:
        return Quality(np.full(4, value), np.full(4, 2), 6, 1_000_000)

    found = {("q4_0", w): flat(v) for w, v in zip(gguf_quality.WEIGHED, (4.0, 2.0, 1.0), strict=True)}
    none, text, both = rows(found, np.arange(4))
    assert (none["ratio"], text["ratio"], both["ratio"]) == (1.0, 0.5, 0.25)
    assert both["ratio_to_text"] == 0.5
    assert "ratio_to_text" not in text
    assert both["kl"] == 0.5
    assert both["agree"] == 0.75
    json.dumps([none, text, both])


def test_unknown_types_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown GGUF type 'q9_9': choose of f32"):
        gguf_quality.command(tmp_path, formats="q9_9")


def test_the_command_writes_what_it_shows(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = write_calibration(tmp_path / "calibration", 2).parent
    monkeypatch.chdir(tmp_path)
    gguf_quality.command(tiny, pictures=2, calibration=calibration, samples=4, draws=2, formats="q4_0", save=True)
    (path,) = (tmp_path / report.RESULTS).iterdir()
    saved = json.loads(path.read_text())
    assert [row["importance"] for row in saved["table"]] == list(gguf_quality.WEIGHED)
    assert [len(row["kl_of_files"]) for row in saved["table"]] == [1, 2, 2]
    assert (saved["pictures"], saved["calibration_pairs"]) == (2, 4)


def test_variants_are_measured_in_turn(model: Model, truths: list[Truth], tmp_path: Path) -> None:
    matter = measure(model, [truth.example for truth in truths])
    importances = {"no": [None], "image-text": [matter, matter]}
    found = list(gguf_quality.variants(model, importances, ["q4_0"], truths, tmp_path))
    assert [(name, weighed) for name, weighed, _ in found] == [("q4_0", "no"), ("q4_0", "image-text")]
    assert found[0][2].mean != found[1][2].mean
    assert found[1][2].files == pytest.approx([found[1][2].mean] * 2)
    assert not (tmp_path / "quantized.gguf").exists()
