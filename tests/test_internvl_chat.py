"""InternVL in its original layout, against its code written out from its definition."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import vlm_runtime
from checkpoints import copy
from exporting import Command, command, copy_parts, exported, rewrite
from internvl_chats import Original, internlm2_tokenizer, tiny_chat
from shuffled import noise
from vlm_export.reference import picture_rows, pixel_values, prompt_ids, spliced
from vlm_models import internvl_names, layout
from vlm_models.checkpoint import Sources, open_checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.layouts import internvl_chat
from vlm_models.model import load_model
from vlm_models.processor import transformers_tokenizer
from vlm_runtime.manifest import read_manifest
from vlm_runtime.prompt import render, user_message

run = pytest.fixture(command)
CASES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "internlm2": {"text": "internlm2", "template": "Hermes-2"},
    "6B's tower": {
        "text": "llama",
        "template": "phi3-chat",
        "vision": {"qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm"},
        "system_message": "Say little.",
    },
}
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(case)`: the folder of a tiny checkpoint, written once. Read only."""
    return functools.cache(lambda case: tiny_chat(tmp_path_factory.mktemp("chat") / "it", **CASES[case]))


@pytest.mark.parametrize("case", ["qwen2", *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c != "qwen2")])
def test_a_bundle_answers_as_the_original_code(make: Make, tmp_path_factory: pytest.TempPathFactory, case: str) -> None:
    bundle = exported(make(case), tmp_path_factory)
    assert read_manifest(bundle).parity["onnx"]["passed"]
    vlm, original = vlm_runtime.load(bundle, threads=1), Original(make(case))
    for sizes in ([(57, 41)], [(1, 1)], [(31, 127), (40, 40)]):
        pictures, asked = [noise(size) for size in sizes], "<image>\n" * len(sizes) + "What colour is the circle?"
        answer = vlm.answer("What colour is the circle?", pictures, max_new_tokens=12)
        ids, logits = original.logits(asked, pictures, answer.token_ids[:-1])
        text = render([user_message("What colour is the circle?", len(sizes), vlm.spec.prompt)], vlm.spec.prompt)
        assert list(vlm.request(text, pictures, {}, started=0.0).ids) == ids
        assert list(answer.token_ids) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("case", CASES)
def test_tiles_rows_and_logits_are_those_of_the_original_code(make: Make, case: str) -> None:
    model, original, picture = load_model(make(case)), Original(make(case)), noise((101, 77))
    want = original.tiles(picture)
    np.testing.assert_allclose(pixel_values(model, picture), want, rtol=0, atol=1e-5)
    rows = picture_rows(model, picture).numpy()
    np.testing.assert_allclose(rows, original.rows(want).flatten(0, 1).numpy(), rtol=0, atol=1e-4)
    ids, logits = original.logits("<image>\nWhat?", [picture], [])
    prompt = original.query("<IMG_CONTEXT>\nWhat?", [])
    assert prompt_ids(model, prompt, [picture]) == ids
    got = model.language_model().forward(spliced(model, ids, picture_rows(model, picture)))[0].numpy()
    assert float(np.linalg.norm(got - logits[0]) / np.linalg.norm(logits)) <= 1e-4


def test_the_layout_is_found_and_told(make: Make) -> None:
    folder = make("qwen2")
    assert layout.find_layout(folder, json.loads((folder / "config.json").read_text())) is internvl_chat
    checkpoint = open_checkpoint(folder)
    assert checkpoint.layout == "internvl_chat"
    assert checkpoint.notes == ("conversation: internvl2_5, as config.json says",)
    other = open_checkpoint(folder, Sources(conversation="Hermes-2"))
    assert other.notes == ("conversation: Hermes-2, as --conversation says",)
    assert other.fingerprint == checkpoint.fingerprint


def test_scaling_beyond_the_context_is_left_out_and_told(make: Make) -> None:
    assert "dynamic rope scaling begins beyond 2048 positions: left out" in open_checkpoint(make("internlm2")).notes


def test_heads_of_the_fused_projection_are_taken_apart_without_a_copy_in_memory(make: Make) -> None:
    folder = make("internlm2")
    fused = load_file(folder / "model.safetensors")["language_model.model.layers.1.attention.wqkv.weight"].numpy()
    checkpoint = open_checkpoint(folder)
    groups = fused.reshape(2, 4, 16, 64)  # of 2 key heads: two queries, key, value
    wanted = {"q": groups[:, :2].reshape(-1, 64), "k": groups[:, 2].reshape(-1, 64), "v": groups[:, 3].reshape(-1, 64)}
    for part, rows in wanted.items():
        name = f"language_model.layers.1.self_attn.{part}_proj.weight"
        assert checkpoint.shape(name) == rows.shape
        np.testing.assert_array_equal(checkpoint.rows(name), rows)
        np.testing.assert_array_equal(checkpoint.rows(name, 5, 21), rows[5:21])
        assert checkpoint.tensors[name].map is not None


@pytest.mark.parametrize("blank", [False, True])
def test_internlm2s_tokenizer_is_sentencepiece_between_special_tokens(make: Make, tmp_path: Path, blank: bool) -> None:
    folder = copy(make("internlm2"), tmp_path / "copy")
    (folder / "tokenizer.json").unlink()
    pieces = internlm2_tokenizer(folder, blank)
    tokenizer = transformers_tokenizer(open_checkpoint(folder))
    special = [t for t in tokenizer.get_added_vocab() if t not in ("<unk>", "<s>", "</s>")]
    assert "<IMG_CONTEXT>" in special
    for text in ("What colour?", " two  blanks ", "<|im_start|>user\n<IMG_CONTEXT>\n Größe<|im_end|>", "</img> <img>"):
        want = [1]
        for piece in re.split(f"({'|'.join(map(re.escape, special))})", text):
            if piece in special:
                want.append(tokenizer.convert_tokens_to_ids(piece))
            elif piece:
                want += pieces.encode(piece)
        assert tokenizer(text)["input_ids"] == want


