"""Gemma 3 and PaliGemma, whose rows see one another both ways, against transformers' own models and processors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import vlm_runtime
from both_ways import tiny_gemma3, tiny_paligemma
from vlm_export import export, reference
from vlm_export.target import find_target
from vlm_models.errors import CheckError, CheckpointError, InputError, PromptError
from vlm_models.model import load_model
from vlm_quant.recipe import parse_recipe
from vlm_runtime import blocks
from vlm_runtime.prompt import render, user_message

TOKENS = 16
QUESTION = "What colour is the large circle?"
CASES: dict[str, Callable[[Path], Path]] = {
    "gemma3": tiny_gemma3,
    "paligemma": tiny_paligemma,
    "paligemma2": lambda folder: tiny_paligemma(folder, version=2),
}
_CLASSES = {
    "gemma3": transformers.Gemma3ForConditionalGeneration,
    "paligemma": transformers.PaliGemmaForConditionalGeneration,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def make(case: str) -> Path:
        return CASES[case](tmp_path_factory.mktemp(case) / "checkpoint")

    return make


@cache
def truth(folder: Path, pictures: tuple[Path, ...], prompt: str) -> tuple[list[int], Any, list[int]]:
    """Prompt ids, logits (S, V) and the greedy tokens of transformers' own model and processor."""
    model_type = load_model(folder).spec.family
    kind: Any = _CLASSES[model_type]
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    processor: Any = transformers.AutoProcessor.from_pretrained(folder)
    text = prompt if model_type == "gemma3" else prompt.replace("<s>", "").removesuffix("\n")
    images = [Image.open(path).convert("RGB") for path in pictures]
    # As lists: PaliGemma's processor makes arrays of tensors in a way that NumPy warns of.
    out = processor(images=images, text=[text], add_special_tokens=False)
    inputs = {name: torch.from_numpy(np.asarray(values)) for name, values in out.items() if name != "labels"}
    with torch.inference_mode():
        logits = model(**inputs).logits[0].numpy()
        model.generation_config.eos_token_id = None
        tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, len(logits) :]
    return inputs["input_ids"][0].tolist(), logits, tokens.tolist()


def exported(folder: Path, to: Path, target: str, precision: str = "fp32") -> vlm_runtime.VLM:
    manifest = export(folder, target, to, precision=precision, greedy_tokens=TOKENS)
    assert manifest.parity[target]["passed"]
    return vlm_runtime.load(to, threads=1)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_equals_transformers(made: Callable[[str], Path], picture_file: Path, case: str) -> None:
    model = load_model(made(case))
    prompt = render([user_message(QUESTION, 1, model.spec.prompt)], model.spec.prompt)
    ids, logits, greedy = truth(made(case), (picture_file,), prompt)
    found = reference.compute_reference(model, picture_file, prompt, tokens=TOKENS)
    assert list(found.prompt_ids) == ids
    np.testing.assert_allclose(found.logits[0], logits[-1], atol=2e-4 * np.abs(logits[-1]).max())
    assert list(found.greedy) == greedy


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "gguf"])
@pytest.mark.parametrize("case", CASES)
def test_a_bundle_answers_as_transformers(
    made: Callable[[str], Path], picture_file: Path, tmp_path: Path, case: str, target: str
) -> None:
    if case == "paligemma2" and target == "gguf":
        folder = tiny_paligemma(tmp_path / "wide", version=2, window=256)  # llama.cpp keeps windows within a prompt
    else:
        folder = made(case)
    vlm = exported(folder, tmp_path / "bundle", target)
    prompt = render([user_message(QUESTION, 1, vlm.spec.prompt)], vlm.spec.prompt)
    ids, _, greedy = truth(folder, (picture_file,), prompt)
    request = vlm.request(prompt, [picture_file], {}, started=0.0)
    assert list(request.ids) == ids
    answer = vlm.answer(QUESTION, [picture_file], max_new_tokens=TOKENS)
    assert list(answer.token_ids) == greedy[: len(answer.token_ids)]


