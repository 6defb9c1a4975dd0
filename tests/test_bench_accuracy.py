"""Accuracy says what it claims: scores, KL and loss beside independent computations."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import vlm_runtime
from exporting import exported
from running import running_bundle, running_spec
from vlm_bench import accuracy, likelihood, scores
from vlm_bench.questions import Question, QuestionSet, read_questions
from vlm_models.demo.scenes import make_scene
from vlm_models.errors import CheckError, DependencyError, InputError, PromptError
from vlm_models.plain import to_plain
from vlm_runtime.splice import splice


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("Yes.", "yes"),
        ("  The  CAT,\n", "cat"),
        ("two dogs", "2 dogs"),
        ("don't", "dont"),
        ("1,000", "1000"),
        ("red/blue", "red blue"),
        ("3.5", "3.5"),
        ("A", "a"),
        ("", ""),
    ],
)
def test_normalised_answers_are_those_of_vqa(said: str, meant: str) -> None:
    assert scores.normalised(said) == meant


def test_exact_and_contains_look_at_whole_words() -> None:
    assert scores.exact("The cat.", ["dog", "cat"])
    assert not scores.exact("two cats", ["cat"])
    assert scores.contains("It is a big Cat.", ["cat"])
    assert not scores.contains("It is a category", ["cat"])
    assert not scores.contains("anything", [""])
    # A choice's letter is not an article here: nothing would be left of it.
    assert scores.exact("A.", ["A"])
    assert not scores.exact("The", ["A"])
    assert not scores.exact("", ["A"])


@pytest.mark.parametrize(
    ("said", "similarity"), [("The Coca", 0.0), ("CocaCola", 8 / 9), ("Coca cola", 1.0), ("Cola", 0.0), ("Cat", 0.0)]
)
def test_anls_is_that_of_the_robust_reading_competition(said: str, similarity: float) -> None:
    """The example of the competition's page."""
    assert scores.anls(said, ["Coca Cola", "Coca Cola Company"]) == pytest.approx(similarity)


def test_half_of_the_letters_wrong_is_no_answer() -> None:
    assert scores.anls("abXX", ["abcd"]) == 0.0
    assert scores.anls("abcX", ["abcd"]) == 0.75
    assert scores.anls("", [""]) == 1.0
    assert scores.anls("a", []) == 0.0


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_levenshtein_counts_the_fewest_edits(a: str, b: str) -> None:
    def slow(x: str, y: str) -> int:
        if not x or not y:
            return len(x) + len(y)
        return min(slow(x[1:], y) + 1, slow(x, y[1:]) + 1, slow(x[1:], y[1:]) + (x[0] != y[0]))

    assert scores.levenshtein(a, b) == slow(a, b)


