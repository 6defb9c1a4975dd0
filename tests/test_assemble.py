"""`vlm-assemble`: both models are in it as they were, transformers loads it, it exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from checkpoints import CHATML, IMAGE, hf_model, tiny_tokenizer
from vlm_export import export
from vlm_models.assemble import cli
from vlm_models.assemble.assemble import assemble
from vlm_models.errors import CheckpointError, InputError
from vlm_models.model import load_model
from vlm_runtime.prompt import render, user_message

Make = Callable[..., Path]
_TEXT = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4}
_EYE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
QUESTION = [{"role": "user", "content": "How many squares are there?"}]


def language_model(folder: Path, spare: int = 0, template: str | None = None, dtype: str = "float32") -> Path:
    """A random Qwen2 with a tokenizer that has no image token, and `spare` unused rows in its table."""
    tokenizer = without_image_token()
    tokenizer.chat_template = template
    config = transformers.Qwen2Config(
        **_TEXT,
        vocab_size=len(tokenizer) + spare,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(1)
    transformers.Qwen2ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def without_image_token() -> Any:
    from tokenizers import Tokenizer

    data = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    last = data["model"]["vocab"].pop(IMAGE)
    assert last == len(data["model"]["vocab"])  # the others keep their ids
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != IMAGE]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def tower(folder: Path, kind: str = "clip") -> Path:
    """A random CLIP or SigLIP model, text part and all, or a CLIP tower alone ("clip tower")."""
    torch.manual_seed(2)
    if kind == "siglip":
        text = {**_TEXT, "vocab_size": 20}
        whole = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=_EYE))
        whole.save_pretrained(folder)
        transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
        return folder
    text = {**_TEXT, "vocab_size": 20}
    clip: Any = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=_EYE))
    if kind == "clip tower":
        clip = transformers.CLIPVisionModel(clip.config.vision_config)
    clip.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessorPil(**sizes).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["clip", "clip tower", "siglip"])
def test_the_parts_compute_what_they_computed_before(tmp_path: Path, picture: Image.Image, kind: str) -> None:
    eye, words = tower(tmp_path / "eye", kind), language_model(tmp_path / "words")
    assemble(eye, words, tmp_path / "out")
    model = hf_model(tmp_path / "out")
    alone = transformers.Qwen2ForCausalLM.from_pretrained(words, attn_implementation="eager").eval()
    ids = torch.tensor([[5, 77, 120, 6]])
    vision_class: Any = transformers.SiglipVisionModel if kind == "siglip" else transformers.CLIPVisionModel
    expected = vision_class.from_pretrained(eye, attn_implementation="eager").eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        np.testing.assert_allclose(
            model(input_ids=ids).logits[..., : alone.config.vocab_size].numpy(), alone(ids).logits.numpy(), atol=1e-5
        )
        found = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        np.testing.assert_allclose(found, expected(pixels, output_hidden_states=True).hidden_states[-2], atol=1e-5)


def test_every_tensor_is_one_that_transformers_expects(tmp_path: Path) -> None:
    assemble(tower(tmp_path / "eye"), language_model(tmp_path / "words"), tmp_path / "out")
    _, told = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]


def test_a_full_table_grows_by_rows_of_its_mean(tmp_path: Path) -> None:
    words = language_model(tmp_path / "words")
    made = assemble(tower(tmp_path / "eye"), words, tmp_path / "out")
    before, after = load_file(words / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name in ("embed_tokens.weight", "lm_head.weight"):
        old = next(t for n, t in before.items() if n.endswith(name))
        new = next(t for n, t in after.items() if n.endswith(name))
        assert len(new) % 64 == 0
        assert len(new) == len(old) + made.new_rows
        torch.testing.assert_close(new[: len(old)], old, rtol=0, atol=0)
        torch.testing.assert_close(new[len(old) :], old.mean(0).expand(made.new_rows, -1), atol=1e-6, rtol=0)
    assert made.image_token_id == len(transformers.AutoTokenizer.from_pretrained(words))


def test_a_table_with_spare_rows_stays_as_it_is(tmp_path: Path) -> None:
    made = assemble(tower(tmp_path / "eye"), language_model(tmp_path / "words", spare=9), tmp_path / "out")
    assert made.new_rows == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == len(without_image_token()) + 9


def test_types_are_kept_and_shards_are_read_back(tmp_path: Path) -> None:
    words = language_model(tmp_path / "words", dtype="bfloat16")
    assemble(tower(tmp_path / "eye"), words, tmp_path / "out", shard_bytes=40_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    checkpoint = load_model(tmp_path / "out").checkpoint
    assert checkpoint.dtype("language_model.embed_tokens.weight") == "BF16"
    assert checkpoint.dtype("vision_tower.embeddings.patch_embedding.weight") == "F32"
    assert checkpoint.dtype("multi_modal_projector.linear_1.weight") == "BF16"


@pytest.mark.parametrize("template", [None, CHATML.replace("'<image>\n'", "'?'")], ids=["none", "of strings"])
def test_the_template_writes_pictures_where_they_stand(tmp_path: Path, template: str | None) -> None:
    words = language_model(tmp_path / "words", template=template)
    assemble(tower(tmp_path / "eye"), words, tmp_path / "out")
    spec = load_model(tmp_path / "out").spec.prompt
    said = render([user_message("What is it?", 1, spec)], spec)
    alone = render([{"role": "user", "content": "What is it?"}], spec)
    assert said == alone.replace("What is it?", f"{IMAGE}\nWhat is it?")
    assert "What is it?" in alone
    if template is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(words)
        own = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
        assert render(QUESTION, spec) == own


def test_a_seed_draws_one_projector(tmp_path: Path) -> None:
    eye, words = tower(tmp_path / "eye"), language_model(tmp_path / "words")
    name = "multi_modal_projector.linear_1.weight"
    drawn = []
    for i, seed in enumerate((0, 0, 1)):
        assemble(eye, words, tmp_path / str(i), seed=seed)
        drawn.append(load_file(tmp_path / str(i) / "model.safetensors")[name])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].abs().max() <= 48**-0.5


def test_it_exports(tmp_path: Path) -> None:
    assemble(tower(tmp_path / "eye"), language_model(tmp_path / "words"), tmp_path / "out")
    manifest = export(tmp_path / "out", "onnx", tmp_path / "bundle", precision="fp32", greedy_tokens=4)
    assert manifest.parity["onnx"]["passed"]


def test_what_cannot_be_assembled_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    eye, words = tower(tmp_path / "eye"), language_model(tmp_path / "words")
    full = tmp_path / "full"
    full.mkdir()
    (full / "kept").touch()
    cases: list[tuple[Path, Path, Path, dict[str, Any], type[Exception], str]] = [
        (
            words,
            words,
            tmp_path / "a",
            {},
            CheckpointError,
            "tower 'qwen2' is not supported; supported are clip",
        ),
        (eye, eye, tmp_path / "b", {}, CheckpointError, "language model 'clip' is not supported; supported are gemma"),
        (eye, words, full, {}, InputError, "exists already"),
        (eye, words, tmp_path / "c", {"feature_layer": 9}, InputError, "feature layer 9 is outside the tower's 4"),
        (eye, words, tmp_path / "d", {"image_token": " "}, InputError, "the image token is empty"),
    ]
    for vision, language, output, options, error, says in cases:
        with pytest.raises(error, match=says):
            assemble(vision, language, output, **options)
    (eye / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="has no image processor"):
        assemble(eye, words, tmp_path / "e")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eye", "full", "words"]
    assert [path.name for path in full.iterdir()] == ["kept"]


def test_the_command_says_what_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    eye, words, out = tower(tmp_path / "eye"), language_model(tmp_path / "words"), tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["vlm-assemble", "--vision", str(eye), "--language", str(words), "-o", str(out)])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert not exited.value.code
    said = capsys.readouterr().out
    assert "16 tokens a picture" in said
    assert f"{IMAGE} is {len(transformers.AutoTokenizer.from_pretrained(words))}" in said
