"""LLaVA-NeXT, OneVision and Interleave through the whole line, against transformers' own models and processors."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import vlm_runtime
from checkpoints import copy
from conftest import MakeTiny
from exporting import Command, command, copy_parts, exported, rewrite
from tiled import EDGE, hf_tiled, noise, tiny_tiled
from vlm_export import export, preflight
from vlm_export.importance import examples
from vlm_export.reference import picture_rows, prompt_ids, spliced
from vlm_models.errors import BundleError, CheckpointError, PromptError
from vlm_models.model import load_model
from vlm_quant.calibration import read_pairs
from vlm_runtime import tiling
from vlm_runtime.manifest import read_manifest, write_manifest
from vlm_runtime.prompt import render, user_message
from vlm_runtime.splice import splice
from vlm_runtime.tilings import anyres
from vlm_runtime.vlm import VLM

run = pytest.fixture(command)
ONE = "USER: Look here: <image>\nWhat colour is the large circle? ASSISTANT:"
TWO = "USER: First <image>, then <image>\nHow many squares are in the picture? ASSISTANT:"
SIZES = ((41, 57), (127, 31), (1, 1000), (168, 168))
TOKENS = 12
CASES: dict[str, dict[str, Any]] = {
    "next": {"family": "llava_next"},
    "next, mistral, siglip": {"family": "llava_next", "text": "mistral", "tower": "siglip", "dtype": "bfloat16"},
    "next, qwen2, bos": {"family": "llava_next", "text": "qwen2", "adds_bos": True},
    "onevision": {"family": "llava_onevision", "text": "qwen2", "tower": "siglip"},
    "onevision, shrunk": {"family": "llava_onevision", "text": "qwen2", "tower": "siglip", "max_grid": 2},
    "onevision, clip": {"family": "llava_onevision", "tower": "clip", "max_grid": 4},
}
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(case)`: the folder of a tiny checkpoint, written once. Read only."""
    return functools.cache(lambda case: tiny_tiled(tmp_path_factory.mktemp("tiled") / "checkpoint", **CASES[case]))


@pytest.fixture(scope="module")
def interleave(make_tiny: MakeTiny) -> Path:
    """LLaVA-Interleave: a SigLIP tower whose patches leave a margin, 30 // 8 = 3 along an edge."""
    options = {"text": "qwen2", "tower": "siglip", "strategy": "full", "feature_layer": -1}
    return make_tiny(image_size=30, patch_size=8, **options)


