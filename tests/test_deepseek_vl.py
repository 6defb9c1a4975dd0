"""DeepSeek-VL with its one SigLIP tower against transformers' own model and processor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import vlm_runtime
from checkpoints import BOS, EOS, tiny_tokenizer
from shuffled import SIZES
from vlm_export import export
from vlm_models.errors import CheckpointError
from vlm_models.model import load_model
from vlm_runtime.image import preprocess

TOKENS = 16
TEMPLATE = (
    "{% for m in messages %}{{ 'User: ' if m['role'] == 'user' else 'Assistant: ' }}{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = tiny_tokenizer()
    config = transformers.DeepseekVLConfig(
        text_config=transformers.LlamaConfig(
            vocab_size=-(-len(words) // 64) * 64,
            hidden_size=64,
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=words.convert_tokens_to_ids(BOS),
            eos_token_id=words.convert_tokens_to_ids(EOS),
        ),
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        ),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
    )
    model = transformers.DeepseekVLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * 0.12 if p.dim() > 1 else p * ("norm" in name and "weight" in name) + noise * 0.05)
    to = tmp_path_factory.mktemp("deepseek") / "checkpoint"
    model.save_pretrained(to)
    images = transformers.DeepseekVLImageProcessorPil(size={"height": 32, "width": 32}, min_size=3)
    processor: Any = transformers.DeepseekVLProcessor
    processor(images, words, chat_template=TEMPLATE, num_image_tokens=16).save_pretrained(to)
    return to


def test_pixels_of_odd_pictures_are_the_processors(folder: Path) -> None:
    spec = load_model(folder).spec
    processor: Any = transformers.DeepseekVLImageProcessorPil.from_pretrained(folder)
    random = np.random.default_rng(0)
    for width, height in SIZES:
        picture = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        want = np.asarray(processor(images=picture, return_tensors="np")["pixel_values"][0])
        np.testing.assert_allclose(preprocess(picture, spec.preprocess), want, atol=1e-5, err_msg=f"{width}×{height}")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "gguf"])
def test_a_bundle_answers_as_transformers(folder: Path, picture_file: Path, tmp_path: Path, target: str) -> None:
    manifest = export(folder, target, tmp_path / "bundle", precision="fp32", greedy_tokens=TOKENS)
    assert manifest.parity[target]["passed"]
    vlm = vlm_runtime.load(tmp_path / "bundle", threads=1)
    model: Any = transformers.DeepseekVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    processor: Any = transformers.AutoProcessor.from_pretrained(folder)
    question = [{"type": "image"}, {"type": "text", "text": "What colour is the large circle?"}]
    text = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    inputs = processor(images=Image.open(picture_file).convert("RGB"), text=[text], return_tensors="pt")
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = vlm.answer("What colour is the large circle?", [picture_file], max_new_tokens=TOKENS)
    assert answer.prompt_tokens == inputs["input_ids"].shape[1]
    assert list(answer.token_ids) == tokens.tolist()[: len(answer.token_ids)]


def test_a_processor_of_another_size_is_refused_with_both(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    data = json.loads((copy / "processor_config.json").read_text())
    data["image_processor"]["size"] = {"height": 64, "width": 64}
    (copy / "processor_config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"64.*but the tower takes 32 × 32"):
        load_model(copy)
