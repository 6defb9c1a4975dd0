"""Drift: the stage where a bundle parts from its checkpoint is named, and answers are compared word by word."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporting import exported
from vlm_bench import drift as drift_module
from vlm_bench.diff import words
from vlm_bench.drift import Candidate, deviations, drift, first_drift
from vlm_bench.results import SCHEMA, Deviation
from vlm_export.parity import STAGES
from vlm_models.errors import BundleError, DependencyError, InputError
from vlm_models.plain import to_plain
from vlm_runtime import load
from vlm_runtime.engines import onnx

QUESTIONS = ["What is it?", "How many squares are in the picture?"]
PART = {"vision_encoder": "image_features", "projector": "image_embeds", "language_model": "logits"}


@pytest.fixture(scope="module")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint at fp32. Read only."""
    return exported(tiny, tmp_path_factory)


class Noisy:
    """A part whose results are off by `share` of their size."""

    def __init__(self, part: Any, share: float) -> None:
        self.part, self.share = part, share

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def _off(self, x: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(0).normal(0, self.share * x.std(), x.shape)
        return (x + noise).astype(np.float32)

    def run(self, x: np.ndarray) -> np.ndarray:
        return self._off(self.part.run(x))

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        return self._off(self.part.prefill(embeds))

    def decode(self, embed: np.ndarray) -> np.ndarray:
        return self._off(self.part.decode(embed))


def spoil(monkeypatch: pytest.MonkeyPatch, part: str, share: float) -> None:
    """From here on engine onnx runs `part` with noise."""
    encoder, decoder = onnx.encoder, onnx.decoder

    def noisy_encoder(bundle: Any, name: str, options: Any) -> Any:
        made = encoder(bundle, name, options)
        return Noisy(made, share) if name == part else made

    def noisy_decoder(bundle: Any, options: Any) -> Any:
        made = decoder(bundle, options)
        return Noisy(made, share) if part == "language_model" else made

    monkeypatch.setattr(onnx, "encoder", noisy_encoder)
    monkeypatch.setattr(onnx, "decoder", noisy_decoder)


def test_an_exact_bundle_does_not_drift_from_its_checkpoint(bundle: Path, tiny: Path, picture_file: Path) -> None:
    found = drift([Candidate("fp32", bundle)], [picture_file], QUESTIONS, checkpoint=tiny, max_new_tokens=6, threads=1)
    assert [one.prompt for one in found] == QUESTIONS
    for one in found:
        assert (one.name, one.reference, one.image, one.first) == ("fp32", "checkpoint", str(picture_file), None)
        assert list(one.stages) == list(STAGES)
        assert all(stage.relative_l2 is not None and stage.relative_l2 < 1e-4 for stage in one.stages.values())
        assert one.answer == one.reference_answer
        assert {step.op for step in one.words} <= {"equal"}
    schema = json.loads(SCHEMA.read_text("utf-8"))
    case = {"$ref": "#/$defs/Drift", "$defs": schema["$defs"]}
    jsonschema.validate(to_plain(found[0]), case)


@pytest.mark.parametrize("part", PART)
def test_the_first_stage_that_drifts_is_that_of_the_part_that_is_off(
    part: str, bundle: Path, tiny: Path, picture_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, part, 0.2)
    (one,) = drift([Candidate("x", bundle)], [picture_file], QUESTIONS[:1], checkpoint=tiny, threads=1)
    assert one.first == PART[part]
    before = list(STAGES)[: list(STAGES).index(PART[part])]
    assert all(one.stages[stage].cosine == pytest.approx(1, abs=1e-6) for stage in before)


def test_noise_as_small_as_that_of_fp16_is_not_drift(
    bundle: Path, tiny: Path, picture_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "projector", 0.01)
    (one,) = drift([Candidate("x", bundle)], [picture_file], QUESTIONS[:1], checkpoint=tiny, threads=1)
    assert one.first is None
    embeds = one.stages["image_embeds"]
    assert embeds.cosine is not None
    assert 0.999 < embeds.cosine < 0.99999


def test_without_a_checkpoint_the_first_bundle_is_the_reference(
    bundle: Path, picture_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = [Candidate("first", bundle), Candidate("second", bundle, "onnx")]
    found = drift(candidates, [picture_file], QUESTIONS, max_new_tokens=4, threads=1)
    assert [(one.reference, one.name, one.first) for one in found] == [("first", "second", None)] * 2
    assert all(one.stages["logits"].max_abs == 0 for one in found)


def test_logits_follow_the_tokens_of_the_reference(
    bundle: Path, tiny: Path, picture_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one other token would make all logits after it look wrong."""
    vlm = load(bundle, threads=1)
    own = drift_module.trace(vlm, (picture_file, QUESTIONS[0]), 5)
    other = [token + 1 for token in own.tokens]
    along = drift_module.trace(vlm, (picture_file, QUESTIONS[0]), 5, other)
    assert along.answer == own.answer
    assert np.array_equal(along.stages["logits"][0], own.stages["logits"][0])
    assert not np.array_equal(along.stages["logits"][1], own.stages["logits"][1])
    assert own.stages["logits"].argmax(-1).tolist() == list(own.tokens)


def test_a_stage_of_another_shape_has_no_numbers_and_drifts(bundle: Path, picture_file: Path) -> None:
    one = drift_module.trace(load(bundle, threads=1), (picture_file, QUESTIONS[0]), 2)
    cut = drift_module.Trace({**one.stages, "image_embeds": one.stages["image_embeds"][1:]}, one.tokens, "", True)
    found = deviations(one, cut)
    assert found["image_embeds"] == Deviation(None, None, None)
    assert first_drift(found) == "image_embeds"


def test_numbers_that_are_not_finite_are_none_and_drift(bundle: Path, picture_file: Path) -> None:
    one = drift_module.trace(load(bundle, threads=1), (picture_file, QUESTIONS[0]), 2)
    broken = one.stages["image_features"].copy()
    broken.flat[0] = np.nan
    found = deviations(one, drift_module.Trace({**one.stages, "image_features": broken}, one.tokens, "", True))
    assert found["image_features"] == Deviation(None, None, None)
    assert first_drift(found) == "image_features"


def test_a_candidate_that_cannot_run_is_told_and_the_others_go_on(bundle: Path, picture_file: Path) -> None:
    candidates = [Candidate("first", bundle), Candidate("gone", bundle, "gguf"), Candidate("second", bundle)]
    told: list[tuple[str, str]] = []
    found = drift(
        candidates, [picture_file], QUESTIONS[:1], max_new_tokens=2, threads=1, skip=lambda *why: told.append(why)
    )
    assert [one.name for one in found] == ["second"]
    assert [name for name, _ in told] == ["gone"]
    assert "the bundle has nothing for engine 'gguf'" in told[0][1]
    with pytest.raises(InputError, match="nothing for engine 'gguf'"):
        drift(candidates, [picture_file], QUESTIONS[:1], max_new_tokens=2, threads=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given.update(images=[]), "no picture or no prompt"),
        (lambda given: given.update(prompts=[]), "no picture or no prompt"),
        (lambda given: given.update(candidates=given["candidates"][:1]), "give two bundles, or one and --checkpoint"),
        (lambda given: given.update(candidates=[]), "give two bundles"),
    ],
)
def test_nothing_to_compare_is_one_line(
    change: Callable[[dict[str, Any]], None], message: str, bundle: Path, picture_file: Path
) -> None:
    arguments: dict[str, Any] = {
        "candidates": [Candidate("a", bundle), Candidate("b", bundle)],
        "images": [picture_file],
        "prompts": QUESTIONS,
    }
    change(arguments)
    with pytest.raises(InputError, match=message) as error:
        drift(**arguments)
    assert "\n" not in str(error.value)


def test_bundles_of_different_checkpoints_are_not_compared(bundle: Path, tiny_siglip: Path, picture_file: Path) -> None:
    with pytest.raises(InputError, match="llama is not of the same checkpoint as checkpoint"):
        drift([Candidate("llama", bundle)], [picture_file], QUESTIONS[:1], checkpoint=tiny_siglip, max_new_tokens=2)


def test_a_checkpoint_without_transformers_names_what_to_install(
    bundle: Path, tiny: Path, picture_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DependencyError, match=r"transformers: pip install 'vlm-export\[export\]'"):
        drift([Candidate("a", bundle)], [picture_file], QUESTIONS, checkpoint=tiny)


def test_a_damaged_reference_is_always_an_error(picture_file: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        drift(
            [Candidate("gone", tmp_path / "no"), Candidate("b", bundle)],
            [picture_file],
            QUESTIONS,
            skip=lambda name, why: None,
        )


def steps(reference: str, answer: str) -> list[tuple[str, str, str]]:
    return [(one.op, one.reference, one.answer) for one in words(reference, answer)]


def test_words_that_differ_are_marked_and_no_others() -> None:
    assert steps("A red cross at the top left.", "A red circle at the left.") == [
        ("equal", "A red ", "A red "),
        ("replace", "cross", "circle"),
        ("equal", " at the", " at the"),
        ("delete", " top", ""),
        ("equal", " left.", " left."),
    ]


def test_spaces_alone_are_no_likeness() -> None:
    assert steps("one two three", "four five six") == [("replace", "one two three", "four five six")]


def test_words_of_scripts_without_spaces_are_letters() -> None:
    assert steps("赤い丸です", "青い丸です") == [("replace", "赤", "青"), ("equal", "い丸です", "い丸です")]


@pytest.mark.parametrize("text", ["", "Red", "two\nlines  "])
def test_equal_answers_differ_nowhere(text: str) -> None:
    assert all(op == "equal" for op, _, _ in steps(text, text))


@given(st.text(max_size=60), st.text(max_size=60))
def test_the_steps_hold_both_texts_whole(reference: str, answer: str) -> None:
    found = words(reference, answer)
    assert "".join(one.reference for one in found) == reference
    assert "".join(one.answer for one in found) == answer
    assert all(one.reference == one.answer for one in found if one.op == "equal")
