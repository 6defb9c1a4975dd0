"""LLaVA's original layout beside transformers' LLaVA of the same weights, and its own preprocessing and tokenizing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import vlm_runtime
from checkpoints import hf_model
from exporting import copy_parts, exported
from originals import TOWER_NAMES, Made, copy, sentencepiece_model, tiny_original
from vlm_export import export
from vlm_export.reference import Reference, compute_reference
from vlm_export.reference_prompt import question_text
from vlm_models.checkpoint import Sources
from vlm_models.errors import CheckError, CheckpointError
from vlm_models.layouts import original
from vlm_models.model import Model, load_model
from vlm_models.original import config as translated
from vlm_runtime.image import preprocess
from vlm_runtime.manifest import read_manifest
from vlm_runtime.tiling import layout_of
from vlm_runtime.tokenizer import Tokenizer, prompt_ids

MEAN = (0.48145466, 0.4578275, 0.40821073)
QUESTION = "What colour is the large circle?"

CASES: dict[str, dict[str, Any]] = {
    "llama, own tower": {"vocabulary": 400},  # <image> is id 400, beyond the table
    "llama, named tower": {"carried": False},
    "llama, tower beside": {"spelling": TOWER_NAMES[1], "config": {"mm_vision_tower": "../tower"}},
    "tower without wrappers": {"spelling": TOWER_NAMES[2], "pickled": True},
    "wrapped by training": {"spelling": TOWER_NAMES[3], "dtype": "bfloat16"},
    "square": {"config": {"image_aspect_ratio": "square"}},
    "mistral": {"text": "mistral", "name": "mine"},
    "qwen2 and siglip": {"text": "qwen2", "tower": "siglip", "tokens": "bpe", "name": "mine", "carried": False},
    "siglip as its code": {"text": "qwen2", "tower": "siglip", "tokens": "bpe", "config": {"image_aspect_ratio": None}},
    "every row": {
        "strategy": "full",
        "feature_layer": -1,
        "config": {"mm_vision_select_feature": "cls_patch", "model_type": "llava", "architectures": []},
    },
    "v0": {"name": "llava-7b-v0", "carried": False},
}


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """The three folders of a case, written once. Read only."""

    @cache
    def one(case: str) -> Made:
        return tiny_original(tmp_path_factory.mktemp("original"), **CASES[case])

    return one


Make = Callable[[str], Made]


@pytest.fixture(scope="session")
def bundle(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first case at fp32, with its check. Read only."""
    return exported(make("llama, own tower").folder, tmp_path_factory)


def asked(folder: Path, picture: Path, sources: Sources | None = None) -> tuple[Model, Reference]:
    model = load_model(folder, sources or Sources())
    return model, compute_reference(model, picture, question_text(model, QUESTION), tokens=8)


def logits_of_twin(made: Made, reference: Reference, image_token: int) -> np.ndarray:
    """transformers' LLaVA on the same pixels and ids, spliced by hand as LLaVA's code does: chunks and rows in turn."""
    twin = hf_model(made.twin)
    layer, strategy = twin.config.vision_feature_layer, twin.config.vision_feature_select_strategy
    with torch.inference_mode():
        rows = twin.model.get_image_features(
            torch.from_numpy(reference.pixel_values),
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
        ).pooler_output[0]
        table = twin.get_input_embeddings()
        pieces: list[torch.Tensor] = []
        ids = list(reference.prompt_ids)
        first = ids.index(image_token)
        last = len(ids) - ids[::-1].index(image_token)
        assert last - first == len(rows) == ids.count(image_token)
        pieces = [table(torch.tensor(ids[:first])), rows, table(torch.tensor(ids[last:]))]
        embeds = torch.cat(pieces)[None]
        hidden = twin.model.language_model(inputs_embeds=embeds).last_hidden_state
        return np.asarray(twin.lm_head(hidden)[0, -1].numpy())


