"""Every family against transformers' own LlavaForConditionalGeneration: the same logits, the same greedy tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

import vlm_runtime
from checkpoints import TEXTS, hf_model
from conftest import MakeTiny
from vlm_export import export
from vlm_export.target import silent
from vlm_export.targets import onnx
from vlm_models.checkpoint import open_checkpoint
from vlm_models.model import Model, load_model
from vlm_quant.recipe import parse_recipe
from vlm_runtime.bundle import Bundle
from vlm_runtime.engine import Decoder, Options, find_engine
from vlm_runtime.manifest import Manifest, Table
from vlm_runtime.splice import splice
from vlm_runtime.tokenizer import expand

PROMPT = "USER: Look here: <image>\nWhat colour is the large circle? ASSISTANT:"
TOLERANCE = 1e-4
TOKENS = 32

CASES: dict[str, dict[str, Any]] = {
    **{text: {"text": text, "tower": ("clip", "siglip")[i % 2]} for i, text in enumerate(TEXTS)},
    "linear rope": {"rope": "linear"},
    "llama3 rope": {"rope": "llama3", "tower": "siglip"},
    "yarn rope": {"rope": "yarn", "text": "qwen2"},
    "tied llama, biases": {
        "text_options": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 48}
    },
    "untied gemma": {"text": "gemma", "text_options": {"tie_word_embeddings": False}},
    "partial rotary": {"text": "phi3", "text_options": {"hidden_size": 128, "partial_rotary_factor": 0.5}},
    "two feature layers": {"feature_layer": [-2, 1], "image_token": "middle"},
    "all rows of a later layer": {"feature_layer": -1, "strategy": "full", "image_token": "start", "adds_bos": True},
    "an early layer, no projector bias": {"feature_layer": 1, "projector_bias": False, "tower": "siglip"},
    "bfloat16 in shards": {"text": "qwen3", "dtype": "bfloat16", "max_shard_size": "60KB"},
    "float16": {"text": "mistral", "dtype": "float16", "tower": "siglip"},
    "patch 14": {"text": "smollm", "image_size": 28, "patch_size": 14, "strategy": "full"},
}


@dataclass(frozen=True)
class Truth:
    """What transformers computes: prompt ids (S,), logits of every row (S, V), the greedy tokens that follow."""

    ids: list[int]
    pixel_values: torch.Tensor
    logits: NDArray[np.float32]
    greedy: list[int]


@cache
def truth(folder: Path, picture: Path) -> Truth:
    model, processor = hf_model(folder), transformers.AutoProcessor.from_pretrained(folder)
    inputs = processor(images=Image.open(picture), text=PROMPT, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits[0].numpy()
        # No end: a random model's end-of-text token would cut the comparison short.
        model.generation_config.eos_token_id = None
        tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, len(logits) :]
    return Truth(inputs["input_ids"][0].tolist(), inputs["pixel_values"], logits, tokens.tolist())


def looked_up(model: Model, ids: list[int]) -> torch.Tensor:
    """Embeddings (S, H)."""
    table = model.checkpoint.rows("language_model.embed_tokens.weight")[ids].astype(np.float32)
    return torch.from_numpy(table * np.float32(model.spec.language.embed_multiplier))


def spliced(model: Model, want: Truth) -> torch.Tensor:
    """Prompt rows (S, H): looked up, and the picture's projected rows where the image token stands."""
    with torch.inference_mode():
        image = model.projector()(model.vision_encoder()(want.pixel_values))[0]
    rows = looked_up(model, want.ids)
    rows[torch.tensor(want.ids) == model.spec.prompt.image_token_id] = image
    return rows


def onnx_decoder(model: Model, root: Path) -> Decoder:
    """The language model alone, written and opened by the ONNX target and engine."""
    spec, precision = model.spec, parse_recipe("fp32")
    (root / "onnx").mkdir()
    part = onnx.language_model(model.checkpoint, spec, precision.language, root / "onnx", 128, silent)
    manifest = Manifest(
        format="vlm-bundle",
        version=1,
        created="",
        spec=spec,
        max_context=128,
        embedding=Table("", "F32", 0, 0),
        tokenizer="",
        files={},
        parts={"language_model": {"onnx": part}},
        recipes={},
        parity={},
        golden=None,
        tools={},
    )
    return find_engine("onnx").decoder(Bundle(root, manifest), Options(threads=1, prefill_chunk=16))


