"""Tiny random InternVL, Idefics3 and SmolVLM checkpoints, written by transformers itself, and what it makes of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from checkpoints import tiny_tokenizer
from vlm_export.reference import picture_rows, prompt_ids, spliced
from vlm_models.model import load_model
from vlm_runtime.vlm import VLM

CONTEXT, FAKE, OVERVIEW = "<IMG_CONTEXT>", "<fake_token_around_image>", "<global-img>"
INTERNVL_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IDEFICS3_CHAT = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}{% if m['content'][0]['type'] == 'image' %}"
    "{{ ':' }}{% else %}{{ ': ' }}{% endif %}{% for line in m['content'] %}{% if line['type'] == 'text' %}"
    "{{ line['text'] }}{% else %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Widths and heights that no tile divides.
SIZES = [
    *[(1, 1), (1, 1000), (1000, 1), (4000, 3), (3, 4000), (2, 3), (7, 5), (31, 32), (32, 31), (33, 33)],
    *[(101, 77), (97, 389), (389, 97), (57, 41), (500, 372), (640, 427), (127, 129), (211, 53), (13, 17), (1009, 499)],
]
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_TOWER = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}


def tiny_internvl(
    folder: Path,
    *,
    text: str = "qwen2",
    tower: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    **config: Any,
) -> Path:
    """InternVLForConditionalGeneration: tiles of 28 pixels in 4 × 4 patches, 4 rows each."""
    tokenizer = tokenizer_with(CONTEXT, "<img>", "</img>", "<video>")
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    tokenizer = _named(tokenizer, dict(zip(names, ("<img>", "</img>", CONTEXT, "<video>"), strict=True)))
    vision = transformers.InternVLVisionConfig(
        **{**_TOWER, "image_size": 28, "patch_size": 7, "layer_scale_init_value": 0.5, **(tower or {})}
    )
    whole = transformers.InternVLConfig(
        vision_config=vision,
        text_config=text_config(text, tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids(CONTEXT),
        image_seq_length=4,
        **{"tie_word_embeddings": False, **config},
    )
    save(transformers.InternVLForConditionalGeneration(whole), tokenizer, folder)
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, **{"max_patches": 6, **(processor or {})})
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(INTERNVL_CHAT)
    images.save_pretrained(folder)
    return folder


def tiny_idefics3(
    folder: Path,
    *,
    family: str = "idefics3",
    text: str = "llama",
    tower: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    scale_factor: int = 2,
) -> Path:
    """Idefics3 or SmolVLM: tiles of 32 pixels in 4 × 4 patches, 4 rows each, of pictures whose longer edge is 96."""
    tags = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
    tokenizer = tokenizer_with(FAKE, OVERVIEW, "<end_of_utterance>", *tags)
    if family == "smolvlm":
        names = ("fake_image_token", "global_image_token", "end_of_utterance_token", "image_token")
        texts = (FAKE, OVERVIEW, "<end_of_utterance>", "<image>")
        tokenizer = _named(tokenizer, dict(zip(names, texts, strict=True)))
    smol = family == "smolvlm"
    vision_class = transformers.SmolVLMVisionConfig if smol else transformers.Idefics3VisionConfig
    config_class = transformers.SmolVLMConfig if smol else transformers.Idefics3Config
    model_class: Any = (
        transformers.SmolVLMForConditionalGeneration if smol else transformers.Idefics3ForConditionalGeneration
    )
    whole = config_class(
        vision_config=vision_class(**{**_TOWER, "image_size": 32, "patch_size": 8, **(tower or {})}),
        text_config=text_config(text, tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=scale_factor,
        tie_word_embeddings=False,
    )
    save(model_class(whole), tokenizer, folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(IDEFICS3_CHAT)
    images: Any = SmolVLMImageProcessorPil if smol else Idefics3ImageProcessorPil
    edge = (tower or {}).get("image_size", 32)
    options = {"size": {"longest_edge": 3 * edge}, "max_image_size": {"longest_edge": edge}, **(processor or {})}
    images(**options).save_pretrained(folder)
    return folder


def tokenizer_with(*special: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(t, normalized=False) for t in special]})
    return tokenizer


def _named(tokenizer: Any, names: Mapping[str, str]) -> Any:
    """The tokenizer with attributes that hold special tokens."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        extra_special_tokens=dict(names),
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def text_config(text: str, tokenizer: Any) -> Any:
    classes = {"qwen2": transformers.Qwen2Config, "llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}
    own = {"head_dim": 16} if text == "qwen3" else {}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    vocab = -(-len(tokenizer) // 64) * 64
    return classes[text](**_TEXT, **own, **ids, vocab_size=vocab, tie_word_embeddings=False)


def save(model: Any, tokenizer: Any, folder: Path, seed: int = 0) -> None:
    """Random weights wide enough that every norm, bias and position matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1:
                p.copy_(noise * (0.5 if "embed" in name else 0.12))
            elif "lambda" in name or ("norm" in name and name.endswith("weight")):
                p.add_(noise * 0.1)
            else:
                p.copy_(noise * 0.05)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)


@functools.cache
def hf_model(folder: Path) -> Any:
    """transformers' own model of the folder, fp32, eager attention."""
    model: Any = transformers.AutoModelForImageTextToText
    return model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def theirs(folder: Path, prompt: str, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """What transformers' processor gives its model; those of InternVL and SmolVLM take packages for videos."""
    config: Any = transformers.AutoConfig.from_pretrained(folder)
    images: Any = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    if config.model_type == "internvl":
        inputs = dict(images(images=list(pictures), crop_to_patches=True, return_tensors="pt"))
        counts = inputs.pop("num_patches").tolist()
        around = [f"<img>{CONTEXT * (config.image_seq_length * n)}</img>" for n in counts]
        text = "".join(p + a for p, a in zip(prompt.split(CONTEXT), [*around, ""], strict=True))
        return {**inputs, "input_ids": tokenizer(text, return_tensors="pt")["input_ids"]}
    rows = hf_model(folder).model.image_seq_len
    made = transformers.Idefics3Processor(images, tokenizer, image_seq_len=rows)
    inputs = dict(made(text=[prompt], images=[list(pictures)], return_tensors="pt"))
    return {name: inputs[name] for name in ("input_ids", "pixel_values", "pixel_attention_mask")}


def their_logits(folder: Path, inputs: Mapping[str, Any], tokens: Sequence[int]) -> np.ndarray:
    """Logits (len(tokens) + 1, V) of transformers' own model after the prompt, and after each of `tokens`."""
    with torch.inference_mode():
        out = hf_model(folder)(**inputs, use_cache=True)
        rows = [out.logits[0, -1:]]
        if tokens:  # an answer may hold the image token, which is then one like any other
            more = torch.tensor([list(tokens)])
            rows.append(hf_model(folder)(input_ids=more, past_key_values=out.past_key_values).logits[0])
    logits: np.ndarray = torch.cat(rows).numpy()
    return logits


def check_pictures(vlm: VLM, folder: Path, prompt: str, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """The runtime's tiles and prompt ids are those of transformers, which are returned."""
    inputs = theirs(folder, prompt, pictures)
    want = inputs["pixel_values"].numpy()
    got = np.concatenate([vlm.picture(picture, len(pictures)).pixels for picture in pictures])
    assert got.shape == want.shape[-4:]
    np.testing.assert_allclose(got, want.reshape(got.shape), rtol=0, atol=1e-6)
    assert list(vlm.request(prompt, pictures, {}, started=0.0).ids) == inputs["input_ids"][0].tolist()
    return inputs


def check_answer(vlm: VLM, folder: Path, prompt: str, pictures: Sequence[Image.Image], tokens: int = 12) -> None:
    """The runtime's pictures, prompt and greedy answer are those of transformers."""
    inputs = check_pictures(vlm, folder, prompt, pictures)
    answer = vlm.answer(prompt, pictures, raw=True, max_new_tokens=tokens)
    logits = their_logits(folder, inputs, answer.token_ids[:-1])
    assert list(answer.token_ids) == logits.argmax(-1).tolist()
    assert len(answer.token_ids) == tokens or answer.token_ids[-1] in vlm.spec.prompt.eos_token_ids


def check_reference(folder: Path, prompt: str, pictures: Sequence[Image.Image]) -> None:
    """What the parity gate compares with is what transformers computes."""
    model, inputs = load_model(folder), theirs(folder, prompt, pictures)
    ids = prompt_ids(model, prompt, pictures)
    assert ids == inputs["input_ids"][0].tolist()
    rows = torch.cat([picture_rows(model, picture, len(pictures)) for picture in pictures])
    logits = model.language_model().forward(spliced(model, ids, rows))[0].numpy()
    want = their_logits(folder, inputs, [])[0]
    assert float(np.linalg.norm(logits - want) / np.linalg.norm(want)) <= 1e-4


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture of (width, height) with structure at every scale."""
    width, height = size
    rng = np.random.default_rng(seed + 7 * width + height)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size)
    return Image.fromarray(np.clip(np.asarray(coarse) + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8))
