"""What stands beside the weights: image processor, tokenizer, chat template, end-of-answer ids → specs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from vlm_models.checkpoint import Checkpoint, read_json
from vlm_models.errors import CheckpointError
from vlm_models.spec import PreprocessSpec, PromptSpec

_IMAGE_TOKEN_KEYS = ("image_token_index", "image_token_id")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def image_processor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own transformers image processor on Pillow: what our preprocessing has to equal."""
    from transformers import AutoImageProcessor

    auto: Any = AutoImageProcessor
    folder = checkpoint.files
    if not any((folder / name).is_file() for name in _PROCESSORS):
        raise CheckpointError(f"{folder} has no {_PROCESSORS[0]}: save the processor beside the model")
    try:
        return auto.from_pretrained(folder, local_files_only=True, backend="pil")
    except Exception as error:  # whatever a processor class raises on values it does not take
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: the image processor cannot be read: {reason}") from error


def preprocess_spec(checkpoint: Checkpoint, image_size: int, *, squashed: bool = False) -> PreprocessSpec:
    """PreprocessSpec of the image processor; its pictures must be `image_size` square, as the tower expects.

    `squashed` says that the processor resizes tiles to a square whatever do_resize says of the picture.
    """
    p = image_processor(checkpoint)
    size, crop = dict(p.size or {}), dict(p.crop_size or {}) if getattr(p, "do_center_crop", False) else {}
    edge = int(size.get("shortest_edge") or size.get("height") or image_size)
    resize: Literal["shortest_edge", "exact", "none"] = "shortest_edge" if "shortest_edge" in size else "exact"
    if squashed or not p.do_resize:
        resize = "exact" if squashed else "none"
    out = PreprocessSpec(
        size=edge,
        resize=resize,
        crop=int(crop.get("height", 0)),
        resample=int(p.resample),
        rescale=float(p.rescale_factor) if p.do_rescale else 1.0,
        mean=triple(p.image_mean) if p.do_normalize else (0.0, 0.0, 0.0),
        std=triple(p.image_std) if p.do_normalize else (1.0, 1.0, 1.0),
        pad="square" if type(p).__name__.startswith("LlavaImageProcessor") and p.do_pad else "none",
        pad_color=_color(p),
    )
    square = size.get("height") == size.get("width") and crop.get("height") == crop.get("width")
    final = out.crop or (edge if out.resize == "exact" or out.pad == "square" else 0)
    if not square or final != image_size:
        raise CheckpointError(
            f"{checkpoint.folder}: the image processor makes pictures of size {size}, crop {crop or 'none'}, "
            f"but the tower takes {image_size} × {image_size}"
        )
    return out


def prompt_spec(checkpoint: Checkpoint, config: Any, image_tokens: int) -> PromptSpec:
    """Image token, chat template and the ids that end an answer (as transformers' generate() takes them)."""
    named = {key: checkpoint.config[key] for key in _IMAGE_TOKEN_KEYS if checkpoint.config.get(key) is not None}
    if len(set(named.values())) > 1:
        said = " and ".join(f"{key} {value}" for key, value in named.items())
        raise CheckpointError(f"{checkpoint.folder}: config.json names two image tokens, {said}: leave one of them out")
    image_token_id = int(config.image_token_id)
    tokens = read_tokenizer_config(checkpoint)
    return PromptSpec(
        image_token=_image_token(checkpoint, image_token_id),
        image_token_id=image_token_id,
        image_tokens=image_tokens,
        eos_token_ids=_eos_ids(checkpoint, config),
        bos_token=_token_text(tokens.get("bos_token")),
        eos_token=_token_text(tokens.get("eos_token")),
        chat_template=_chat_template(checkpoint, tokens),
        chunked=checkpoint.conversation is not None and not checkpoint.conversation.whole,
        stop=tuple(checkpoint.config.get("stop", ())) if checkpoint.conversation is not None else (),
    )


def tokenizer_json(checkpoint: Checkpoint) -> str:
    """The checkpoint's tokenizer in the format of the tokenizers library, converted where it has only an older form."""
    return _tokenizer_json(checkpoint.files)


@lru_cache(maxsize=4)
def _tokenizer_json(folder: Path) -> str:
    if (folder / "tokenizer.json").is_file():
        return (folder / "tokenizer.json").read_text("utf-8")
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True).backend_tokenizer
    except Exception as error:  # transformers raises many kinds when files are absent or damaged
        raise CheckpointError(
            f"{folder} has no tokenizer.json and none can be made: save the tokenizer there"
        ) from error
    return str(backend.to_str())


