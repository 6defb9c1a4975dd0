"""The layout of OpenGVLab's own InternVL code (`InternVLChatModel`), in the terms of transformers' `internvl`.

Names and defaults: modeling_internvl_chat.py, modeling_intern_vit.py, modeling_internlm2.py and conversation.py of
https://github.com/OpenGVLab/InternVL.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_models import conversations
from vlm_models.checkpoint import Checkpoint, Sources, fingerprint, read_json, refuse_sources
from vlm_models.conversation import Conversation, Written, chat_template
from vlm_models.errors import CheckpointError
from vlm_models.internvl_names import canonical_tensors
from vlm_models.made import MadeFolder
from vlm_models.original.files import load_tokenizer
from vlm_models.weights import read_weights

CONTEXT = "<IMG_CONTEXT>"
_MEAN, _STD, _BICUBIC = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 3
_LANGUAGES = {
    "LlamaForCausalLM": "llama",
    "InternLM2ForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
    "MistralForCausalLM": "mistral",
}
_LEFT_OUT = (
    *("architectures", "auto_map", "torch_dtype", "dtype", "attn_implementation", "_attn_implementation"),
    *("_name_or_path", "transformers_version", "use_flash_attn"),
)
_TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)
_PUYU = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
_WANXIANG = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
_IM = ("<|im_start|>user\n", "<|im_start|>assistant\n")
_KNOWN = (
    Conversation("Hermes-2", "mpt", _PUYU, _IM, "<|im_end|>", header="<|im_start|>system\n"),
    Conversation("internlm2-chat", "mpt", _PUYU, _IM, "<|im_end|>", header="<|im_start|>system\n"),
    Conversation("phi3-chat", "mpt", _PUYU, ("<|user|>\n", "<|assistant|>\n"), "<|end|>", header="<|system|>\n"),
    Conversation("internvl2_5", "mpt", _WANXIANG, _IM, "<|im_end|>\n", header="<|im_start|>system\n"),
    Conversation("internvl_zh", "two", "", ("<human>", "<bot>"), " ", "</s>"),
)
CONVERSATIONS: Mapping[str, Conversation] = {c.name: c for c in _KNOWN}


def matches(folder: Path, config: Mapping[str, Any]) -> bool:
    """A language model's config called llm_config beside vision_config."""
    return isinstance(config.get("llm_config"), dict) and isinstance(config.get("vision_config"), dict)


def open_folder(folder: Path, config: Mapping[str, Any], sources: Sources) -> Checkpoint:
    """A whole model; the conversation is the one that config.json names, or that of --conversation."""
    refuse_sources(folder, sources, "holds a whole model", "base", "vision_tower")
    _check(folder, config)
    name = sources.conversation or config.get("template")
    given = config.get("system_message")
    conversation = _conversation(folder, name)
    if isinstance(given, str):
        conversation = dataclasses.replace(conversation, system=given)
    written = Written(conversation, CONTEXT, whole=True)
    made = MadeFolder()
    path = Path(made.name)
    image, ends = _write_tokenizer(folder, path, conversation.stop)
    (path / "chat_template.jinja").write_text(chat_template(conversation, CONTEXT), "utf-8")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), "utf-8")
    _write_processor(config, path)
    text, notes = _language(folder, config["llm_config"])
    out = {
        "model_type": "internvl",
        "text_config": text,
        "vision_config": _vision(config),
        "image_token_id": image,
        "downsample_ratio": config.get("downsample_ratio", 0.5),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.get("select_layer", -1),
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }
    tensors = dict(canonical_tensors(folder, config["llm_config"], read_weights(folder)))
    how = "as --conversation says" if sources.conversation else "as config.json says"
    return Checkpoint(
        folder,
        folder.resolve().name,
        out,
        tensors,
        fingerprint(out, tensors),
        layout="internvl_chat",
        notes=(*notes, f"conversation: {conversation.name}, {how}"),
        made=made,
        conversation=written,
    )


def _check(folder: Path, config: Mapping[str, Any]) -> None:
    vision = config["vision_config"]
    for values, key, default in (
        *((vision, "image_size", 224), (config, "min_dynamic_patch", 1), (config, "max_dynamic_patch", 6)),
        *((config["llm_config"], key, 1) for key in ("num_attention_heads", "num_key_value_heads", "hidden_size")),
    ):
        if not isinstance(value := values.get(key) or default, int) or value < 1:
            raise CheckpointError(f"{folder}: {key} {value!r} in config.json must be a whole number of 1 or more")
    edge, forced = vision.get("image_size", 224), config.get("force_image_size")
    if forced not in (None, edge):
        raise CheckpointError(
            f"{folder}: force_image_size {forced} resizes the position embeddings of a tower of {edge} pixels; "
            f"save them resized, with image_size {forced}"
        )
    if (version := config.get("ps_version", "v1")) != "v2":
        raise CheckpointError(f"{folder}: ps_version {version!r} is not supported: only 'v2' is")
    if config.get("pad2square"):
        raise CheckpointError(f"{folder}: pad2square is not supported: only pictures that are cut into tiles are")
    if config.get("dynamic_image_size") and not config.get("use_thumbnail"):
        raise CheckpointError(f"{folder}: tiles without a view of the whole (use_thumbnail false) are not supported")
    if vision.get("qk_normalization", True) and (eps := float(vision.get("layer_norm_eps", 1e-6))) != 1e-6:
        raise CheckpointError(f"{folder}: the norm of queries and keys has an epsilon of {eps:g}; only 1e-06 is read")