def test_the_interval_is_wilsons() -> None:
    """Values of Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I."""
    assert scores.interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert scores.interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert scores.interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert scores.interval(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
    with pytest.raises(ValueError, match="0 of 0"):
        scores.interval(0, 0)


def test_divergence_is_the_kl_of_the_reference_from_the_other() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    logits = np.log(np.stack([p, q])).astype(np.float32) + 7
    assert scores.divergence(logits[:1], logits[1:]) == pytest.approx([0.25 * np.log(2)], rel=1e-5)
    assert scores.divergence(logits, logits).tolist() == [0.0, 0.0]


ASKED = QuestionSet(
    "mine",
    (
        Question("1", None, "How many?", ("Two",), "count"),
        Question("2", None, "How many?", ("Three", "3"), "count"),
        Question("3", None, "Which?", ("green",), "color"),
    ),
)


def test_scores_are_shares_of_all_questions() -> None:
    found = accuracy.score("it", ASKED, ["2", " there are three\n", "gren"])
    assert (found.questions, found.exact, found.contains) == (3, 1 / 3, 2 / 3)
    assert found.anls == pytest.approx((0 + 0 + 0.8) / 3)
    assert found.kinds == {"count": 0.5, "color": 0.0}
    assert found.interval == scores.interval(1, 3)
    assert (found.kl, found.kl_reference) == (None, None)
    assert [one.answer for one in found.per_question] == ["2", "there are three", "gren"]
    assert found.per_question[1].reference == "Three | 3"
    assert [one.exact for one in found.per_question] == [True, False, False]
    json.dumps(to_plain(found), allow_nan=False)


def test_no_questions_are_no_score() -> None:
    with pytest.raises(InputError, match="nothing holds no questions"):
        accuracy.score("it", QuestionSet("nothing", ()), [])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return running_bundle(tmp_path_factory.mktemp("accuracy") / "bundle")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same checkpoint by its fingerprint, with other weights."""
    return running_bundle(tmp_path_factory.mktemp("accuracy") / "other", seed=1)


SHORT = QuestionSet("short", tuple(Question(str(i), i % 3, f"What {i}?", ("x",)) for i in range(5)))


def _brute(folder: Path, question: Question, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Logits (len + 1, V), each row by a prefill of its own."""
    vlm = vlm_runtime.load(folder)
    prompt = likelihood.rendered(question.text, 1, vlm.spec.prompt)
    ids = vlm.request(prompt, question.pictures(), {}, started=0.0).ids
    rows = []
    for count in range(len(tokens) + 1):
        vlm.decoder.rewind(0)
        embeds = splice([*ids, *tokens[:count]], [vlm.encode_image(question.pictures()[0])], vlm.embedding)
        rows.append(vlm.decoder.prefill(embeds).copy())
    return np.stack(rows)


def test_kl_is_that_of_the_first_tokens_of_the_references_own_answer(bundle: Path, other: Path) -> None:
    first, second, third = accuracy.measure(
        {"first": (bundle, None), "second": (other, "onnx"), "third": (bundle, None)}, SHORT, max_new_tokens=6
    )
    assert (first.kl, first.kl_reference) == (None, None)
    assert second.kl_reference == third.kl_reference == "first"
    assert third.kl == pytest.approx(0, abs=1e-6)
    vlm, rows = vlm_runtime.load(bundle), []
    for question in SHORT.questions:
        said = vlm.answer(question.text, question.pictures(), max_new_tokens=likelihood.TOKENS).token_ids
        before = list(said[:-1])
        rows.append(scores.divergence(_brute(bundle, question, before), _brute(other, question, before)))
    assert second.kl == pytest.approx(np.concatenate(rows).mean(), rel=1e-3)
    assert second.kl > 0.1
    expected = vlm.answer("What 4?", [make_scene(1, "test")[0]], max_new_tokens=6).text.strip()
    assert first.per_question[4].answer == expected


def test_a_reference_may_be_a_folder_of_its_own(bundle: Path, other: Path) -> None:
    (one,) = accuracy.measure({"one": (other, None)}, SHORT, reference=bundle)
    assert one.kl is not None
    assert one.kl > 0.1
    assert one.kl_reference == "bundle"


def test_bundles_of_different_checkpoints_have_no_kl(bundle: Path, tmp_path: Path) -> None:
    stranger = running_bundle(tmp_path / "stranger", dataclasses.replace(running_spec(), fingerprint="0" * 64))
    _, found = accuracy.measure({"one": (bundle, None), "two": (stranger, None)}, SHORT)
    assert (found.kl, found.kl_reference) == (None, None)
    with pytest.raises(InputError, match="stranger is not of the checkpoint that bundle is of"):
        accuracy.measure({"two": (stranger, None)}, SHORT, reference=bundle)
    with pytest.raises(InputError, match="is no reference"):
        accuracy.measure({"two": (stranger, None)}, SHORT, reference=tmp_path)


def test_what_one_bundle_cannot_do_leaves_the_others_their_scores(bundle: Path, tmp_path: Path) -> None:
    small = running_bundle(tmp_path / "small", max_context=8)
    told: list[tuple[str, str]] = []
    stranger = running_bundle(tmp_path / "stranger", dataclasses.replace(running_spec(), fingerprint="0" * 64))
    folders = {"small": small, "stranger": stranger, "bundle": bundle}
    found = accuracy.measure(
        {name: (folder, None) for name, folder in folders.items()},
        SHORT,
        reference=bundle,
        skip=lambda what, why: told.append((what, why)),
    )
    assert [(one.name, one.kl is None) for one in found] == [("stranger", True), ("bundle", False)]
    assert [what for what, _ in told] == ["accuracy of small", "KL of stranger"]
    assert "context is 8" in told[0][1]
    with pytest.raises(PromptError, match="context is 8"):
        accuracy.measure({"small": (small, None)}, SHORT)


def test_many_questions_are_sampled_evenly() -> None:
    many = [Question(str(i), None, "?", ("x",)) for i in range(100)]
    assert [q.id for q in likelihood.spread(many, 4)] == ["0", "25", "50", "75"]
    assert likelihood.spread(many[:3], 4) == many[:3]


def test_the_answer_that_greedy_decoding_gives_is_told_from_others(bundle: Path) -> None:
    vlm, told = vlm_runtime.load(bundle), 0
    for number in range(40):
        said = vlm.answer(f"What {number}?", max_new_tokens=2)
        if vlm.tokenizer.encode(said.text.strip(), add_special_tokens=False) == list(
            said.token_ids
        ):  # else joined anew
            (loss, greedy), (worse, not_greedy) = likelihood.losses(vlm, f"What {number}?", [], [said.text, "colour"])
            assert greedy
            assert not not_greedy
            assert loss < worse
            told += 1
    assert told > 3


def test_an_empty_answer_has_no_loss(bundle: Path) -> None:
    with pytest.raises(PromptError, match="empty"):
        likelihood.losses(vlm_runtime.load(bundle), "What?", [], ["x", " "])


def test_a_checkpoint_without_torch_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(likelihood.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"vlm-export\[export\]"):
        accuracy.read_reference(tmp_path, SHORT)


@pytest.mark.slow
def test_loss_and_kl_beside_transformers(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory, picture_file: Path
) -> None:
    """Loss: that of transformers' own forward with labels. KL of a float32 bundle to its checkpoint: rounding alone."""
    folder = exported(tiny, tmp_path_factory)
    vlm = vlm_runtime.load(folder)
    picture = Image.open(picture_file).convert("RGB")
    found = likelihood.losses(vlm, "What is this?", [picture], ["red circle"])
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32).eval()
    prompt = likelihood.rendered("What is this?", 1, vlm.spec.prompt)
    ids = list(vlm.request(prompt, [picture], {}, started=0.0).ids)
    tail = vlm.tokenizer.encode(prompt + "red circle")[len(vlm.tokenizer.encode(prompt)) :]
    pixels = torch.from_numpy(np.ascontiguousarray(vlm.picture(picture).pixels)).reshape(-1, 3, 32, 32)
    with torch.no_grad():
        loss = model(
            input_ids=torch.tensor([ids + tail]),
            pixel_values=pixels,
            labels=torch.tensor([[-100] * len(ids) + tail]),
        ).loss
    assert found[0][0] == pytest.approx(float(loss), rel=1e-4)
    assert not found[0][1]
    asked = QuestionSet("one", (Question("1", picture_file, "What is this?", ("x",)), Question("2", 0, "And?", ("x",))))
    (score,) = accuracy.measure({"bundle": (folder, None)}, asked, reference=tiny)
    assert score.kl == pytest.approx(0, abs=1e-5)
    assert score.kl_reference == tiny.name
    nothing = QuestionSet("blind", (Question("1", None, "What?", ("x",)),))
    with pytest.raises(InputError, match="no question of blind has a picture"):
        accuracy.read_reference(tiny, nothing)


def test_the_command_prints_every_score(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy.command(bundle, pictures=1)
    demo = json.loads(capsys.readouterr().out)
    assert set(demo) == {"pictures", "mean", "kinds"}
    accuracy.command(bundle, questions="demo:1", reference=bundle)
    found = json.loads(capsys.readouterr().out)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["questions"] == len(read_questions("demo:1").questions)
    assert len(found["interval"]) == 2
    with pytest.raises(InputError, match="--questions"):
        accuracy.command(bundle, reference=bundle)


def test_logits_that_are_no_numbers_are_not_scored(bundle: Path) -> None:
    vlm = vlm_runtime.load(bundle)
    reference = likelihood.bundle_reference("it", vlm, SHORT)
    broken = dataclasses.replace(
        reference,
        distributions=tuple(
            dataclasses.replace(one, logits=np.full_like(one.logits, np.nan)) for one in reference.distributions
        ),
    )
    with pytest.raises(CheckError, match="not numbers"):
        likelihood.mean_divergence(vlm, broken)


def test_importing_accuracy_loads_neither_torch_nor_lmms_eval() -> None:
    heavy = "{'torch', 'transformers', 'lmms_eval'}"
    code = f"import sys, vlm_bench.accuracy, vlm_bench.lmms; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
