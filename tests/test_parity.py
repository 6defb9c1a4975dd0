"""The reference is transformers' own answer, and parity sees every way in which a bundle can be off."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from checkpoints import hf_model
from conftest import MakeTiny
from vlm_export import golden, parity
from vlm_export.greedy import decode, decode_drafts
from vlm_export.reference import Reference, compute_reference, looked_up
from vlm_models.errors import CheckError
from vlm_models.model import Model, load_model
from vlm_quant.recipe import parse_recipe

TOKENS = 12


@pytest.fixture(scope="module")
def picture_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.write_picture(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return load_model(tiny)


@pytest.fixture(scope="module")
def reference(model: Model, picture_path: Path) -> Reference:
    return compute_reference(model, picture_path, golden.prompt(model.spec.prompt), tokens=TOKENS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"text": "qwen2", "tower": "siglip", "strategy": "full", "feature_layer": -1, "dtype": "bfloat16"},
        {"text": "gemma3_text", "feature_layer": [-2, 1], "adds_bos": True, "image_token": "start"},
    ],
    ids=["llama-clip", "qwen2-siglip", "gemma3-two-layers"],
)
def test_the_reference_is_what_transformers_computes(
    make_tiny: MakeTiny, picture_path: Path, options: dict[str, Any]
) -> None:
    folder = make_tiny(**options)
    ours = load_model(folder)
    found = compute_reference(ours, picture_path, golden.prompt(ours.spec.prompt), tokens=TOKENS)

    theirs, processor = hf_model(folder), transformers.AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": golden.QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.open(picture_path), text=text, return_tensors="pt", add_special_tokens=True)
    with torch.inference_mode():
        first = theirs(**inputs).logits[0, -1]
        features = theirs.model.get_image_features(inputs["pixel_values"])
        generated = theirs.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        rows = getattr(features, "pooler_output", features)
        rows = rows[0] if isinstance(rows, list | tuple) else rows
    assert found.prompt == text
    assert list(found.prompt_ids) == inputs["input_ids"][0].tolist()
    np.testing.assert_array_equal(found.pixel_values, inputs["pixel_values"].numpy())
    np.testing.assert_allclose(found.image_embeds, rows.reshape(found.image_embeds.shape).numpy(), atol=1e-5)
    np.testing.assert_allclose(found.logits[0], first.numpy(), atol=2e-4)
    new = generated[0, inputs["input_ids"].shape[1] :].tolist()
    ends = [i for i, t in enumerate(found.greedy) if t in ours.spec.prompt.eos_token_ids]
    # generate(min_new_tokens) forbids end-of-text tokens, the reference does not.
    same = ends[0] if ends else TOKENS
    assert list(found.greedy[:same]) == new[:same]


def test_each_row_of_logits_predicts_its_token(reference: Reference) -> None:
    assert reference.logits.shape[0] == len(reference.greedy) == TOKENS
    assert reference.logits.argmax(-1).tolist() == list(reference.greedy)
    assert "12 of 12 greedy tokens" in reference.how


def exact(greedy: Sequence[int]) -> Callable[[Sequence[int], int], list[int]]:
    return lambda tokens, count: list(greedy[len(tokens) : len(tokens) + count])


def wrong_at(greedy: Sequence[int], places: set[int]) -> Callable[[Sequence[int], int], list[int]]:
    wrong = [t + (i in places) for i, t in enumerate(greedy)]
    return lambda tokens, count: wrong[len(tokens) : len(tokens) + count]


def streamed(model: Model, reference: Reference, draft: Any, passes: int = 4) -> tuple[Tensor, list[int], list[int]]:
    language = model.language_model(keep=False)
    reached: list[int] = []
    logits, greedy = decode_drafts(
        language,
        torch.from_numpy(reference.inputs_embeds),
        lambda ids: looked_up(model, ids),
        TOKENS,
        draft,
        reached.append,
        passes,
    )
    return logits, greedy, reached


@pytest.mark.parametrize("places", [set(), {0}, {11}, {5}, {0, 4, 9}, {3, 4}], ids=str)
def test_drafts_right_or_wrong_give_the_plain_greedy_tokens(
    model: Model, reference: Reference, places: set[int]
) -> None:
    logits, greedy, reached = streamed(model, reference, wrong_at(reference.greedy, places))
    assert greedy == list(reference.greedy)
    np.testing.assert_allclose(logits.numpy(), reference.logits, atol=1e-4)
    # Each wrong guess costs a pass, except the last token's, which is never guessed.
    assert len(reached) == 1 + len(places - {TOKENS - 1})


def test_a_pass_budget_gives_the_first_greedy_tokens(model: Model, reference: Reference) -> None:
    logits, greedy, reached = streamed(model, reference, None, passes=3)
    assert greedy == list(reference.greedy[:3])
    assert logits.shape[0] == len(reached) == 3
    every = set(range(TOKENS))
    assert streamed(model, reference, wrong_at(reference.greedy, every))[1] == list(reference.greedy[:4])


def test_plain_decoding_streamed_and_kept_agree(model: Model, reference: Reference) -> None:
    embeds = torch.from_numpy(reference.inputs_embeds)
    language = model.language_model(keep=False)
    logits, greedy = decode(language, embeds, lambda ids: looked_up(model, ids), TOKENS, lambda count: None)
    assert greedy == list(reference.greedy)
    np.testing.assert_allclose(logits.numpy(), reference.logits, atol=1e-4)


def test_a_model_larger_than_the_memory_is_streamed(
    model: Model, picture_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_export.reference.available_memory", lambda: 1000)
    found = compute_reference(model, picture_path, reference.prompt, tokens=TOKENS, draft=exact(reference.greedy))
    assert found.greedy == reference.greedy
    assert "weights streamed, 12 of 12" in found.how
    short = compute_reference(model, picture_path, reference.prompt, tokens=TOKENS)
    assert short.greedy == reference.greedy[:4]
    assert "weights streamed, 4 of 12" in short.how


class Fake:
    """A runner that returns the reference's numbers, some of them changed."""

    inexact = False

    def __init__(self, reference: Reference, **changed: np.ndarray) -> None:
        values = {f.name: getattr(reference, f.name) for f in dataclasses.fields(reference)} | changed
        for stage in ("pixel_values", "image_features", "image_embeds", "inputs_embeds"):
            setattr(self, stage, values[stage])
        self.prompt_ids = list(values["prompt_ids"])
        self._logits, self.asked = values["logits"], None

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        self.asked = tuple(tokens)
        return self._logits


