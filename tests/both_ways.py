"""Tiny random Gemma 3 and PaliGemma checkpoints, written by transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, processors

from checkpoints import BOS, EOS, tiny_tokenizer

TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
_EYE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "vision_use_head": False,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]


def tokenizer(*tokens: str, adds_bos: bool = False) -> Any:
    """The tiny tokenizer with further special tokens."""
    made = tiny_tokenizer()
    made.add_tokens(list(tokens), special_tokens=True)
    if adds_bos:
        backend = Tokenizer.from_str(made.backend_tokenizer.to_str())
        ids = [(BOS, backend.token_to_id(BOS))]
        backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=ids)
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    return made


def _language(kind: Any, words: Any, window: int, **own: Any) -> Any:
    return kind(
        vocab_size=-(-len(words) // 64) * 64,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        sliding_window=window,
        layer_types=_SLIDING,
        query_pre_attn_scalar=24,
        bos_token_id=words.convert_tokens_to_ids(BOS),
        eos_token_id=words.convert_tokens_to_ids(EOS),
        pad_token_id=words.convert_tokens_to_ids(EOS),
        **own,
    )


def _random(model: Any, folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1:
                p.copy_(noise * (0.1 if "embed_tokens" in name else 0.12))
            else:
                p.copy_(p * ("norm" in name and "weight" in name) + noise * 0.05)
    model.tie_weights()
    model.eval().save_pretrained(folder)


def tiny_gemma3(folder: Path, *, window: int = 6, template: str = TURNS) -> Path:
    """16 patches pooled to 4 rows a picture; sliding layers whose window ends within a picture's text."""
    words = tokenizer("<start_of_image>", "<end_of_image>", adds_bos=True)
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image>"}
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        extra_special_tokens=marks,
    )
    ropes = {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config = transformers.Gemma3Config(
        text_config=_language(transformers.Gemma3TextConfig, words, window, rope_parameters=ropes),
        vision_config=transformers.SiglipVisionConfig(**_EYE),
        mm_tokens_per_image=4,
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    _random(transformers.Gemma3ForConditionalGeneration(config), folder)
    images = transformers.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor: Any = transformers.Gemma3Processor
    processor(images, words, chat_template=template, image_seq_length=4).save_pretrained(folder)
    return folder


def tiny_paligemma(folder: Path, *, version: int = 1, window: int = 6) -> Path:
    """16 rows a picture; version 2 has Gemma 2's sliding layers and soft caps."""
    words = tokenizer(adds_bos=True)
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        extra_special_tokens={"image_token": "<image>"},
    )
    if version == 2:
        text = _language(transformers.Gemma2Config, words, window)
    else:
        text = _language(transformers.GemmaConfig, words, window)
        text.layer_types, text.sliding_window = None, None
    config = transformers.PaliGemmaConfig(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**_EYE, projection_dim=64),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=64,
    )
    images = transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor: Any = transformers.PaliGemmaProcessor
    made = processor(images, words)
    config.text_config.vocab_size = -(-len(words) // 64) * 64
    _random(transformers.PaliGemmaForConditionalGeneration(config), folder)
    made.save_pretrained(folder)
    _with_bos(folder)
    return folder


def _with_bos(folder: Path) -> None:
    """The processor switches BOS off whenever it is loaded; files on the hub have it on."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    data["post_processor"] = json.loads(tokenizer(adds_bos=True).backend_tokenizer.to_str())["post_processor"]
    path.write_text(json.dumps(data), "utf-8")
