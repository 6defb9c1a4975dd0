"""Tiny checkpoints in LLaVA's original layout, as its `save_pretrained` writes them: files, names and config keys.

They are made of transformers' own LLaVA (`twin`), which computes the same and so is what they are compared with.
"""

from __future__ import annotations

import functools
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file

from checkpoints import TEXT, tiny_llava, tiny_tokenizer
from tiled import tiny_tiled

TRAINED_ON = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. Human: Assistant: ### [INST] [/INST] <<SYS>> <</SYS>>"
)
# What old and new LLaVA, Bunny, and PEFT's and DeepSpeed's wrappers call the tower.
TOWER_NAMES = (
    "model.vision_tower.vision_tower.vision_model.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.vision_tower.",
    "base_model.model.model.vision_tower.vision_tower.vision_model.",
)
_CLASSES = {"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM", "qwen2": "LlavaQwenForCausalLM"}


@dataclass(frozen=True)
class Made:
    """`folder` in the original layout, `twin` the same in transformers' own, `tower` a folder of the tower alone."""

    folder: Path
    twin: Path
    tower: Path


def tiny_original(
    root: Path,
    *,
    name: str = "llava-v1.5-tiny",
    text: str = "llama",
    tower: str = "clip",
    tokens: str = "sentencepiece",
    carried: bool = True,
    spelling: str = TOWER_NAMES[0],
    config: Mapping[str, Any] | None = None,
    pickled: bool = False,
    vocabulary: int | None = None,
    tiled: str | None = None,
    legacy: bool = True,
    **options: Any,
) -> Made:
    """Write all three folders. `config` changes keys of the original config.json (None removes one).

    `tokens` is "sentencepiece" (tokenizer.model alone) or "bpe" (tokenizer.json); `vocabulary` the rows of the table;
    `tiled` the family of a twin with tiles; `legacy` is that of tokenizer_config.json.
    """
    rows = {} if vocabulary is None else {"vocab_size": vocabulary}
    text_options = {**options.pop("text_options", {}), **rows}
    if tiled is not None:
        twin = tiny_tiled(root / "twin", tiled, text=text, tower=tower, **options)
    else:
        full = {"strategy": "full"} if tower == "siglip" else {}
        twin = tiny_llava(root / "twin", text=text, tower=tower, text_options=text_options, **{**full, **options})
    tensors = load_file(twin / "model.safetensors")
    folder = root / name
    folder.mkdir()
    _write_tower(root / "tower", twin, tensors)
    named = {_original(key, spelling): tensor.clone() for key, tensor in tensors.items()}
    if not carried:
        named = {key: tensor for key, tensor in named.items() if "vision_tower" not in key}
    if pickled:
        torch.save(named, folder / "pytorch_model.bin")
    else:
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    _write_config(folder, twin, text, config or {})
    if tokens == "sentencepiece":
        _write_sentencepiece(folder, legacy)
    else:
        tiny_tokenizer(adds_bos=False).save_pretrained(folder)
        _forget_image(folder)
    return Made(folder, twin, root / "tower")


def _original(name: str, tower: str) -> str:
    for ours, theirs in (
        ("language_model.model.", "model."),
        ("model.language_model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("model.vision_tower.vision_model.", tower),
        ("vision_tower.vision_model.", tower),
        ("model.vision_tower.", tower),
        ("vision_tower.", tower),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return "model.image_newline" if name.endswith("image_newline") else name


def _write_tower(folder: Path, twin: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A CLIP or SigLIP folder: vision_model.… and its processor."""
    folder.mkdir()
    whole = json.loads((twin / "config.json").read_text())
    config = whole["vision_config"]
    if whole["vision_feature_layer"] == -1 and config["model_type"] == "siglip_vision_model":
        config["num_hidden_layers"] += 1  # LLaVA-NeXT's code cuts the last layer off and takes the new last one
    (folder / "config.json").write_text(json.dumps(config))
    part = {_original(k, "vision_model."): t.clone() for k, t in tensors.items() if "vision_tower" in k}
    save_file(part, folder / "model.safetensors", metadata={"format": "pt"})
    processor = transformers.AutoImageProcessor.from_pretrained(twin, backend="pil")
    numbers = {key: getattr(processor, key) for key in ("image_mean", "image_std", "resample", "rescale_factor")}
    kind = {"clip_vision_model": "CLIPImageProcessor", "siglip_vision_model": "SiglipImageProcessor"}
    about = {**numbers, "image_processor_type": kind[config["model_type"]]}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))


def _write_config(folder: Path, twin: Path, text: str, changes: Mapping[str, Any]) -> None:
    whole = json.loads((twin / "config.json").read_text())
    tower, layer = whole["vision_config"], whole["vision_feature_layer"]
    own = {
        **whole["text_config"],
        "model_type": {"qwen2": "llava_qwen"}.get(text, f"llava_{text}"),
        "architectures": [_CLASSES.get(text, "LlavaLlamaForCausalLM")],
        "tie_word_embeddings": whole["tie_word_embeddings"],
        "mm_vision_tower": "../tower",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": tower["hidden_size"],
        "mm_vision_select_layer": -2 if tower["model_type"] == "siglip_vision_model" and layer == -1 else layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "use_mm_proj": True,
        "pretrain_mm_mlp_adapter": None,
        **_tiles(whole),
        **changes,
    }
    (folder / "config.json").write_text(json.dumps({k: v for k, v in own.items() if v is not None}))


def _tiles(whole: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of LLaVA-NeXT and OneVision, whose pinpoints are (width, height)."""
    if "image_grid_pinpoints" not in whole:
        return {}
    return {
        "image_aspect_ratio": whole.get("vision_aspect_ratio", "anyres"),
        "image_grid_pinpoints": [[width, height] for height, width in whole["image_grid_pinpoints"]],
        "mm_patch_merge_type": "spatial_unpad",
    }


@functools.cache
def sentencepiece_model() -> bytes:
    """tokenizer.model: a BPE with bytes, as Llama's."""
    out = io.BytesIO()
    lines = [*TEXT.splitlines(), *TRAINED_ON.split(". ")] * 8
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


def _write_sentencepiece(folder: Path, legacy: bool = True) -> None:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    about = {**names, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({**about, "legacy": legacy}))


def _forget_image(folder: Path) -> None:
    """The original code has no token for a picture."""
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "<image>"]
    data["model"]["vocab"].pop("<image>", None)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    path = folder / "tokenizer_config.json"
    about = {k: v for k, v in json.loads(path.read_text()).items() if "image" not in json.dumps([k, v])}
    path.write_text(json.dumps(about))


def copy(folder: Path, to: Path) -> Path:
    """A private copy that a test may damage."""
    return Path(shutil.copytree(folder, to))