def test_an_engine_that_rounds_by_itself_is_held_to_fp16_limits_in_its_logits_alone(reference: Reference) -> None:
    rounding = Fake(reference)
    rounding.inexact = True
    found = parity.measure(rounding, reference, parse_recipe("fp32"))  # type: ignore[arg-type]
    assert found["stages"]["logits"]["threshold"] == dict(parity.LOGITS["fp16"])
    assert found["stages"]["image_embeds"]["threshold"] == dict(parity.ROWS["fp32"])
    assert "threshold" not in found["greedy"]


def measured(reference: Reference, precision: str = "fp32", **changed: Any) -> dict[str, Any]:
    runner: Any = Fake(reference, **changed)
    return parity.measure(runner, reference, parse_recipe(precision))


def noisy(values: np.ndarray, relative: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=values.shape).astype(np.float32)
    return values + noise * (relative * np.linalg.norm(values) / np.linalg.norm(noise)).astype(np.float32)


def test_equal_numbers_pass_at_every_precision(reference: Reference) -> None:
    for precision in ("fp32", "fp16", "int8", "int4"):
        found = measured(reference, precision)
        assert found["passed"]
        assert parity.failure(found, parse_recipe(precision)) is None
        assert list(found["stages"]) == list(parity.STAGES)
        assert found["greedy"]["equal"] == found["greedy"]["of"] == TOKENS
        for stage in found["stages"].values():
            assert (stage["cosine"], stage["max_abs"], stage["relative_l2"]) == (pytest.approx(1), 0, 0)
            assert stage["threshold"]
        assert (found["stages"]["logits"]["kl"], found["stages"]["logits"]["top1"]) == (0, 1)


def test_the_rows_are_forced_along_the_reference(reference: Reference) -> None:
    runner: Any = Fake(reference)
    parity.measure(runner, reference, parse_recipe("fp32"))
    assert runner.asked == reference.greedy[:-1]


@pytest.mark.parametrize("stage", list(parity.STAGES)[1:])
@pytest.mark.parametrize(
    ("precision", "fine", "far"),
    [
        ("fp32", 5e-5, 3e-4),
        ("fp16", 0.01, 0.06),
        ("int8", 0.05, 0.2),
        ("vision=int4,projector=int4,language=int4", 0.2, 0.5),
    ],
)
def test_noise_beyond_the_precision_fails_at_its_stage(
    reference: Reference, stage: str, precision: str, fine: float, far: float
) -> None:
    values = getattr(reference, stage)
    numbers = measured(reference, precision, **{stage: noisy(values, fine)})["stages"][stage]
    assert parity.missed({**numbers, "kl": 0.0}) == []
    found = measured(reference, precision, **{stage: noisy(values, far)})
    assert not found["passed"]
    assert str(parity.failure(found, parse_recipe(precision))).startswith(f"parity failed: {stage} ")


