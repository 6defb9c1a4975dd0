"""Tiny random LLaVA checkpoints, written by transformers itself, with a real tokenizer and processor."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

IMAGE, BOS, EOS, TURN = "<image>", "<s>", "</s>", "<|im_end|>"
SPECIALS = (BOS, EOS, "<|im_start|>", TURN)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A template that writes BOS itself, as Gemma's does.
WITH_BOS = "{{ bos_token }}" + CHATML
TEXT = (
    "USER: What colour is the large circle? ASSISTANT: The large circle is red. How many squares are in the picture? "
    "There are three squares, two of them green. Is there a triangle at the top left? No, the triangle is at the "
    "bottom right. What digit is written there? It is a seven. Naïve café, Größe, 東京, 🙂. system user assistant\n"
) * 3

TEXTS = ("llama", "smollm", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text")
TOWERS = ("clip", "siglip")
ROPES: Mapping[str, Mapping[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
}
_CLASSES = {
    "llama": transformers.LlamaConfig,
    "smollm": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "phi3": transformers.Phi3Config,
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
# What each family has that the others do not; windows are short so that a 40-token prompt leaves them.
_OWN: Mapping[str, Mapping[str, Any]] = {
    "smollm": {"tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96},
    "mistral": {"sliding_window": 8, "head_dim": 16},
    "qwen3": {"head_dim": 32},
    "phi3": {"original_max_position_embeddings": 512},
    "gemma": {"head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 32, "sliding_window": 8, "layer_types": _SLIDING, "query_pre_attn_scalar": 24},
    "gemma3_text": {"head_dim": 32, "sliding_window": 8, "layer_types": _SLIDING, "query_pre_attn_scalar": 24},
}


def tiny_llava(
    folder: Path,
    *,
    text: str = "llama",
    tower: str = "clip",
    image_size: int = 32,
    patch_size: int = 8,
    feature_layer: int | list[int] = -2,
    strategy: Literal["default", "full"] = "default",
    projector_bias: bool = True,
    rope: str | None = None,
    dtype: str = "float32",
    image_token: Literal["start", "middle", "end"] = "end",
    chat_template: str | None = CHATML,
    adds_bos: bool = False,
    max_shard_size: str = "5GB",
    seed: int = 0,
    text_options: Mapping[str, Any] | None = None,
    processor_options: Mapping[str, Any] | None = None,
) -> Path:
    """Write a complete checkpoint folder and return it. `text_options` override the language model's config.

    `rope` is a key of ROPES; `processor_options` go to the image processor (size, crop_size, do_center_crop …).
    """
    tokenizer = tiny_tokenizer(image_token, adds_bos)
    patches = (image_size // patch_size) ** 2
    vision = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    vision_class = transformers.CLIPVisionConfig if tower == "clip" else transformers.SiglipVisionConfig
    config = transformers.LlavaConfig(
        vision_config=vision_class(**vision),
        text_config=_text_config(text, rope, len(tokenizer), tokenizer, text_options or {}),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
        multimodal_projector_bias=projector_bias,
        image_seq_length=patches + (tower == "clip") - (strategy == "default"),
    )
    model = _random_model(config, seed).to(getattr(torch, dtype))
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(t) for t in (EOS, TURN)]
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    processor = transformers.LlavaProcessor(
        image_processor=_image_processor(tower, image_size, processor_options or {}),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        image_token=IMAGE,
        num_additional_image_tokens=int(tower == "clip"),
        chat_template=chat_template,
    )
    processor.save_pretrained(folder)
    return folder


def _text_config(text: str, rope: str | None, vocab: int, tokenizer: Any, options: Mapping[str, Any]) -> Any:
    own: dict[str, Any] = {
        "vocab_size": -(-vocab // 64) * 64,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    if text == "gemma3_text":
        own["rope_parameters"] = {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    if rope is not None:
        own["rope_parameters"] = dict(ROPES[rope])
    return _CLASSES[text](**{**own, **_OWN.get(text, {}), **options})


def _random_model(config: transformers.LlavaConfig, seed: int) -> Any:
    """Weights wide enough that logits differ clearly from token to token and every norm and bias matters."""
    model = transformers.LlavaForConditionalGeneration(config).eval()
    # A tied head would repeat its input for ever over a wide table; Gemma multiplies the table by 8.
    embed_std = 0.5 if not config.tie_word_embeddings else 0.05 if config.text_config.model_type == "gemma" else 0.1
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1:
                p.copy_(noise * (embed_std if "embed_tokens" in name else 0.12))
            elif "norm" in name and name.endswith("weight"):
                p.add_(noise * 0.1)
            else:
                p.copy_(noise * 0.05)
    model.tie_weights()
    return model


def _image_processor(tower: str, size: int, options: Mapping[str, Any]) -> Any:
    if tower == "clip":
        sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
        return transformers.CLIPImageProcessorPil(**{**sizes, **options})
    return transformers.SiglipImageProcessorPil(**{"size": {"height": size, "width": size}, **options})


def tiny_tokenizer(image_token: str = "end", adds_bos: bool = False) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of some 400 tokens with `<image>` at the start, in the middle or at the end of its ids."""
    vocab, merges = _trained()
    tokens = sorted(vocab, key=lambda t: vocab[t])
    tokens.insert({"start": 0, "middle": len(tokens) // 2, "end": len(tokens)}[image_token], IMAGE)
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m) for m in merges]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([IMAGE, *SPECIALS])
    if adds_bos:
        ids = [(BOS, bpe.token_to_id(BOS))]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=ids
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


@functools.cache
def _trained() -> tuple[dict[str, int], list[Sequence[str]]]:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], model["merges"]


# How transformers of different years spelled the tensors of one LLaVA checkpoint.
SPELLINGS = ("saved", "4.3x", "4.5x", "5.x")
_CANONICAL = (
    (r"^(model\.)?(language_model\.)?lm_head\.", "lm_head."),
    (r"^(model\.)?language_model\.(model\.)?", "language_model."),
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
    (r"^(model\.)?multi_modal_projector\.", "multi_modal_projector."),
)
_WRITTEN: Mapping[str, Mapping[str, str]] = {
    "4.3x": {
        "lm_head.": "language_model.lm_head.",
        "language_model.": "language_model.model.",
        "vision_tower.": "vision_tower.vision_model.",
    },
    "4.5x": {
        "language_model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "5.x": {
        "language_model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}


def respell(folder: Path, style: str) -> Path:
    """Rename the tensors in place as `style` of SPELLINGS writes them ("4.3x" with buffers); "saved" leaves them."""
    if style == "saved":
        return folder
    files = sorted(folder.glob("*.safetensors"))
    weight_map: dict[str, str] = {}
    for i, file in enumerate(files):
        tensors = {_spell(name, style): t.clone() for name, t in load_file(file).items()}
        if style == "4.3x" and i == 0:
            tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
            tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        data = json.loads(index.read_text())
        index.write_text(json.dumps({**data, "weight_map": weight_map}))
    return folder


def _spell(name: str, style: str) -> str:
    for pattern, prefix in _CANONICAL:
        if re.match(pattern, name):
            return re.sub(pattern, _WRITTEN[style].get(prefix, prefix), name)
    raise AssertionError(f"a tensor of no part: {name}")


def copy(folder: Path, to: Path) -> Path:
    """A private copy that a test may damage."""
    return Path(shutil.copytree(folder, to))


def hf_model(folder: Path) -> Any:
    """transformers' own model of the folder, fp32, eager attention (the reference that shares no code with ours)."""
    return transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
