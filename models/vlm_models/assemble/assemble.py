"""A LLaVA from a CLIP or SigLIP tower and a language model: both as they are, a new projector, one new token."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_models.assemble.parts import Folder, copied, grown, read_language, read_tower
from vlm_models.assemble.shards import SHARD_BYTES, Tensor, write_shards
from vlm_models.assemble.texts import chat_template
from vlm_models.errors import CheckpointError, InputError

IMAGE_TOKEN = "<image>"
_MULTIPLE = 64  # rows that a table which must grow is rounded up to, as matrix units like it
_TYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16}
_TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Assembled:
    """What was made: the image token's id, rows added to the embedding table, the picture's tokens, parameters."""

    image_token_id: int
    new_rows: int
    image_tokens: int
    parameters: int


def assemble(
    vision: str | Path,
    language: str | Path,
    output: str | Path,
    *,
    feature_layer: int = -2,
    image_token: str = IMAGE_TOKEN,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> Assembled:
    """Write a `LlavaForConditionalGeneration` folder to `output`: weights, config, processor, tokenizer, template.

    `vision`, `language`: folders or hub ids. The tower gives the hidden states of `feature_layer`, without the class
    token where it has one (LLaVA, https://arxiv.org/abs/2304.08485); the projector is LLaVA-1.5's of two linear layers
    (https://arxiv.org/abs/2310.03744), drawn by `seed` as torch draws new linear layers. `image_token` is added to the
    tokenizer; the embedding table grows only where it has no row to spare. Weights keep their types and are copied as
    they are read. Raises InputError or CheckpointError, and leaves nothing behind then.
    """
    output = Path(output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists already: give a new or empty folder")
    tower, decoder = read_tower(vision), read_language(language)
    config, tokenizer, new_rows = _config(tower, decoder, feature_layer, image_token)
    tensors = list(_tensors(tower, decoder, config, new_rows, seed))
    with _draft(output) as folder:
        write_shards(folder, tensors, shard_bytes)
        data = {**config.to_dict(), "architectures": ["LlavaForConditionalGeneration"]}
        data["dtype"] = _TORCH[decoder.tensors["embed_tokens.weight"].dtype]
        (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n", "utf-8")
        _processor(tower, decoder, config, tokenizer, image_token).save_pretrained(folder)
        if (decoder.path / "generation_config.json").is_file():
            shutil.copyfile(decoder.path / "generation_config.json", folder / "generation_config.json")
    numbers = sum(int(np.prod(tensor.shape)) for tensor in tensors)
    return Assembled(config.image_token_id, new_rows, config.image_seq_length, numbers)


def _config(tower: Folder, decoder: Folder, layer: int, image_token: str) -> tuple[Any, Any, int]:
    """LlavaConfig, the tokenizer with its new token, and how many rows the embedding table gains."""
    from transformers import CONFIG_MAPPING, LlavaConfig

    tokenizer = _tokenizer(decoder, image_token)
    image_id = int(tokenizer.convert_tokens_to_ids(image_token))
    rows = decoder.tensors["embed_tokens.weight"].array.shape[0]
    wanted = rows if image_id < rows else -(-(image_id + 1) // _MULTIPLE) * _MULTIPLE
    text = CONFIG_MAPPING[decoder.model_type].from_dict({**decoder.config, "vocab_size": wanted})
    eye = CONFIG_MAPPING[tower.model_type].from_dict(dict(tower.config))
    states = int(eye.num_hidden_layers) + 1
    if not -states <= layer < states:
        raise InputError(f"feature layer {layer} is outside the tower's {states} hidden states: -2 is LLaVA's")
    config = LlavaConfig(
        vision_config=eye,
        text_config=text,
        image_token_index=image_id,
        vision_feature_layer=layer,
        vision_feature_select_strategy="default" if _class_token(tower) else "full",
        image_seq_length=(eye.image_size // eye.patch_size) ** 2,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    return config, tokenizer, wanted - rows


def _tokenizer(decoder: Folder, image_token: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(decoder.path, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{decoder.path}: transformers cannot load its tokenizer: {reason}") from error
    if not image_token.strip():
        raise InputError("the image token is empty: give a text such as <image>")
    if image_token not in tokenizer.get_vocab():
        tokenizer.add_tokens([image_token], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids(image_token)
    if tokenizer(f"a{image_token}b", add_special_tokens=False)["input_ids"].count(image_id) != 1:
        raise InputError(f"the tokenizer cuts the image token {image_token!r} into pieces: choose another")
    return tokenizer


def _class_token(tower: Folder) -> bool:
    return "embeddings.class_embedding" in tower.tensors


def _tensors(tower: Folder, decoder: Folder, config: Any, new_rows: int, seed: int) -> Iterator[Tensor]:
    for name, stored in tower.tensors.items():
        yield copied(f"vision_tower.vision_model.{name}", stored)
    yield from _projector(config, decoder.tensors["embed_tokens.weight"].dtype, seed)
    for name, stored in decoder.tensors.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        full = f"language_model.{'' if name.startswith('lm_head.') else 'model.'}{name}"
        table = new_rows and name in ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")
        yield grown(full, stored, len(stored.array) + new_rows) if table else copied(full, stored)


def _projector(config: Any, dtype: str, seed: int) -> Iterator[Tensor]:
    """Uniform in ±1/√inputs, weights and biases, as torch.nn.Linear begins."""
    import ml_dtypes

    random = np.random.default_rng(seed)
    own: Any = _TYPES.get(dtype, ml_dtypes.bfloat16)
    inputs, width = config.vision_config.hidden_size, config.text_config.hidden_size
    for layer, size in (("linear_1", inputs), ("linear_2", width)):
        for kind, shape in (("weight", (width, size)), ("bias", (width,))):
            drawn = random.uniform(-1, 1, shape).astype(np.float32) / np.float32(size) ** 0.5
            array = drawn.astype(own)
            yield Tensor(f"multi_modal_projector.{layer}.{kind}", dtype, shape, lambda array=array: iter((array,)))  # type: ignore[misc]


def _processor(tower: Folder, decoder: Folder, config: Any, tokenizer: Any, image_token: str) -> Any:
    import transformers

    auto: Any = transformers.AutoImageProcessor
    try:
        images = auto.from_pretrained(tower.path, local_files_only=True, backend="pil")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{tower.path} has no image processor (preprocessor_config.json): save it beside the tower"
        ) from error
    made: Any = transformers.LlavaProcessor
    return made(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=image_token,
        num_additional_image_tokens=int(_class_token(tower)),
        chat_template=chat_template(tokenizer.chat_template, image_token, tokenizer.eos_token),
    )


@contextmanager
def _draft(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place when everything is written."""
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.absolute().parent) as scratch:
        folder = Path(scratch) / output.name
        folder.mkdir()
        yield folder
        if output.is_dir():
            output.rmdir()
        folder.rename(output)