@pytest.mark.slow
def test_two_pictures_and_a_second_turn_equal_transformers(
    made: Callable[[str], Path], picture_file: Path, tmp_path: Path
) -> None:
    """A picture of a later turn must not cut an earlier block in the cache."""
    folder = made("gemma3")
    vlm = exported(folder, tmp_path / "bundle", "onnx")
    other = tmp_path / "other.png"
    Image.new("RGB", (40, 60), (200, 30, 90)).save(other)
    prompt = render([user_message(QUESTION, 2, vlm.spec.prompt)], vlm.spec.prompt)
    _, _, greedy = truth(folder, (picture_file, other), prompt)
    answer = vlm.answer(QUESTION, [picture_file, other], max_new_tokens=TOKENS)
    assert list(answer.token_ids) == greedy[: len(answer.token_ids)]
    chat = vlm.chat()
    said = "".join(chat.ask(QUESTION, [picture_file], max_new_tokens=4))
    assert chat.last is not None
    turns = [
        user_message(QUESTION, 1, vlm.spec.prompt),
        {"role": "assistant", "content": [{"type": "text", "text": said}]},
        user_message("And here?", 1, vlm.spec.prompt),
    ]
    _, _, greedy = truth(folder, (picture_file, other), render(turns, vlm.spec.prompt))
    list(chat.ask("And here?", [other], max_new_tokens=TOKENS))
    assert list(chat.last.token_ids) == greedy[: len(chat.last.token_ids)]


@pytest.mark.slow
def test_causal_rows_would_fail_parity(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_export.parity.blocks_of", lambda ids, spec: ())
    for case in ("gemma3", "paligemma"):
        with pytest.raises(CheckError, match="parity failed: logits"):
            export(made(case), "onnx", tmp_path / case, precision="fp32", greedy_tokens=TOKENS)


def test_targets_with_causal_attention_only_say_so(made: Callable[[str], Path]) -> None:
    for case in ("gemma3", "paligemma"):
        spec = load_model(made(case)).spec
        for name in ("coreai", "coreml", "tensorrt"):
            with pytest.raises(
                CheckpointError, match=f"target '{name}' has causal attention only.*choose onnx or gguf"
            ):
                find_target(name).requires(parse_recipe("fp16"), spec, ["language_model"], 256)


def test_calibration_is_refused_where_it_would_see_other_rows(made: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave out --calibration"):
        export(made("gemma3"), "onnx", tmp_path / "out", calibration=tmp_path)


def test_paligemma_takes_one_question(made: Callable[[str], Path]) -> None:
    prompt = load_model(made("paligemma")).spec.prompt
    asked = user_message(QUESTION, 1, prompt)
    assert render([asked], prompt) == f"<image><s>{QUESTION}\n"
    with pytest.raises(PromptError, match="PaliGemma takes one question"):
        render([asked, {"role": "assistant", "content": "x"}, asked], prompt)


def test_a_block_stays_whole_in_the_cache() -> None:
    assert blocks.whole_blocks(7, [(2, 5), (6, 9)]) == 6
    assert blocks.whole_blocks(5, [(2, 5), (6, 9)]) == 5
    assert blocks.whole_blocks(3, [(2, 5)]) == 2
    assert blocks.whole_blocks(3, []) == 3


def test_blocks_are_the_runs_of_image_tokens(made: Callable[[str], Path]) -> None:
    spec = load_model(made("gemma3")).spec
    image = spec.prompt.image_token_id
    assert blocks.blocks_of([image, image, 1, 2, image, 3], spec) == ((0, 2), (4, 5))
    causal = dataclasses.replace(spec, language=dataclasses.replace(spec.language, both_ways="none"))
    assert blocks.blocks_of([image, 1], causal) == ()


def test_pan_and_scan_is_refused(made: Callable[[str], Path], tmp_path: Path) -> None:
    import json
    import shutil

    folder = Path(shutil.copytree(made("gemma3"), tmp_path / "copy"))
    data = json.loads((folder / "processor_config.json").read_text())
    data["image_processor"]["do_pan_and_scan"] = True
    (folder / "processor_config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="do_pan_and_scan"):
        load_model(folder)