def ids_as_the_original(text: str, tokenize: Callable[[str], list[int]], bos: int | None, token: int) -> list[int]:
    """`tokenizer_image_token` of llava/mm_utils.py: chunks tokenized apart, BOS before the first alone."""
    chunks = [tokenize(chunk) for chunk in text.split("<image>")]
    offset = int(bos is not None and chunks[0][:1] == [bos])
    ids = list(chunks[0])
    for chunk in chunks[1:]:
        ids += [token, *chunk[offset:]]
    return ids


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_computes_what_transformers_computes(make: Make, picture_file: Path, case: str) -> None:
    made = make(case)
    model, reference = asked(made.folder, picture_file)
    wanted = logits_of_twin(made, reference, model.spec.prompt.image_token_id)
    found = reference.logits[0]
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-5
    assert int(found.argmax()) == int(wanted.argmax())
    assert model.spec.prompt.chunked


def test_the_tower_that_was_taken_is_said(make: Make) -> None:
    own, named = load_model(make("llama, own tower").folder), load_model(make("llama, named tower").folder)
    assert own.checkpoint.notes[0].startswith("vision tower: the checkpoint's own, of 3 layers")
    assert named.checkpoint.notes[0].endswith("tower, named by config.json; the checkpoint has none")


def test_a_fine_tuned_tower_goes_before_the_named_one(make: Make, picture_file: Path, tmp_path: Path) -> None:
    made = make("llama, own tower")
    folder = copy(made.folder, tmp_path / "llava-v1.5-tuned")
    tensors = load_file(folder / "model.safetensors")
    name = f"{TOWER_NAMES[0]}encoder.layers.0.mlp.fc1.weight"
    save_file({**tensors, name: tensors[name] * 2}, folder / "model.safetensors")
    other = asked(folder, picture_file, Sources(vision_tower=made.tower))[1]
    assert not np.allclose(other.image_features, asked(made.folder, picture_file)[1].image_features)


def test_the_tower_may_be_given(make: Make, picture_file: Path, tmp_path: Path) -> None:
    made = make("llama, named tower")
    folder = copy(made.folder, tmp_path / "llava-v1.5-moved")
    with pytest.raises(
        CheckpointError, match=r"config.json names, '\.\./tower', is neither a folder .* --vision-tower"
    ):
        load_model(folder)
    given = asked(folder, picture_file, Sources(vision_tower=made.tower))[1]
    assert np.array_equal(given.image_features, asked(made.folder, picture_file)[1].image_features)


def expanded(picture: Image.Image) -> Image.Image:
    """`expand2square` of llava/mm_utils.py."""
    width, height = picture.size
    square = Image.new("RGB", (max(width, height),) * 2, tuple(int(m * 255) for m in MEAN))
    square.paste(picture, (max(0, (height - width) // 2), max(0, (width - height) // 2)))
    return square


SIZES = [(1, 1), (1, 9), (9, 1), (2, 3), (31, 33), (32, 32), (33, 31), (57, 41), (41, 57), (97, 13), (13, 97), (64, 48)]
SIZES += [(48, 64), (101, 103), (7, 211), (211, 7), (128, 127), (5, 4), (3, 300), (300, 3)]


@pytest.mark.parametrize("case", ["llama, own tower", "square", "siglip as its code"])
def test_pixels_are_those_of_the_original_preprocessing(make: Make, case: str) -> None:
    spec = load_model(make(case).folder).spec.preprocess
    edge = 32
    processor: Any = transformers.SiglipImageProcessorPil(size={"height": edge, "width": edge})
    if "siglip" not in case:
        processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size=edge)
    for width, height in SIZES:
        noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
        given = picture = Image.fromarray(noise)
        if case == "llama, own tower":
            given = expanded(picture)
        wanted = processor(images=given, return_tensors="np")["pixel_values"][0]
        assert np.abs(preprocess(picture, spec) - wanted).max() <= 1e-6, (width, height)


TEXTS = [
    "USER: <image>\nWhat is this? ASSISTANT:",
    "<image>",
    "Look: <image> and then  <image>, which?",
    " <image>\n\n",
    "   a\n b <image>   c\n d",
    "Größe 東京 🙂 <image> [INST] x [/INST] ### y",
]


def test_ids_are_those_of_sentencepiece_chunk_by_chunk(bundle: Path) -> None:
    model = vlm_runtime.load(bundle, threads=1)
    spec = model.spec.prompt
    assert spec.image_token_id == 400 == model.spec.language.vocab_size
    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    picture = Image.new("RGB", (9, 7))
    for text in TEXTS:
        wanted = ids_as_the_original(text, lambda chunk: [1, *pieces.encode(chunk)], 1, spec.image_token_id)
        request = model.request(text, [picture] * text.count("<image>"), {}, started=0.0)
        assert list(request.ids) == repeated(wanted, spec.image_token_id, spec.image_tokens)
    answer = model.answer(TEXTS[0], [picture], raw=True, max_new_tokens=4)
    assert answer.image_tokens == spec.image_tokens


@pytest.mark.parametrize("legacy", [True, False])
def test_chunks_are_read_as_sentencepiece_reads_them(tmp_path: Path, legacy: bool) -> None:
    checkpoint = load_model(tiny_original(tmp_path, legacy=legacy).folder).checkpoint
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint.files / "tokenizer.json"))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    for chunk in [chunk for text in TEXTS for chunk in text.split("<image>")]:
        assert tokenizer.encode(chunk).ids == [1, *pieces.encode(chunk)], chunk
    after = tokenizer.encode("red</s>USER:", add_special_tokens=False).tokens
    assert after[after.index("</s>") + 1].startswith("▁") == legacy