def _conversation(folder: Path, name: object) -> Conversation:
    if str(name) in CONVERSATIONS:
        return CONVERSATIONS[str(name)]
    if str(name) in conversations.CONVERSATIONS:
        return conversations.CONVERSATIONS[str(name)]
    raise CheckpointError(
        f"{folder}: the conversation {name!r} is not known; choose with --conversation: {', '.join(CONVERSATIONS)}"
    )


def _vision(config: Mapping[str, Any]) -> dict[str, Any]:
    """vision_config; what a file leaves out is InternViT-6B's."""
    v = config["vision_config"]
    edge, patch = v.get("image_size", 224), v.get("patch_size", 14)
    return {
        "model_type": "internvl_vision",
        "hidden_size": v.get("hidden_size", 3200),
        "num_hidden_layers": v.get("num_hidden_layers", 48),
        "num_attention_heads": v.get("num_attention_heads", 25),
        "intermediate_size": v.get("intermediate_size", 12800),
        "hidden_act": v.get("hidden_act", "gelu"),
        "norm_type": v.get("norm_type", "rms_norm"),
        "layer_norm_eps": v.get("layer_norm_eps", 1e-6),
        "attention_bias": v.get("qkv_bias", False),
        "use_qk_norm": v.get("qk_normalization", True),
        "image_size": [edge, edge],
        "patch_size": [patch, patch],
        "use_mean_pooling": True,  # no norm after the last layer
    }


def _language(folder: Path, llm: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """text_config, and what to tell of it."""
    given = llm.get("architectures")
    architecture = given[0] if isinstance(given, list) and given else None
    if architecture not in _LANGUAGES:
        raise CheckpointError(
            f"{folder}: the language model {architecture!r} is not supported; supported are {', '.join(_LANGUAGES)}"
        )
    text = {k: v for k, v in llm.items() if k not in _LEFT_OUT}
    text |= {"model_type": _LANGUAGES[architecture], "tie_word_embeddings": False}
    if architecture == "InternLM2ForCausalLM":
        text |= {"attention_bias": bool(llm.get("bias", False)), "mlp_bias": False}
    scaling = text.get("rope_scaling")
    if isinstance(scaling, dict) and (scaling.get("type") or scaling.get("rope_type")) == "dynamic":
        # It begins where max_position_embeddings end, beyond which nothing is exported.
        text.pop("rope_scaling")
        return text, (f"dynamic rope scaling begins beyond {text.get('max_position_embeddings')} positions: left out",)
    return text, ()


def _write_tokenizer(folder: Path, made: Path, stop: str) -> tuple[int, list[int]]:
    """Copies the tokenizer without its code; the image token's id and those that end an answer."""
    for name in _TOKENIZER:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, made / name)
    config = read_json(made / "tokenizer_config.json", "") if (made / "tokenizer_config.json").is_file() else {}
    config.pop("auto_map", None)
    internlm2 = str(config.get("tokenizer_class", "")).startswith("InternLM2")
    if internlm2:
        config |= {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}
    (made / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    tokenizer = load_tokenizer(made)
    if internlm2 and not (made / "tokenizer.json").is_file():
        (made / "tokenizer.json").write_text(_as_internlm2(tokenizer, made), "utf-8")
        (made / "tokenizer_config.json").write_text(
            json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}), "utf-8"
        )
        tokenizer = load_tokenizer(made)
    vocabulary = tokenizer.get_vocab()
    if CONTEXT not in vocabulary:
        raise CheckpointError(
            f"{folder}: the tokenizer has no image token {CONTEXT!r}; save the one it was trained with"
        )
    path = folder / "generation_config.json"
    given = (read_json(path, "") if path.is_file() else {}).get("eos_token_id")
    ids = [int(i) for i in (given if isinstance(given, list) else [] if given is None else [given])]
    own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if stop not in vocabulary:
        raise CheckpointError(f"{folder}: the conversation ends answers with {stop!r}, which is no token here")
    return vocabulary[CONTEXT], list(dict.fromkeys([vocabulary[stop], *own, *ids]))


def _as_internlm2(tokenizer: Any, made: Path) -> str:
    """tokenizer.json of tokenizer.model: a blank before each text where the model asks for one, and no Llama rules."""
    from tokenizers import Tokenizer, normalizers
    from transformers.convert_slow_tokenizer import import_protobuf

    protobuf: Any = import_protobuf
    model = protobuf().ModelProto()
    model.ParseFromString((made / "tokenizer.model").read_bytes())
    fast: Any = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    blank = [normalizers.Prepend("▁")] if model.normalizer_spec.add_dummy_prefix else []
    fast.normalizer = normalizers.Sequence([*blank, normalizers.Replace(" ", "▁")])
    fast.pre_tokenizer = None
    return str(fast.to_str())


def _write_processor(config: Mapping[str, Any], made: Path) -> None:
    edge, dynamic = config["vision_config"].get("image_size", 224), bool(config.get("dynamic_image_size", False))
    out = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": edge, "width": edge},
        "resample": _BICUBIC,
        "image_mean": _MEAN,
        "image_std": _STD,
        "rescale_factor": 1 / 255,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "crop_to_patches": True,
        "min_patches": config.get("min_dynamic_patch") or 1 if dynamic else 1,
        "max_patches": config.get("max_dynamic_patch") or 6 if dynamic else 1,
    }
    (made / "preprocessor_config.json").write_text(json.dumps(out), "utf-8")
