"""What transformers reads beside the weights, made from an original folder: tokenizer, image processor, template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_models.checkpoint import read_json
from vlm_models.errors import CheckpointError

SOURCE = "source"
"""Subfolder of the made folder: tokenizer, configs and processor as they were found, for the reference."""
CONFIG, TOWER_CONFIG, PROCESSOR = "original_config.json", "tower_config.json", "tower_preprocessor.json"

IMAGE, PATCH, START, END = "<image>", "<im_patch>", "<im_start>", "<im_end>"
_TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)
_MODELS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_BICUBIC = 3
BLANK = "▁"  # U+2581, SentencePiece's space


@dataclass(frozen=True)
class Tokens:
    """The tokenizer as it was made: id of `<image>`, all texts that are one token with their ids, BOS and EOS."""

    image: int
    vocabulary: Mapping[str, int]
    bos: str | None
    eos: str | None
    template: str | None


def write_tokenizer(source: Path, made: Path, wanted: Sequence[str], rows: int) -> Tokens:
    """tokenizer.json of `source` in `made`, with `<image>` and the `wanted` tokens added where they are missing.

    `rows` is the length of the embedding table, within which `wanted` tokens must be; `<image>` is never looked up.
    Raises CheckpointError where there is no tokenizer, or a wanted token has no row.
    """
    copied = made / SOURCE
    copied.mkdir()
    for name in _TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, copied / name)
    if not any((copied / name).is_file() for name in _MODELS):
        raise CheckpointError(f"{source} has no tokenizer ({', '.join(_MODELS)}): save the tokenizer beside the model")
    config = read_json(copied / "tokenizer_config.json", "") if (copied / "tokenizer_config.json").is_file() else {}
    config.pop("auto_map", None)  # code of the checkpoint, which is never run
    if not (copied / "tokenizer.json").is_file():
        config.setdefault(
            "tokenizer_class", "LlamaTokenizer" if (copied / "tokenizer.model").is_file() else "Qwen2Tokenizer"
        )
    else:
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    (copied / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return _write(copied, made, config, wanted, rows)


def _write(copied: Path, made: Path, config: Mapping[str, Any], wanted: Sequence[str], rows: int) -> Tokens:
    from tokenizers import Tokenizer

    own = load_tokenizer(copied)
    if (copied / "tokenizer.json").is_file():
        try:
            fast = Tokenizer.from_file(str(copied / "tokenizer.json"))
        except Exception as error:  # the tokenizers library raises plain Exception
            raise CheckpointError(f"{copied.name}/tokenizer.json is damaged: {str(error)[:120]}") from error
    else:
        fast = Tokenizer.from_str(own.backend_tokenizer.to_str())
        _as_sentencepiece(fast, copied)
    for text, token in sorted(_extra(copied).items(), key=lambda item: item[1]):
        if (given := _id(fast, text)) != token:
            raise CheckpointError(f"added_tokens.json gives {text!r} the id {token}, the tokenizer {given}")
    for text in wanted:
        if (token := _id(fast, text)) >= rows:
            raise CheckpointError(
                f"config.json asks for {text!r} around a picture (mm_use_im_start_end), which the tokenizer has as id "
                f"{token}, outside the embedding table of {rows} rows: the checkpoint is incomplete"
            )
    image = _id(fast, IMAGE)
    fast.no_truncation()
    fast.no_padding()
    (made / "tokenizer.json").write_text(fast.to_str(), "utf-8")
    bos, eos = own.bos_token, own.eos_token
    kept = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": own.unk_token,
    }
    kept |= {"clean_up_tokenization_spaces": False, "model_max_length": config.get("model_max_length") or 1 << 30}
    (made / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in kept.items() if v is not None}), "utf-8")
    template = own.chat_template if isinstance(own.chat_template, str) else None
    return Tokens(image, fast.get_vocab(with_added_tokens=True), bos, eos, template)


def _id(fast: Any, text: str) -> int:
    """The id of a token that is read wherever it stands in a text, added where it is not one yet."""
    from tokenizers import AddedToken

    fast.add_special_tokens([AddedToken(text, normalized=False, special=True)])
    return int(fast.token_to_id(text))


def load_tokenizer(folder: Path) -> Any:
    """transformers' own tokenizer of a folder, without any code of the checkpoint. Raises CheckpointError."""
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer
    try:
        return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds when files are absent or damaged
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"transformers cannot load the checkpoint's tokenizer: {reason}") from error