def test_a_pixel_off_by_one_level_fails_at_any_precision(reference: Reference) -> None:
    pixels = reference.pixel_values.copy()
    pixels[0, 0, 7, 9] += 1 / 255 / 0.27
    found = measured(reference, "int4", pixel_values=pixels)
    assert not found["passed"]
    assert "preprocessing" in str(parity.failure(found, parse_recipe("int4")))


def test_a_splice_that_is_one_row_late_fails_even_at_int4(reference: Reference) -> None:
    shifted = np.roll(reference.inputs_embeds, 1, axis=0)
    found = measured(reference, "int4", inputs_embeds=shifted)
    assert parity.missed(found["stages"]["inputs_embeds"]) == ["cosine"]


def test_one_other_token_fails_fp32_only(reference: Reference) -> None:
    logits = reference.logits.copy()
    best, second = np.argsort(logits[5])[[-1, -2]]
    logits[5, second] = logits[5, best] + 1e-6
    found = measured(reference, "fp32", logits=logits)
    assert found["greedy"] == {"equal": 5, "of": TOKENS, "threshold": TOKENS}
    assert not found["passed"]
    coarse = measured(reference, "int4", logits=logits)
    assert coarse["greedy"] == {"equal": 5, "of": TOKENS}
    assert coarse["stages"]["logits"]["top1"] == pytest.approx(1 - 1 / TOKENS)


def test_not_a_number_never_passes(reference: Reference) -> None:
    logits = reference.logits.copy()
    logits[3, 0] = np.nan
    found = measured(reference, "int4", logits=logits)
    assert not found["passed"]
    assert "nan" in str(parity.failure(found, parse_recipe("int4")))
    found["stages"]["logits"]["kl"] = None  # as the manifest stores it
    assert "kl" in parity.missed(found["stages"]["logits"])


def test_another_prompt_is_said_so(reference: Reference) -> None:
    ids = np.array(reference.prompt_ids)
    ids[3] += 1
    with pytest.raises(CheckError, match="token 3 is the first that differs"):
        measured(reference, prompt_ids=ids)


def test_another_prompt_length_is_said_so(reference: Reference) -> None:
    with pytest.raises(CheckError, match="inputs_embeds have shape"):
        measured(reference, inputs_embeds=reference.inputs_embeds[1:])


@pytest.mark.parametrize(
    ("precision", "stage", "says"),
    [
        ("int4", "logits", "at language=int4:g32; try --precision vision=int8,projector=fp16,language=int8"),
        ("language=int4:g128", "logits", "try --precision vision=fp16,projector=fp16,language=int4:g32"),
        ("int8", "image_features", "at vision=int8; try --precision vision=fp16,projector=fp16,language=int8"),
        (
            "projector=int8",
            "image_embeds",
            "at projector=int8; try --precision vision=fp16,projector=fp16,language=fp16",
        ),
        ("fp16", "logits", "at language=fp16; try --precision vision=fp16,projector=fp16,language=fp32"),
        ("fp32", "logits", "at fp32: this is a fault of vlm-export"),
    ],
)
def test_a_failure_says_what_to_try(reference: Reference, precision: str, stage: str, says: str) -> None:
    found = measured(reference, precision, **{stage: -getattr(reference, stage)})
    message = str(parity.failure(found, parse_recipe(precision)))
    assert message.startswith(f"parity failed: {stage} ")
    assert message.endswith(says) or says in message


def test_divergence_is_kl_of_the_softmaxes() -> None:
    a, b = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)), torch.zeros(4, 50)
    b[0] = a[0]
    expected = torch.nn.functional.kl_div(b.log_softmax(-1), a.softmax(-1), reduction="batchmean")
    found = parity.divergence(a.numpy(), b.numpy())
    assert found["kl"] == pytest.approx(float(expected), rel=1e-5)
    shifted = parity.divergence(a.numpy(), a.numpy() + 3)
    assert shifted == {"top1": 1.0, "kl": pytest.approx(0, abs=1e-6)}


def test_the_golden_picture_is_the_same_everywhere() -> None:
    pixels = np.asarray(golden.picture())
    assert pixels.shape == (372, 500, 3)
    assert int(pixels.astype(np.uint64).sum()) == 65266825
    assert min(pixels[..., c].std() for c in range(3)) > 40