MISTAKES: dict[str, tuple[str, Any]] = {
    "another conversation in the bundle": (
        "chat_template",
        lambda conversation, picture: "{% for m in messages %}<IMG_CONTEXT>\nWhat?{% endfor %}",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_template_fails_the_export(
    make: Make,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    run: Command,
    monkeypatch: pytest.MonkeyPatch,
    mistake: str,
) -> None:
    function, wrong = MISTAKES[mistake]
    copy_parts(exported(make("qwen2"), tmp_path_factory), monkeypatch)
    monkeypatch.setattr(internvl_chat, function, wrong)
    ran = run(make("qwen2"), "--target", "onnx", "--precision", "fp32", "--greedy-tokens", "2", "-o", tmp_path / "out")
    assert ran.code == 1
    assert "parity failed: the bundle's prompt has" in ran.err


def _swapped(first: str, second: str, names: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    other = {first: second, second: first}
    return tuple((other.get(pattern, pattern), to) for pattern, to in names)


_GROUPS, _LAYER = internvl_names._groups, r"^vision_model\.encoder\.layers\.(\d+)\."
_FORWARD = r"^(language_model)\.model(\.layers\.\d+\.)feed_forward\."
MIXED: dict[str, tuple[str, str, Any, str]] = {
    "norms of the tower": (
        "qwen2",
        "_TOWER",
        _swapped(f"{_LAYER}norm1\\.", f"{_LAYER}norm2\\.", internvl_names._TOWER),
        "image_features",
    ),
    "keys for values": (
        "internlm2",
        "_groups",
        lambda *a: {"q": _GROUPS(*a)["q"], "k": _GROUPS(*a)["v"], "v": _GROUPS(*a)["k"]},
        "logits",
    ),
    "gate for up": (
        "internlm2",
        "_INTERNLM2",
        _swapped(f"{_FORWARD}w1\\.", f"{_FORWARD}w3\\.", internvl_names._INTERNLM2),
        "logits",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MIXED)
def test_mixed_up_layers_fail_the_export(
    make: Make, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    case, name, wrong, stage = MIXED[mistake]
    assert wrong != getattr(internvl_names, name)
    monkeypatch.setattr(internvl_names, name, wrong)
    ran = run(make(case), "--target", "onnx", "--precision", "fp32", "--greedy-tokens", "2", "-o", tmp_path / "out")
    assert ran.code == 1
    assert f"parity failed: {stage} relative_l2" in ran.err


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an older pixel shuffle": ({"ps_version": "v1"}, r"ps_version 'v1' is not supported"),
    "another size": ({"force_image_size": 56}, r"force_image_size 56 .* tower of 28 pixels"),
    "padding": ({"pad2square": True}, r"pad2square is not supported"),
    "no view of the whole": ({"use_thumbnail": False}, r"use_thumbnail false"),
    "an unknown conversation": ({"template": "vicuna_v9"}, r"'vicuna_v9' is not known; choose .* internvl2_5"),
    "another language model": (
        {"llm_config": {"architectures": ["MPTForCausalLM"]}},
        r"'MPTForCausalLM' is not supported; supported are .*InternLM2ForCausalLM",
    ),
    "no list of architectures": ({"llm_config": {"architectures": 5}}, r"language model None is not supported"),
    "a conversation that is no name": ({"template": ["a"]}, r"is not known; choose"),
    "tiles that are no number": ({"max_dynamic_patch": "six"}, r"max_dynamic_patch 'six' in config.json must be"),
    "another epsilon": (
        {"vision_config": {"qk_normalization": True, "layer_norm_eps": 1e-5, "image_size": 28}},
        r"epsilon of 1e-05",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_supported_is_refused_in_one_line(make: Make, tmp_path: Path, what: str) -> None:
    values, told = BAD[what]
    folder = copy(make("qwen2"), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(CheckpointError, match=told) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_a_fused_projection_of_another_length_is_refused(make: Make, tmp_path: Path) -> None:
    folder = copy(make("internlm2"), tmp_path / "copy")
    name = "language_model.model.layers.0.attention.wqkv.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:-16].clone()}))
    with pytest.raises(CheckpointError, match=r"wqkv has 112 rows, .* 4 heads and 2 key heads of 16"):
        open_checkpoint(folder)


def test_a_lora_that_was_not_merged_is_refused(make: Make, tmp_path: Path) -> None:
    folder = copy(make("qwen2"), tmp_path / "copy")
    name = "language_model.model.layers.0.self_attn.q_proj."

    def train(tensors: dict[str, Any]) -> None:
        tensors[f"{name}lora_A.default.weight"] = tensors[f"{name}weight"][:4].clone()

    with pytest.raises(CheckpointError, match="LoRA that has not been merged"):
        open_checkpoint(rewrite(folder, train))


def test_a_tokenizer_without_the_image_token_is_refused(make: Make, tmp_path: Path) -> None:
    folder = copy(make("qwen2"), tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("<IMG_CONTEXT>", "<IMG_OTHER>"))
    with pytest.raises(CheckpointError, match=r"no image token '<IMG_CONTEXT>'"):
        open_checkpoint(folder)
