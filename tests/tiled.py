"""Tiny random checkpoints whose pictures are cut into tiles, written by transformers itself, and pictures for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from checkpoints import CHATML, EOS, IMAGE, TURN, tiny_tokenizer

EDGE, PATCH = 28, 7  # of a tile and its patches: 4 × 4 rows
GRIDS = {
    "llava_next": [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]],
    "llava_onevision": [[rows, columns] for rows in range(1, 7) for columns in range(1, 7)],
}
# (height, width): single pixels, lines, primes, squares, and what just does or does not fill a resolution.
SIZES = (
    *((1, 1), (1, 1000), (1000, 1), (3, 4000), (4000, 3), (28, 28), (27, 29), (56, 56), (57, 55), (56, 28)),
    *((41, 57), (101, 103), (127, 31), (31, 127), (372, 500), (84, 28), (85, 28), (13, 17), (200, 67), (640, 427)),
    *((168, 168), (169, 167), (140, 84), (300, 299)),
)


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Random pixels of (height, width)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def tiny_tiled(
    folder: Path,
    family: str = "llava_next",
    *,
    text: str = "llama",
    tower: str = "clip",
    grids: list[list[int]] | None = None,
    max_grid: int = 9,
    adds_bos: bool = False,
    dtype: str = "float32",
    config_options: Mapping[str, Any] | None = None,
) -> Path:
    """Write a complete checkpoint folder of `family` and return it; `grids` are the resolutions in tiles."""
    tokenizer, next_line = tiny_tokenizer(adds_bos=adds_bos), family == "llava_next"
    pinpoints = [[rows * EDGE, columns * EDGE] for rows, columns in grids or GRIDS[family]]
    strategy, layer = ("default", -2) if tower == "clip" else ("full", -1)
    config = _config(family)(
        vision_config=_vision(tower),
        text_config=_text(text, tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        image_grid_pinpoints=pinpoints,
        **({} if next_line else {"vision_aspect_ratio": f"anyres_max_{max_grid}"}),
        **(config_options or {}),
    )
    model = _random(config, family).to(getattr(torch, dtype))
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(t) for t in (EOS, TURN)]
    model.save_pretrained(folder)
    _processor(folder, family, tower, tokenizer, pinpoints, max_grid)
    return folder


def _processor(folder: Path, family: str, tower: str, tokenizer: Any, pinpoints: Any, max_grid: int) -> None:
    """Processor, tokenizer and template; OneVision's in pieces, as on the hub, since the whole needs torchvision."""
    square, strategy = {"height": EDGE, "width": EDGE}, "default" if tower == "clip" else "full"
    options = {"image_token": IMAGE, "vision_feature_select_strategy": strategy}
    if family == "llava_next":
        size = {"size": {"shortest_edge": EDGE}} if tower == "clip" else {"size": square}
        transformers.LlavaNextProcessor(
            image_processor=LlavaNextImageProcessorPil(crop_size=square, image_grid_pinpoints=pinpoints, **size),
            tokenizer=tokenizer,
            patch_size=PATCH,
            num_additional_image_tokens=int(tower == "clip"),
            chat_template=CHATML,
            **options,
        ).save_pretrained(folder)
        return
    LlavaOnevisionImageProcessorPil(
        size=square, image_grid_pinpoints=pinpoints, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.4, 0.3]
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = (EDGE // PATCH) ** 2 + (tower == "clip")
    options |= {"num_image_tokens": rows, "vision_aspect_ratio": f"anyres_max_{max_grid}"}
    options |= {"processor_class": "LlavaOnevisionProcessor", "video_token": "<video>"}
    (folder / "processor_config.json").write_text(json.dumps(options))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))


def hf_tiled(folder: Path) -> Any:
    """transformers' own model of the folder, fp32, eager attention."""
    return transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def _config(family: str) -> Any:
    return {"llava_next": transformers.LlavaNextConfig, "llava_onevision": transformers.LlavaOnevisionConfig}[family]


def _vision(tower: str) -> Any:
    made = transformers.CLIPVisionConfig if tower == "clip" else transformers.SiglipVisionConfig
    return made(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=EDGE,
        patch_size=PATCH,
    )


def _text(text: str, tokenizer: Any) -> Any:
    classes = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
    }
    return classes[text](
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def _random(config: Any, family: str) -> Any:
    """Weights wide enough that every row and every norm matters."""
    classes = {
        "llava_next": transformers.LlavaNextForConditionalGeneration,
        "llava_onevision": transformers.LlavaOnevisionForConditionalGeneration,
    }
    model, generator = classes[family](config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1:
                p.copy_(noise * (0.5 if "embed_tokens" in name else 0.12))
            elif name.endswith("image_newline"):
                p.copy_(noise * 0.5)
            else:
                p.add_(noise * 0.1) if "norm" in name and name.endswith("weight") else p.copy_(noise * 0.05)
    return model