def relative_l2(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("case", CASES)
def test_the_reference_equals_transformers(make_tiny: MakeTiny, picture_file: Path, case: str) -> None:
    folder = make_tiny(**CASES[case])
    want, model = truth(folder, picture_file), load_model(folder)
    language = model.language_model()
    logits = language.forward(spliced(model, want), last_row=False).numpy()
    assert relative_l2(logits, want.logits) <= TOLERANCE
    tokens, last = [], logits[-1]
    for _ in range(TOKENS):
        tokens.append(int(last.argmax()))
        last = language.forward(looked_up(model, tokens[-1:]))[0].numpy()
    assert tokens == want.greedy


@pytest.mark.parametrize("case", CASES)
def test_the_onnx_language_model_equals_transformers(
    make_tiny: MakeTiny, picture_file: Path, tmp_path: Path, case: str
) -> None:
    folder = make_tiny(**CASES[case])
    want, model = truth(folder, picture_file), load_model(folder)
    decoder = onnx_decoder(model, tmp_path)
    last = decoder.prefill(spliced(model, want).numpy())  # chunks of 16 rows
    assert relative_l2(last, want.logits[-1]) <= TOLERANCE
    tokens = []
    for _ in range(TOKENS):
        tokens.append(int(last.argmax()))
        last = decoder.decode(looked_up(model, tokens[-1:])[0].numpy())
    assert tokens == want.greedy


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_picture_file_through_the_whole_line_equals_transformers(
    make_tiny: MakeTiny, picture_file: Path, tmp_path: Path, case: str
) -> None:
    folder = make_tiny(**CASES[case])
    want = truth(folder, picture_file)
    export(folder, "onnx", tmp_path / "bundle", precision="fp32", check=False)
    model = vlm_runtime.load(tmp_path / "bundle", threads=1)
    ids = expand(model.tokenizer.encode(PROMPT), model.spec.prompt, [model.spec.prompt.image_tokens])
    assert ids == want.ids
    logits = model.decoder.prefill(splice(ids, [model.encode_image(picture_file)], model.embedding))
    assert relative_l2(logits, want.logits[-1]) <= TOLERANCE
    answer = model.answer(PROMPT, [picture_file], raw=True, max_new_tokens=TOKENS)
    assert list(answer.token_ids) == want.greedy[: len(answer.token_ids)]
    ended = want.greedy[len(answer.token_ids) - 1] in model.spec.prompt.eos_token_ids
    assert len(answer.token_ids) == TOKENS or ended


@pytest.mark.parametrize("case", ["mistral", "gemma3_text", "yarn rope"])
def test_a_prompt_in_pieces_equals_the_whole(make_tiny: MakeTiny, picture_file: Path, case: str) -> None:
    folder = make_tiny(**CASES[case])
    want, model = truth(folder, picture_file), load_model(folder)
    rows = spliced(model, want)
    language = model.language_model(keep=False)
    language.forward(rows[:17])
    language.forward(rows[17:30])
    language.rewind(20)
    last = language.forward(rows[20:])[0].numpy()
    assert relative_l2(last, want.logits[-1]) <= TOLERANCE


def test_a_wrong_norm_would_be_seen(make_tiny: MakeTiny, picture_file: Path) -> None:
    """The comparison is sharp: one norm scaled by a thousandth already fails it."""
    folder = make_tiny()
    want, model = truth(folder, picture_file), load_model(folder)
    language = model.language_model()
    rows = spliced(model, want)
    language.forward(rows)
    name = "language_model.layers.1.input_layernorm.weight"
    (kept,) = [t for key, t in language._kept.items() if key.tensor == name]
    with torch.inference_mode():
        kept *= 1.001
    language.rewind(0)
    assert relative_l2(language.forward(rows, last_row=False).numpy(), want.logits) > TOLERANCE


def test_one_checkpoint_has_one_fingerprint(tiny: Path) -> None:
    assert open_checkpoint(tiny).fingerprint == open_checkpoint(tiny).fingerprint