def repeated(ids: list[int], token: int, times: int) -> list[int]:
    return [i for one in ids for i in ([one] * times if one == token else [one])]


def test_bundle_answers_as_the_checkpoint_does(make: Make, bundle: Path, picture_file: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.parity["onnx"]["passed"]
    assert manifest.parity["onnx"]["greedy"]["equal"] == 32
    _, reference = asked(make("llama, own tower").folder, picture_file)
    model = vlm_runtime.load(bundle, threads=1)
    answer = model.answer(QUESTION, [picture_file], max_new_tokens=8)
    assert answer.token_ids == reference.greedy[: len(answer.token_ids)]
    assert answer.prompt_tokens == len(reference.prompt_ids)


TILED = {
    "1.6": {"tiled": "llava_next", "name": "llava-v1.6-vicuna"},
    "1.6 and siglip": {"tiled": "llava_next", "tower": "siglip", "text": "qwen2", "name": "llava-next-qwen"},
    "OneVision": {"tiled": "llava_onevision", "tower": "siglip", "text": "qwen2", "name": "llava-onevision"},
}


def best(size: tuple[int, int], resolutions: list[list[int]]) -> tuple[int, int]:
    """`select_best_resolution` of llava/mm_utils.py on (width, height): most pixels kept, then least wasted."""
    width, height = size
    found: list[tuple[int, int, tuple[int, int]]] = []
    for w, h in resolutions:
        scale = min(w / width, h / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        found.append((kept, kept - w * h, (w, h)))
    most = max((kept, wasted) for kept, wasted, _ in found)
    return next(one for kept, wasted, one in found if (kept, wasted) == most)


@pytest.mark.parametrize("case", TILED)
def test_tiles_are_as_in_transformers_and_chosen_as_in_the_original(tmp_path: Path, case: str) -> None:
    made = tiny_original(tmp_path, tokens="bpe", **TILED[case])
    original, twin = load_model(made.folder), load_model(made.twin)
    ours, theirs = original.spec, twin.spec
    assert (ours.family, ours.tiling, ours.vision, ours.language) == (
        *(theirs.family, theirs.tiling, theirs.vision, theirs.language),
    )
    pinpoints = json.loads((made.folder / "config.json").read_text())["image_grid_pinpoints"]
    tokenizer = tokenizers.Tokenizer.from_file(str(original.checkpoint.files / "tokenizer.json"))
    text = question_text(original, QUESTION)
    for size in ((57, 41), (41, 57), (200, 20), (13, 190)):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
        path = tmp_path / "picture.png"
        picture.save(path)
        layout = layout_of(size[::-1], ours)
        w, h = best(size, pinpoints)
        assert layout.grid == (h // ours.vision.image_size, w // ours.vision.image_size)
        reference = compute_reference(original, path, text, tokens=4)
        same = compute_reference(twin, path, text, tokens=4)
        assert np.array_equal(reference.pixel_values, same.pixel_values)
        np.testing.assert_allclose(reference.inputs_embeds, same.inputs_embeds, atol=1e-5)
        assert reference.greedy == same.greedy
        read = prompt_ids(text, [layout], lambda piece: tokenizer.encode(piece).ids, ours.prompt)
        assert tuple(read) == reference.prompt_ids == same.prompt_ids


def test_pinpoints_may_be_a_range_of_tiles(tmp_path: Path) -> None:
    changes = {"image_grid_pinpoints": "(1x1),...,(6x6)", "image_aspect_ratio": "anyres_max_9"}
    made = tiny_original(tmp_path, tokens="bpe", config=changes, **TILED["OneVision"])
    assert load_model(made.folder).spec.tiling == load_model(made.twin).spec.tiling


def test_answers_end_where_the_next_turn_begins(make: Make) -> None:
    v0, v1 = load_model(make("v0").folder).spec.prompt, load_model(make("llama, own tower").folder).spec.prompt
    assert v0.stop == ("###",)
    assert v1.stop == ()
    assert 2 in v1.eos_token_ids


def changed(made: Made, to: Path, **changes: Any) -> Path:
    """A copy whose tower is where it was, with other keys of config.json; None removes one."""
    folder, changes = copy(made.folder, to), {"mm_vision_tower": str(made.tower), **changes}
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def test_start_and_end_stand_around_the_picture(make: Make, picture_file: Path, tmp_path: Path) -> None:
    folder = changed(make("square"), tmp_path / "llava-v1", mm_use_im_start_end=True)
    model, reference = asked(folder, picture_file)
    assert "USER: <im_start><image><im_end>\nWhat colour" in reference.prompt
    ids = list(reference.prompt_ids)
    first = ids.index(model.spec.prompt.image_token_id)
    assert ids[first - 1] == 400
    assert ids[first + 16] == 401
    assert model.spec.prompt.image_token_id == 402
    third = changed(make("square"), tmp_path / "v0", mm_use_im_start_end=True, mm_use_im_patch_token=None)
    ids = list(asked(third, picture_file)[1].prompt_ids)
    first = ids.index(403)
    assert (ids[first - 1], ids[first + 16]) == (401, 402)
    short = changed(make("llama, own tower"), tmp_path / "short", mm_use_im_start_end=True)
    with pytest.raises(CheckpointError, match=r"asks for '<im_start>' .* id 400, outside the embedding table of 400"):
        load_model(short)


def test_a_projector_alone_goes_onto_its_base(make: Make, picture_file: Path, tmp_path: Path) -> None:
    whole = make("llama, named tower")
    tensors = load_file(whole.folder / "model.safetensors")
    projector = {name: t for name, t in tensors.items() if "mm_projector" in name}
    base, stage = copy(whole.folder, tmp_path / "vicuna"), tmp_path / "llava-v1.5-pretrain"
    save_file({n: t for n, t in tensors.items() if n not in projector}, base / "model.safetensors")
    stage.mkdir()
    (stage / "config.json").write_bytes((whole.folder / "config.json").read_bytes())
    torch.save(projector, stage / "mm_projector.bin")
    sources = Sources(base=base, vision_tower=whole.tower)
    model, reference = asked(stage, picture_file, sources)
    assert np.array_equal(reference.logits, asked(whole.folder, picture_file)[1].logits)
    assert model.checkpoint.notes[0].startswith("projector of llava-v1.5-pretrain, everything else of the base model")
    with pytest.raises(CheckpointError, match=r"holds a projector alone, and its base model 'None' .* --base"):
        load_model(stage)
    with pytest.raises(CheckpointError, match=r"holds a whole model: --base is for adapters"):
        load_model(whole.folder, sources)
    torch.save({**projector, "model.embed_tokens.weight": torch.ones(2, 64)}, stage / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"holds 'language_model.embed_tokens.weight' beside the projector"):
        load_model(stage, sources)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "projector": ({"mm_projector_type": "qformer"}, r"mm_projector_type 'qformer' is not supported; .*ldpnet"),
    "mpt": ({"model_type": "llava_mpt", "architectures": ["LlavaMptForCausalLM"]}, r"'mpt' .* supported are gemma, "),
    "phi": ({"model_type": "bunny-phi", "architectures": ["BunnyPhiForCausalLM"]}, "language model 'phi'"),
    "aspect": ({"image_aspect_ratio": "highres"}, "image_aspect_ratio 'highres' .* square, pad, anyres"),
    "merge": ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat"}, "mm_patch_merge_type 'flat'"),
    "feature": ({"mm_vision_select_feature": "cls"}, "'cls' is neither 'patch' nor 'cls_patch'"),
    "scales": ({"s2": True}, r"a tower at several scales \(S2\)"),
    "resampler": ({"mm_resampler_type": "perceiver"}, r"a resampler \(mm_resampler_type: perceiver\)"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantized weights"),
    "layer": ({"mm_vision_select_layer": -9}, "vision_feature_layer -9 is outside the tower's 4 hidden states"),
    "tower": ({"mm_vision_tower": "eva"}, "a clip_vision_model of width 48 is none of the known .* --vision-tower"),
    "pinpoints": (
        {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": "all"},
        "image_grid_pinpoints 'all' cannot be read",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_refused_in_one_line(make: Make, tmp_path: Path, case: str) -> None:
    changes, words = BAD[case]
    folder = changed(make("llama, own tower"), tmp_path / "llava-v1", **changes)
    with pytest.raises(CheckpointError, match=words) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


DAMAGED: dict[str, dict[str, Any]] = {
    "layer": {"mm_vision_select_layer": "last"},
    "layers": {"mm_vision_select_layer": [-2]},
    "tower": {"mm_vision_tower": [1, 2]},
    "architectures": {"architectures": 7},
    "ends": {"eos_token_id": "</s>"},
    "rope": {"rope_scaling": [1]},
    "hidden": {"hidden_size": "wide"},
    "pinpoints": {
        "image_grid_pinpoints": [["a", "b"]],
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
    },
    "merge": {"image_aspect_ratio": ["anyres"], "mm_patch_merge_type": {}},
    "start": {"mm_use_im_start_end": [], "mm_projector_type": {"a": 1}},
}


@pytest.mark.parametrize("case", DAMAGED)
def test_values_of_other_kinds_are_one_line(make: Make, tmp_path: Path, case: str) -> None:
    folder = changed(make("llama, own tower"), tmp_path / "llava-v1", **DAMAGED[case])
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


BROKEN = {
    "added_tokens.json": '{"<im_end>": "x"}',
    "tokenizer_config.json": "[]",
    "tokenizer.model": "nothing",
    "tokenizer.json": "{}",
    "preprocessor_config.json": '{"image_mean": 3, "image_std": "x", "resample": "cubic"}',
    "generation_config.json": '{"eos_token_id": {}}',
    "config.json": '{"mm_vision_tower": null, "mm_projector_type": null}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_files_are_one_line(make: Make, tmp_path: Path, name: str) -> None:
    folder = changed(make("llama, own tower"), tmp_path / "llava-v1")
    tower = Path(shutil.copytree(make("llama, own tower").tower, tmp_path / "tower"))
    (tower / "preprocessor_config.json").unlink()
    (folder / name).write_text(BROKEN[name])
    with pytest.raises(CheckpointError) as error:
        load_model(folder, Sources(vision_tower=tower))
    assert "\n" not in str(error.value)


def test_a_projector_that_does_not_meet_its_neighbours_is_refused_with_both_numbers(make: Make, tmp_path: Path) -> None:
    folder = changed(make("llama, own tower"), tmp_path / "llava-v1")
    tensors = load_file(folder / "model.safetensors")
    wide = torch.zeros(64, 52)
    save_file({**tensors, "model.mm_projector.0.weight": wide}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="takes rows of 52, but the vision tower gives rows of 48"):
        load_model(folder)


def test_mixed_layouts_and_missing_pieces_are_refused(make: Make, tmp_path: Path) -> None:
    folder = changed(make("llama, own tower"), tmp_path / "llava-v1")
    tensors = load_file(folder / "model.safetensors")
    strange = {"multi_modal_projector.linear_1.weight": torch.zeros(2, 2)}
    save_file({**tensors, **strange}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"two layouts are mixed: .*'multi_modal_projector.linear_1.weight'"):
        load_model(folder)
    twice = {"mm_projector.0.weight": tensors["model.mm_projector.0.weight"].clone()}
    save_file({**tensors, **twice}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"two tensors are both 'multi_modal_projector\.0\.weight'"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has neither a model .* nor a projector"):
        load_model(folder)


def test_without_a_tokenizer_nothing_can_be_asked(make: Make, tmp_path: Path) -> None:
    folder = changed(make("llama, own tower"), tmp_path / "llava-v1")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_model(folder)


def test_code_in_a_checkpoint_is_never_run(make: Make, tmp_path: Path) -> None:
    code = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
    folder = changed(make("llama, own tower"), tmp_path / "llava-v1", auto_map=code)
    ran = tmp_path / "ran"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')\n")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["mine.T", "mine.T"]}}))
    load_model(folder)
    assert not ran.exists()


def test_a_conversation_may_be_chosen(make: Make, picture_file: Path) -> None:
    folder = make("llama, own tower").folder
    model, reference = asked(folder, picture_file, Sources(conversation="mistral"))
    assert reference.prompt == f"[INST] <image>\n{QUESTION} [/INST]"
    assert any("mistral_instruct, as --conversation says" in note for note in model.checkpoint.notes)
    other = load_model(folder).checkpoint.fingerprint
    assert model.checkpoint.fingerprint != other
    with pytest.raises(CheckpointError, match="unknown conversation 'x'"):
        load_model(folder, Sources(conversation="x"))
    with pytest.raises(CheckpointError, match="has no chat template"):
        load_model(folder, Sources(conversation="tokenizer"))


def test_a_wrong_template_in_the_bundle_fails_parity(
    make: Make, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_parts(bundle, monkeypatch)
    right = original.chat_template
    monkeypatch.setattr(original, "chat_template", lambda c, picture: right(c, picture).replace("USER: ", "User: "))
    with pytest.raises(CheckError, match=r"parity failed: the bundle's prompt .* chat template"):
        export(make("llama, own tower").folder, "onnx", tmp_path / "bundle", precision="fp32")


def test_a_prompt_tokenized_as_a_whole_fails_parity(
    make: Make, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever forgets that blanks come before every chunk gives the decoder other tokens than LLaVA's code."""
    copy_parts(bundle, monkeypatch)
    right = Tokenizer.encode

    def glued(self: Tokenizer, text: str, *, add_special_tokens: bool | None = None) -> list[int]:
        ids = right(self, text, add_special_tokens=add_special_tokens)
        return ids[:1] + ids[2:] if text.startswith("\n") else ids

    monkeypatch.setattr(Tokenizer, "encode", glued)
    with pytest.raises(CheckError, match="parity failed: the bundle's prompt"):
        export(make("llama, own tower").folder, "onnx", tmp_path / "bundle", precision="fp32")


def test_the_specs_of_both_layouts_are_one_but_for_names(make: Make) -> None:
    made = make("llama, own tower")
    ours, theirs = load_model(made.folder).spec, load_model(made.twin).spec
    assert ours.vision == theirs.vision
    assert ours.language == theirs.language
    assert ours.preprocess == dataclasses.replace(theirs.preprocess, pad="square", pad_color=(122, 116, 104))


MISTAKES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "no padding": ("aspect", lambda right: lambda *given: "square", "pixel_values"),
    "another layer": (
        "vision_part",
        lambda right: lambda *given: {**right(*given), "vision_feature_layer": -1},
        "image_features",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_config_translated_wrongly_fails_parity(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    name, wrong, stage = MISTAKES[mistake]
    monkeypatch.setattr(translated, name, wrong(getattr(translated, name)))
    with pytest.raises(CheckError, match=f"parity failed: {stage} "):
        export(make("llama, own tower").folder, "onnx", tmp_path / "bundle", precision="fp32")
