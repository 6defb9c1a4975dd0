"""InternVL 2.5 and 3: InternViT, pixel shuffle and an MLP; a picture as the grid of tiles closest to its shape."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vlm_models import vlm_config
from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.processor import image_processor, preprocess_spec, prompt_spec, special_token, transformers_tokenizer
from vlm_models.spec import LanguageSpec, ProjectorSpec, TilingSpec, VisionSpec, VLMSpec

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from vlm_models.vision import Encoder

_TOWER = "internvl_vision"
_MOST = 1000  # tiles; real checkpoints have 6 to 40


def spec(checkpoint: Checkpoint) -> VLMSpec:
    """VLMSpec of config.json, image processor and tokenizer. Raises CheckpointError where these contradict."""
    config = _config(checkpoint)
    vision, language = _vision(checkpoint, config), vlm_config.language(checkpoint, config)
    projector = _projector(checkpoint, config, vision, language)
    processor = image_processor(checkpoint)
    least, most = int(processor.min_patches), int(processor.max_patches)
    if not 1 <= least <= most <= _MOST:
        raise CheckpointError(
            f"{checkpoint.folder}: a picture of {least} to {most} tiles (min_patches, max_patches) cannot be; they go "
            f"from 1 to {_MOST}"
        )
    return VLMSpec(
        family="internvl",
        name=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        vision=vision,
        projector=projector,
        language=language,
        preprocess=preprocess_spec(checkpoint, vision.image_size, squashed=True),
        prompt=prompt_spec(checkpoint, config, projector.out_tokens or 0),
        tiling=TilingSpec(
            rule="ratio",
            min_tiles=least,
            max_tiles=most,
            overview="last",
            before=special_token(checkpoint, "start_image_token", "<img>"),
            after=special_token(checkpoint, "end_image_token", "</img>"),
        ),
    )


def vision_encoder(checkpoint: Checkpoint, spec: VLMSpec) -> Encoder:
    """InternViT up to the layer that the config names."""
    from vlm_models.shuffle import InternViT, tower

    return InternViT(tower(_config(checkpoint).vision_config), spec.vision.feature_layers[0])


def projector(checkpoint: Checkpoint, spec: VLMSpec) -> nn.Module:
    """Pixel shuffle and MLP."""
    from vlm_models.shuffle import internvl_connector

    return internvl_connector(_config(checkpoint))


def pixel_values(checkpoint: Checkpoint, spec: VLMSpec, picture: Image.Image, pictures: int) -> Any:
    """Tiles (N, 3, s, s) by transformers' image processor, asked as InternVLProcessor asks it."""
    return image_processor(checkpoint)(images=picture, crop_to_patches=True, return_tensors="np")["pixel_values"]


def prompt_ids(checkpoint: Checkpoint, spec: VLMSpec, prompt: str, pictures: Sequence[Image.Image]) -> list[int]:
    """By the texts of transformers' own processor, which itself asks for packages that only videos need."""
    from transformers.models.internvl.processing_internvl import InternVLProcessor

    tokenizer, processor = transformers_tokenizer(checkpoint), image_processor(checkpoint)
    stand_in: Any = SimpleNamespace(
        start_image_token=getattr(tokenizer, "start_image_token", None) or "<img>",
        end_image_token=getattr(tokenizer, "end_image_token", None) or "</img>",
        image_token=getattr(tokenizer, "context_image_token", None) or "<IMG_CONTEXT>",
        image_seq_length=spec.tile_tokens,
    )
    text, *rest = prompt.split(stand_in.image_token)
    for picture, piece in zip(pictures, rest, strict=True):
        cut = processor(images=picture, crop_to_patches=True, return_tensors="np")
        text += InternVLProcessor.replace_image_token(stand_in, cut, 0) + piece
    written = spec.prompt.bos_token is not None and prompt.startswith(spec.prompt.bos_token)
    return list(tokenizer(text, add_special_tokens=not written)["input_ids"])


def _config(checkpoint: Checkpoint) -> Any:
    return vlm_config.read_config(checkpoint, "qwen2", (_TOWER,))


def _vision(checkpoint: Checkpoint, config: Any) -> VisionSpec:
    v, layer = config.vision_config, config.vision_feature_layer
    sizes = (*v.image_size, *v.patch_size)
    if len(v.image_size) != 2 or len(v.patch_size) != 2 or min(sizes) < 1:
        raise CheckpointError(
            f"{checkpoint.folder}: the tower's image_size {v.image_size} and patch_size {v.patch_size} must be height "
            "and width, of 1 or more"
        )
    height, width, down, across = sizes
    if height != width or down != across or height % down:
        raise CheckpointError(
            f"{checkpoint.folder}: the tower takes {height} × {width} pixels in patches of {down} × {across}; "
            "tiles must be square and of whole patches"
        )
    states = v.num_hidden_layers + 1
    if not isinstance(layer, int) or not -states <= layer < states:
        raise CheckpointError(
            f"{checkpoint.folder}: vision_feature_layer {layer} is not one of the tower's {states} hidden states"
        )
    if config.vision_feature_select_strategy != "default":
        raise CheckpointError(
            f"{checkpoint.folder}: vision_feature_select_strategy {config.vision_feature_select_strategy!r} leaves the "
            "class token among the patches, which then make no square; only 'default' does"
        )
    return VisionSpec(
        model_type=_TOWER,
        image_size=height,
        patch_size=down,
        hidden_size=v.hidden_size,
        layers=v.num_hidden_layers,
        feature_layers=(layer,),
        select_strategy="default",
        image_tokens=(height // down) ** 2,
    )


def _projector(checkpoint: Checkpoint, config: Any, vision: VisionSpec, language: LanguageSpec) -> ProjectorSpec:
    edge, ratio = vision.image_size // vision.patch_size, float(config.downsample_ratio)
    step = int(1 / ratio) if 0 < ratio <= 1 else 0
    if not step or step * ratio != 1 or edge % step:
        raise CheckpointError(
            f"{checkpoint.folder}: downsample_ratio {ratio:g} does not fit tiles of {edge} × {edge} patches; "
            "it must be one divided by a whole number that divides them"
        )
    return ProjectorSpec(
        in_features=vision.hidden_size,
        hidden_size=language.hidden_size,
        out_features=language.hidden_size,
        activation=config.projector_hidden_act,
        bias=True,
        kind="internvl",
        out_tokens=(edge // step) ** 2,
    )