def _as_sentencepiece(fast: Any, folder: Path) -> None:
    """Let a tokenizer from tokenizer.model write a blank before every text, as SentencePiece does.

    transformers 5 does not where the text begins with one, as pieces after a picture do. Scheme "always" (`legacy`)
    also writes one after each special token.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers

    if not (folder / "tokenizer.model").is_file() or not isinstance(fast.pre_tokenizer, pre_tokenizers.Metaspace):
        return
    if fast.pre_tokenizer.prepend_scheme == "always":
        fast.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
        fast.pre_tokenizer = None
    elif fast.pre_tokenizer.prepend_scheme == "first":
        fast.normalizer = normalizers.Replace(Regex(r"\A "), BLANK * 2)


def _extra(folder: Path) -> dict[str, int]:
    path = folder / "added_tokens.json"
    found = read_json(path, "") if path.is_file() else {}
    return {text: int(token) for text, token in found.items()}


def write_processor(
    checkpoint: Path, tower: Path | None, made: Path, vision: Mapping[str, Any], aspect: str, pinpoints: object
) -> str:
    """preprocessor_config.json of `made` for image_aspect_ratio `aspect`; in words whose numbers it has.

    Resize filter, mean and deviation are those of the tower's own processor, else the checkpoint's, else those that
    CLIP and SigLIP have. LLaVA resizes CLIP's pictures by the shorter edge and crops them, and squashes SigLIP's.
    """
    if tower is not None and (tower / "config.json").is_file():
        whole = read_json(tower / "config.json", "")
        part = whole.get("vision_config", whole)
        (made / SOURCE / TOWER_CONFIG).write_text(json.dumps(part), "utf-8")
    places = [place for place in (tower, checkpoint) if place is not None]
    found = next((p / "preprocessor_config.json" for p in places if (p / "preprocessor_config.json").is_file()), None)
    raw = read_json(found, "") if found is not None else {}
    (made / SOURCE / PROCESSOR).write_text(json.dumps(raw), "utf-8")
    clip, edge = vision["model_type"] == "clip_vision_model", int(vision.get("image_size", 224))
    mean, deviation = (_CLIP_MEAN, _CLIP_STD) if clip else (_HALF, _HALF)
    out: dict[str, Any] = {
        "resample": int(raw.get("resample", _BICUBIC)),
        "image_mean": [float(value) for value in raw.get("image_mean") or mean],
        "image_std": [float(value) for value in raw.get("image_std") or deviation],
        "rescale_factor": float(raw.get("rescale_factor") or 1 / 255),
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
    }
    if any(made_edge != edge for made_edge in _edges(raw)):
        raise CheckpointError(f"{found} makes pictures of {_edges(raw)[0]} pixels, but the vision tower takes {edge}")
    square = {"height": edge, "width": edge}
    cropped = {"size": {"shortest_edge": edge}, "crop_size": square, "do_center_crop": True}
    if aspect == "anyres":
        out |= {"image_processor_type": "LlavaNextImageProcessor", **cropped, "image_grid_pinpoints": pinpoints}
    elif aspect.startswith("anyres"):
        kind = "LlavaOnevisionImageProcessor"
        out |= {"image_processor_type": kind, "size": square, "image_grid_pinpoints": pinpoints, "do_pad": True}
    elif aspect == "pad":
        out |= {"image_processor_type": "LlavaImageProcessor", **cropped, "do_pad": True}
    elif clip:
        out |= {"image_processor_type": "CLIPImageProcessor", **cropped}
    else:
        out |= {"image_processor_type": "SiglipImageProcessor", "size": square}
    (made / "preprocessor_config.json").write_text(json.dumps(out), "utf-8")
    return "as its tower type has it" if found is None else f"of {found}"


def _edges(raw: Mapping[str, Any]) -> list[int]:
    """What a processor's crop_size, or size where it does not crop, says of the edges of a picture."""
    given = raw.get("crop_size") or raw.get("size") or {}
    values = [given] if isinstance(given, int) else list(given.values()) if isinstance(given, dict) else []
    return [value for value in values if isinstance(value, int)]


def ends(folder: Path, config: Mapping[str, Any], tokens: Tokens, stop: str) -> tuple[list[int], list[str]]:
    """Ids that end an answer, and texts that do where the conversation's `stop` is no token."""
    path = folder / "generation_config.json"
    found = (read_json(path, "") if path.is_file() else {}).get("eos_token_id", config.get("eos_token_id"))
    ids = [int(i) for i in (found if isinstance(found, list) else [] if found is None else [found])]
    if tokens.eos is not None and tokens.eos in tokens.vocabulary:
        ids.append(tokens.vocabulary[tokens.eos])
    if stop in tokens.vocabulary and stop.startswith("<"):
        return list(dict.fromkeys([*ids, tokens.vocabulary[stop]])), []
    return list(dict.fromkeys(ids)), [] if stop.startswith("<|") else [stop]