def read_tokenizer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """tokenizer_config.json, or {} where there is none."""
    path = checkpoint.files / "tokenizer_config.json"
    return read_json(path, "") if path.is_file() else {}


def special_token(checkpoint: Checkpoint, name: str, default: str) -> str:
    """A special token that tokenizer_config.json names, at its top or among the extra ones; else `default`."""
    tokens = read_tokenizer_config(checkpoint)
    inner = [v for k, v in tokens.items() if k.endswith("special_tokens") and isinstance(v, dict)]
    found = (_token_text(place.get(name)) for place in (tokens, *inner))
    return next((text for text in found if text is not None), default)


def transformers_tokenizer(checkpoint: Checkpoint) -> Any:
    """transformers' own tokenizer of the checkpoint. Raises CheckpointError where it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.files, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{checkpoint.files}: transformers cannot load its tokenizer: {reason}") from error


def processor_ids(checkpoint: Checkpoint, prompt: str, pictures: Sequence[Any], *, special_tokens: bool) -> list[int]:
    """Token ids of a text about Pillow images by transformers' own processor: what our prompts have to equal."""
    from transformers import AutoProcessor

    auto: Any = AutoProcessor
    try:
        processor = auto.from_pretrained(checkpoint.files, local_files_only=True)
    except Exception as error:  # whatever a processor class raises on files it does not take
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{checkpoint.folder}: transformers cannot load its processor: {reason}") from error
    out = processor(images=list(pictures), text=[prompt], add_special_tokens=special_tokens)
    return [int(token) for token in out["input_ids"][0]]


def token_text(checkpoint: Checkpoint, token: int) -> str:
    """The text of one token. Raises CheckpointError where the tokenizer has none of that id."""
    from tokenizers import Tokenizer

    text = Tokenizer.from_str(tokenizer_json(checkpoint)).id_to_token(token)
    if text is None:
        raise CheckpointError(f"{checkpoint.folder}: token {token} of config.json is not in the tokenizer")
    return str(text)


def _image_token(checkpoint: Checkpoint, image_token_id: int) -> str:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(tokenizer_json(checkpoint))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"{checkpoint.folder / 'tokenizer.json'} is damaged: {str(error)[:120]}") from error
    text = tokenizer.id_to_token(image_token_id)
    if text is None:
        raise CheckpointError(
            f"{checkpoint.folder}: image_token_index {image_token_id} is not in the tokenizer "
            f"of {tokenizer.get_vocab_size()} tokens"
        )
    if tokenizer.encode(text, add_special_tokens=False).ids != [image_token_id]:
        raise CheckpointError(
            f"{checkpoint.folder}: the tokenizer does not read its image token {text!r} as the one id "
            f"{image_token_id}; add it as a special token"
        )
    return str(text)


def _eos_ids(checkpoint: Checkpoint, config: Any) -> tuple[int, ...]:
    path = checkpoint.files / "generation_config.json"
    found = read_json(path, "").get("eos_token_id") if path.is_file() else None
    if found is None:
        found = getattr(config, "eos_token_id", None)
    if found is None:
        found = config.text_config.eos_token_id
    ids = found if isinstance(found, list) else [] if found is None else [found]
    return tuple(int(i) for i in ids)


def _chat_template(checkpoint: Checkpoint, tokens: Mapping[str, Any]) -> str | None:
    """From the places transformers has kept it, newest first."""
    folder = checkpoint.files
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file() and isinstance(text := read_json(folder / name, "").get("chat_template"), str):
            return text
    template = tokens.get("chat_template")
    if isinstance(template, list):  # named templates
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def triple(values: Any) -> tuple[float, float, float]:
    """image_mean or image_std: three numbers, or one for all. Raises CheckpointError."""
    values = [values] * 3 if isinstance(values, int | float) else list(values)
    if len(values) != 3:
        raise CheckpointError(f"image_mean and image_std must hold 3 numbers, not {json.dumps(values)}")
    return float(values[0]), float(values[1]), float(values[2])


def _color(processor: Any) -> tuple[int, int, int]:
    """LLaVA pads with its mean colour."""
    if not type(processor).__name__.startswith("LlavaImageProcessor"):
        return 0, 0, 0
    r, g, b = (int(255 * m) for m in triple(processor.image_mean))
    return r, g, b