def theirs(folder: Path, prompt: str, pictures: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """What transformers' processor gives its model, OneVision's without one for videos, which needs torchvision."""
    family = json.loads((folder / "config.json").read_text())["model_type"]
    name = {"llava_onevision": "LlavaOnevisionProcessor"}.get(family)
    if name is None:
        return dict(
            transformers.AutoProcessor.from_pretrained(folder)(
                text=prompt, images=list(pictures), return_tensors="pt", images_kwargs={"do_pad": True}
            )
        )

    class Pictures(transformers.LlavaOnevisionProcessor):
        def check_argument_for_proper_class(self, name: str, given: Any) -> None:
            return

    saved = json.loads((folder / "processor_config.json").read_text())
    options = ("num_image_tokens", "vision_feature_select_strategy", "vision_aspect_ratio")
    made = Pictures(
        image_processor=transformers.AutoImageProcessor.from_pretrained(folder, backend="pil"),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        **{option: saved[option] for option in options},
    )
    return dict(made(text=[prompt], images=[list(pictures)], return_tensors="pt"))


def their_logits(folder: Path, inputs: Mapping[str, torch.Tensor], tokens: Sequence[int]) -> np.ndarray:
    """Logits (len(tokens) + 1, V) of transformers' own model after the prompt, and after each of `tokens`."""
    ids, more = inputs["input_ids"], torch.tensor([list(tokens)], dtype=torch.long)
    given = {**inputs, "input_ids": torch.cat([ids, more], 1)}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    with torch.inference_mode():
        logits: np.ndarray = hf_tiled(folder)(**given).logits[0, ids.shape[1] - 1 :].numpy()
    return logits


def check_answer(folder: Path, bundle: Path, prompt: str, pictures: Sequence[Image.Image]) -> None:
    """The runtime's token ids and greedy answer are those of transformers."""
    vlm, inputs = vlm_runtime.load(bundle, threads=1), theirs(folder, prompt, pictures)
    request = vlm.request(prompt, pictures, {}, started=0.0)
    assert list(request.ids) == inputs["input_ids"][0].tolist()
    answer = vlm.answer(prompt, pictures, raw=True, max_new_tokens=TOKENS)
    logits = their_logits(folder, inputs, answer.token_ids[:-1])
    assert list(answer.token_ids) == logits.argmax(-1).tolist()
    ended = answer.token_ids[-1] in vlm.spec.prompt.eos_token_ids
    assert len(answer.token_ids) == TOKENS or ended


def relative_l2(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_reference_equals_transformers_on_one_picture(make: Make, case: str, size: tuple[int, int]) -> None:
    folder, picture = make(case), noise(size)
    model, inputs = load_model(folder), theirs(folder, ONE, [picture])
    ids = prompt_ids(model, ONE, [picture])
    assert ids == inputs["input_ids"][0].tolist()
    embeds = spliced(model, ids, picture_rows(model, picture))
    logits = model.language_model().forward(embeds)[0].numpy()
    assert relative_l2(logits, their_logits(folder, inputs, [])[0]) <= 1e-4


@pytest.mark.parametrize("case", ["next", "onevision"])
def test_the_reference_equals_transformers_on_two_pictures(make: Make, case: str) -> None:
    folder, pictures = make(case), [noise((41, 57)), noise((127, 31), seed=1)]
    model, inputs = load_model(folder), theirs(folder, TWO, pictures)
    ids = prompt_ids(model, TWO, pictures)
    assert ids == inputs["input_ids"][0].tolist()
    rows = torch.cat([picture_rows(model, picture, 2) for picture in pictures])
    logits = model.language_model().forward(spliced(model, ids, rows))[0].numpy()
    assert relative_l2(logits, their_logits(folder, inputs, [])[0]) <= 1e-4


@pytest.mark.parametrize("case", ["next", "onevision, shrunk"])
def test_a_bundle_answers_as_transformers_about_one_and_about_several_pictures(
    make: Make, tmp_path_factory: pytest.TempPathFactory, case: str
) -> None:
    folder = make(case)
    bundle = exported(folder, tmp_path_factory)  # with its check: parity at fp32, greedy tokens equal
    record = read_manifest(bundle).parity["onnx"]
    assert record["passed"]
    assert record["stages"]["pixel_values"]["max_abs"] <= 1e-5
    for size in SIZES[:3]:
        check_answer(folder, bundle, ONE, [noise(size)])
    check_answer(folder, bundle, TWO, [noise((41, 57)), noise((127, 31), seed=1)])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_case_passes_its_check_and_answers_as_transformers(
    make: Make, tmp_path_factory: pytest.TempPathFactory, case: str
) -> None:
    bundle = exported(make(case), tmp_path_factory)
    for size in SIZES:
        check_answer(make(case), bundle, ONE, [noise(size)])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gguf", "tensorrt"])
@pytest.mark.parametrize("case", ["next", "onevision, shrunk"])
def test_the_other_targets_answer_as_transformers(make: Make, tmp_path: Path, case: str, target: str) -> None:
    engines = {"device_profiles": ["orin"]} if target == "tensorrt" else {}
    manifest = export(make(case), target, tmp_path / "bundle", precision="fp32", greedy_tokens=TOKENS, **engines)
    assert manifest.parity[target]["passed"]
    check_answer(make(case), tmp_path / "bundle", ONE, [noise(SIZES[0])])
    check_answer(make(case), tmp_path / "bundle", TWO, [noise((41, 57)), noise((127, 31), seed=1)])
    if target == "gguf":  # llama.cpp's own tools would put the rows together in another way
        part = manifest.parts["language_model"]["gguf"]
        assert "tiles" in part.details["no_mmproj"]
        assert not any("mmproj" in file for file in manifest.files)


@pytest.mark.parametrize("case", ["next", "onevision, shrunk"])
def test_calibration_sees_the_rows_that_the_bundle_will_see(
    make: Make, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, case: str
) -> None:
    noise((60, 90)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("What is it?")
    (example,) = examples(load_model(make(case)), read_pairs(tmp_path))
    vlm = vlm_runtime.load(exported(make(case), tmp_path_factory), threads=1)
    prompt = render([user_message("What is it?", 1, vlm.spec.prompt)], vlm.spec.prompt)
    request = vlm.request(prompt, [tmp_path / "a.png"], {}, started=0.0)
    assert example.ids == request.ids
    got = splice(request.ids, [vlm.encode_image(tmp_path / "a.png")], vlm.embedding)
    np.testing.assert_allclose(got, example.embeds.numpy(), rtol=0, atol=1e-5)


def test_pictures_stand_where_the_text_has_them_in_an_interleaved_prompt(
    interleave: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = exported(interleave, tmp_path_factory)
    assert read_manifest(bundle).spec.vision.image_tokens == 9
    pictures = [noise((41, 57)), noise((127, 31), seed=1)]
    check_answer(interleave, bundle, TWO, pictures)
    vlm = vlm_runtime.load(bundle, threads=1)
    turned = vlm.request(TWO, pictures[::-1], {}, started=0.0).keys
    assert turned != vlm.request(TWO, pictures, {}, started=0.0).keys


@pytest.fixture
def onevision(make: Make, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return vlm_runtime.load(exported(make("onevision, shrunk"), tmp_path_factory), threads=1)


def test_a_picture_is_cut_anew_when_another_joins_the_conversation(onevision: VLM) -> None:
    first, second = noise((60, 90)), noise((57, 41), seed=1)
    chat = onevision.chat()
    one = "".join(chat.ask("What is it?", [first], max_new_tokens=4))
    (alone,) = chat._pictures
    list(chat.ask("And this?", [second], max_new_tokens=4))
    assert chat.last is not None
    assert [picture.layout.tiles for picture in chat._pictures] == [1, 1]
    assert alone.layout.tiles > 1
    talk = (
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
        f"{one}<|im_end|>\n<|im_start|>user\n<image>\nAnd this?<|im_end|>\n<|im_start|>assistant\n"
    )
    anew = onevision.answer(talk, [first, second], raw=True, max_new_tokens=4)
    assert chat.last.token_ids == anew.token_ids
    assert chat.last.prompt_tokens == anew.prompt_tokens


def test_a_turn_that_fails_leaves_the_pictures_cut_as_they_were(onevision: VLM) -> None:
    chat = onevision.chat()
    list(chat.ask("What is it?", [noise((60, 90))], max_new_tokens=2))
    before = chat._pictures
    with pytest.raises(PromptError):
        list(chat.ask("And this? " * 900, [noise((57, 41))], max_new_tokens=2))
    assert chat._pictures == before
    list(chat.ask("And now?", max_new_tokens=2))
    assert chat._pictures == before


def test_a_picture_too_large_for_the_context_is_told_with_what_it_takes(
    make: Make, tmp_path_factory: pytest.TempPathFactory
) -> None:
    vlm = vlm_runtime.load(exported(make("next"), tmp_path_factory), threads=1, max_context=60)
    with pytest.raises(PromptError, match=r"88 of them image tokens: 88 for 56 × 56 pixels.*larger --max-context"):
        vlm.answer("What?", [noise((56, 56))])


def test_many_tiles_are_encoded_a_few_at_a_time(make: Make, tmp_path_factory: pytest.TempPathFactory) -> None:
    vlm = vlm_runtime.load(exported(make("next"), tmp_path_factory), threads=1)
    sizes: list[int] = []
    encoder = vlm.vision_encoder

    class Noted:
        def run(self, x: Any) -> Any:
            sizes.append(len(x))
            return encoder.run(x)

    picture = vlm.picture(noise((56, 56)))
    vlm.vision_encoder = Noted()
    in_turns = vlm._picture_rows(picture, {"vision": 0.0, "projector": 0.0})
    assert sizes == [4, 1]
    newline = tiling.image_newline(vlm.bundle)
    at_once = tiling.pack(vlm.projector.run(encoder.run(picture.pixels)), vlm.spec, picture.layout, newline)
    np.testing.assert_allclose(in_turns, at_once, rtol=0, atol=1e-5)


def test_the_context_has_room_for_the_largest_picture_and_a_question(make: Make) -> None:
    spec = load_model(make("next")).spec

    def with_most(resolutions: tuple[tuple[int, int], ...], positions: int) -> int:
        tiles = dataclasses.replace(spec.tiling, resolutions=resolutions)
        language = dataclasses.replace(spec.language, max_positions=positions)
        return preflight.context_of(dataclasses.replace(spec, tiling=tiles, language=language), None)

    large = ((EDGE * 16, EDGE * 16),)  # 64 lines of 64 patches, each with its end, and the overview
    assert with_most(((EDGE, EDGE),), 32768) == preflight.DEFAULT_CONTEXT
    assert with_most(large, 32768) == 16 + 64 * 65 + preflight.ROOM
    assert with_most(large, 4500) == 4500


def shifted(tiles: Any) -> Any:
    """Every tile but the overview in the place of the one before it."""
    return np.concatenate([tiles[:1], np.roll(tiles[1:], 1, axis=0)])


def _without_newline(rows: Any, spec: Any, layout: Any, newline: Any) -> Any:
    return _PACK(rows, spec, layout, np.zeros_like(newline))


_TILES, _PACK, _UNPADDED, _SHRUNK, _BEST = (
    anyres.tiles,
    anyres.pack,
    anyres._unpadded,
    anyres._shrunk,
    anyres.best_resolution,
)
MISTAKES: dict[str, tuple[str, str, Any, str]] = {
    "shifted tiles": ("next", "tiles", lambda *a: shifted(_TILES(*a)), "pixel_values max_abs"),
    "overview last": ("next", "tiles", lambda *a: np.roll(_TILES(*a), -1, 0), "pixel_values max_abs"),
    "nearest pixels": (
        "next",
        "tiles",
        lambda i, spec, layout: _TILES(
            i, dataclasses.replace(spec, preprocess=dataclasses.replace(spec.preprocess, resample=0)), layout
        ),
        "pixel_values max_abs",
    ),
    "tiles packed in another order": ("next", "pack", lambda r, *a: _PACK(shifted(r), *a), "inputs_embeds relative_l2"),
    "no newline row": ("next", "pack", _without_newline, "inputs_embeds relative_l2"),
    "padding kept": (
        "next",
        "_unpadded",
        lambda size, grid, spec: (grid[0] * 4, grid[1] * 4),
        "the bundle's prompt has",
    ),
    "another resolution": ("next", "best_resolution", lambda size, all_: all_[0], "the bundle's prompt has"),
    "not shrunk": ("onevision, shrunk", "_shrunk", lambda h, w, spec: (h, w), "the bundle's prompt has"),
    "shrunk to the nearest rows": (
        "onevision, shrunk",
        "_bilinear",
        lambda x, size: x[np.arange(size[0]) * len(x) // size[0]][:, np.arange(size[1]) * x.shape[1] // size[1]],
        "inputs_embeds relative_l2",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_cutting_or_packing_fails_the_export(
    make: Make,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    run: Command,
    monkeypatch: pytest.MonkeyPatch,
    mistake: str,
) -> None:
    case, function, wrong, told = MISTAKES[mistake]
    folder = make(case)
    copy_parts(exported(folder, tmp_path_factory), monkeypatch)
    options = ("--target", "onnx", "--precision", "fp32", "--greedy-tokens", "2")
    assert run(folder, *options, "-o", tmp_path / "right").code == 0
    monkeypatch.setattr(anyres, function, wrong)
    ran = run(folder, *options, "-o", tmp_path / "wrong")
    assert ran.code == 1
    assert "parity failed" in ran.err
    assert told in ran.err


def changed(folder: Path, to: Path, file: str, **values: Any) -> Path:
    """A copy of the folder in which a JSON file has other values; None takes one away."""
    copy(folder, to)
    data = json.loads((to / file).read_text())
    inside = data["image_processor"] if file == "processor_config.json" and "image_processor" in data else data
    inside.update(values)
    (to / file).write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    return to


CONTRADICTIONS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "a class token among the patches": (
        "next",
        "config.json",
        {"vision_feature_select_strategy": "full"},
        r"put together from 16 rows each, one a patch, but tower and projector give 17",
    ),
    "a resolution that tiles do not fill": (
        "next",
        "config.json",
        {"image_grid_pinpoints": [[28, 56], [28, 60]]},
        r"image_grid_pinpoints \(28, 60\) cannot be: .* multiples of the tower's 28",
    ),
    "a resolution of one number": ("next", "config.json", {"image_grid_pinpoints": [[28]]}, r"\(28,\) cannot be"),
    "no resolution": ("next", "config.json", {"image_grid_pinpoints": []}, r"image_grid_pinpoints \[\] cannot be"),
    "other resolutions in the processor": (
        "next",
        "processor_config.json",
        {"image_grid_pinpoints": [[28, 56]]},
        r"are 5 in config\.json and 1 others in the image processor",
    ),
    "a way to shrink that is not known": (
        "onevision",
        "config.json",
        {"vision_aspect_ratio": "anyres"},
        r"vision_aspect_ratio 'anyres' is not supported: it must be anyres_max_ and a number",
    ),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_checkpoint_that_contradicts_itself_is_refused_in_one_line(make: Make, tmp_path: Path, what: str) -> None:
    case, file, values, told = CONTRADICTIONS[what]
    folder = changed(make(case), tmp_path / "changed", file, **values)
    with pytest.raises(CheckpointError, match=told) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(next(n for n in t if n.endswith("image_newline"))), "tensor 'image_newline' is missing"),
        (
            lambda t: t.update({n: x[:60].clone() for n, x in t.items() if n.endswith("image_newline")}),
            r"image_newline has shape \(60,\), the language model takes rows of 64",
        ),
    ],
    ids=["missing", "too short"],
)
def test_a_newline_row_that_is_not_there_or_does_not_fit_is_told(
    make: Make, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], told: str
) -> None:
    folder = rewrite(copy(make("next"), tmp_path / "changed"), change)
    with pytest.raises(CheckpointError, match=told):
        load_model(folder)


def test_values_that_an_old_processor_did_not_save_come_from_the_config(make: Make, tmp_path: Path) -> None:
    """The first LLaVA-NeXT folders have no processor_config.json."""
    folder, picture = copy(make("next"), tmp_path / "old"), noise((41, 57))
    saved = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(saved["image_processor"]))
    wanted = load_model(make("next"))
    assert prompt_ids(load_model(folder), ONE, [picture]) == prompt_ids(wanted, ONE, [picture])


@pytest.mark.parametrize(
    "values",
    [{"resolutions": ()}, {"resolutions": ((30, 28),)}, {"resolutions": ((0, 28),)}, {"max_grid": -1}],
    ids=str,
)
def test_a_manifest_whose_tiles_cannot_be_is_refused(
    make: Make, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, values: dict[str, Any]
) -> None:
    manifest = read_manifest(exported(make("next"), tmp_path_factory))
    spec = manifest.spec
    wrong = dataclasses.replace(spec, tiling=dataclasses.replace(spec.tiling, **values))
    with pytest.raises(BundleError, match=r"spec\.tiling"):
        write_manifest(tmp_path, dataclasses.replace(manifest, spec=wrong))
