"""config.json of LLaVA's original layout → that of `LlavaForConditionalGeneration` and its kin in transformers."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_models.checkpoint import Stored
from vlm_models.errors import CheckpointError

_OWN = re.compile(
    r"^(mm_|image_|vision_|s2|tune_|freeze_|unfreeze_|use_(mm|s2|im)|pretrain_|model_type$|architectures$|auto_map$"
    r"|transformers_version$|_name_or_path$|tokenizer_|max_sequence_length$|(torch_)?dtype$|quantization_config$)"
)
# The words by which original configs call a language model → its model_type in transformers.
_LANGUAGES = {
    "llama": "llama",
    "vicuna": "llama",
    "mobilevlm": "llama",
    "mobilellama": "llama",
    "mistral": "mistral",
    "qwen": "qwen2",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "phi3": "phi3",
}
_REFUSED = ("mpt", "phi", "stablelm", "stable_lm", "minicpm", "mixtral", "qwen_moe", "qwen2_moe", "rwkv", "openelm")
_ASPECTS = ("square", "pad", "anyres", "anyres_max_<N>")
_MERGES = "spatial_unpad"


def check(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for what no part here can do: resamplers, several scales, quantized weights."""
    for key, what in (
        ("mm_resampler_type", "a resampler"),
        ("s2", "a tower at several scales (S2)"),
        ("use_s2", "a tower at several scales (S2)"),
        ("quantization_config", "quantized weights"),
    ):
        if config.get(key):
            raise CheckpointError(
                f"{folder}: config.json asks for {what} ({key}: {str(config[key])[:60]}), which is not supported; "
                "towers of one scale, MLP-like projectors and weights in float32, float16 or bfloat16 are"
            )


def language(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """text_config. Raises CheckpointError for a language model of another line, listing those that are read."""
    text = {key: value for key, value in config.items() if not _OWN.match(key)}
    return {**text, "model_type": _model_type(folder, config, tensors)}


def _model_type(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> str:
    """By the words in model_type and architectures; where they say no more than "llava", by the tensors."""
    architectures = [str(name).removesuffix("ForCausalLM") for name in config.get("architectures") or ()]
    given = [str(config.get("model_type", "")), *architectures]
    words = [re.sub(r"^(llava|bunny|imp|share4v|sharegpt4v)(?=.)", "", word.lower()).strip("-_") for word in given]
    words = [re.sub(r"^(llava|next)(?=.)", "", word).strip("-_") for word in words]
    if bad := [word for word in words if word.startswith(_REFUSED) and word not in _LANGUAGES]:
        raise CheckpointError(
            f"{folder}: the language model {bad[0]!r} (model_type {given[0]!r}) is not supported; supported are "
            f"{', '.join(sorted(set(_LANGUAGES.values())))}"
        )
    found = [_LANGUAGES[word] for word in words if word in _LANGUAGES]
    first = "language_model.layers.0.self_attn."
    if f"{first}q_norm.weight" in tensors and not {"gemma", "gemma2"} & set(found):
        return "qwen3"
    if f"{first}qkv_proj.weight" in tensors:
        return "phi3"
    if f"{first}q_proj.bias" in tensors and f"{first}o_proj.bias" not in tensors:
        return "qwen2"
    return found[-1] if found else "llama"


def vision_part(config: Mapping[str, Any], kind: str, carried: int, full: int) -> dict[str, Any]:
    """Which hidden states LLaVA takes, and how: of a tower of `full` layers, of which `carried` are here.

    The codes of SigLIP towers take every row of the layer before the last, and may have cut the last one off.
    """
    layer = int(config.get("mm_vision_select_layer", -2))
    if layer < 0:
        layer += full - carried
    strategy = "full" if kind == "siglip_vision_model" or _whole(config) else "default"
    return {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}


def _whole(config: Mapping[str, Any]) -> bool:
    return bool(config.get("mm_vision_select_feature", "patch") != "patch")


def aspect(folder: Path, config: Mapping[str, Any]) -> str:
    """image_aspect_ratio: "square", "pad", "anyres" or "anyres_max_<N>". Raises CheckpointError for others."""
    found = str(config.get("image_aspect_ratio") or "square")
    if found not in ("square", "pad", "anyres") and not re.fullmatch(r"anyres_max_\d+", found):
        raise CheckpointError(
            f"{folder}: image_aspect_ratio {found!r} is not supported; supported are {', '.join(_ASPECTS)}"
        )
    feature = str(config.get("mm_vision_select_feature", "patch"))
    if feature not in ("patch", "cls_patch"):
        raise CheckpointError(f"{folder}: mm_vision_select_feature {feature!r} is neither 'patch' nor 'cls_patch'")
    merge = str(config.get("mm_patch_merge_type") or "flat")
    if found.startswith("anyres") and merge != _MERGES:
        raise CheckpointError(
            f"{folder}: tiles ({found}) that are merged by mm_patch_merge_type {merge!r} are not supported; "
            f"{_MERGES!r} is"
        )
    return found


def pinpoints(folder: Path, config: Mapping[str, Any], edge: int) -> list[list[int]]:
    """image_grid_pinpoints as transformers has them, [height, width]: the original has (width, height).

    They are a list, its text, or a range in tiles of the tower's `edge` as in "(1x1),...,(6x6)".
    """
    given = config.get("image_grid_pinpoints")
    if isinstance(given, str) and (ends := re.fullmatch(r"\((\d+)x(\d+)\),\.\.\.,\((\d+)x(\d+)\)", given.strip())):
        first, second, last, other = map(int, ends.groups())
        return [[i * edge, j * edge] for i in range(first, last + 1) for j in range(second, other + 1)]
    if isinstance(given, str):
        try:
            given = ast.literal_eval(given)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            given = None
    pairs = given if isinstance(given, list | tuple) else ()
    if not pairs or any(not isinstance(p, list | tuple) or len(p) != 2 for p in pairs):
        raise CheckpointError(
            f"{folder}: image_grid_pinpoints {str(config.get('image_grid_pinpoints'))[:80]!r} cannot be read: a list "
            'of (width, height) in pixels, or "(1x1),...,(6x6)" is'
        )
    return [[int(height), int(width)] for width, height in pairs]
