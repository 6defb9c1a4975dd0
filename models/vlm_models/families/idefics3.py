"""Idefics3: a SigLIP-like tower, pixel shuffle and one linear layer; a picture as tiles named by row and column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_models import vlm_config
from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.processor import image_processor, preprocess_spec, prompt_spec, transformers_tokenizer
from vlm_models.spec import LanguageSpec, ProjectorSpec, TilingSpec, VisionSpec, VLMSpec

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from vlm_models.vision import Encoder

FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"


def spec(checkpoint: Checkpoint) -> VLMSpec:
    """VLMSpec of config.json, image processor and tokenizer. Raises CheckpointError where these contradict."""
    return spec_of(checkpoint, FAKE, GLOBAL)


def spec_of(checkpoint: Checkpoint, fake: str, overview: str) -> VLMSpec:
    """The same, `fake` being the token around a picture's rows, and `overview` that before those of the whole of it."""
    config = _config(checkpoint)
    vision, language = _vision(checkpoint, config), vlm_config.language(checkpoint, config)
    projector = _projector(checkpoint, config, vision, language)
    return VLMSpec(
        family=str(config.model_type),
        name=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        vision=vision,
        projector=projector,
        language=language,
        preprocess=preprocess_spec(checkpoint, vision.image_size, squashed=True),
        prompt=prompt_spec(checkpoint, config, projector.out_tokens or 0),
        tiling=_tiling(checkpoint, vision.image_size, fake, overview),
    )


def vision_encoder(checkpoint: Checkpoint, spec: VLMSpec) -> Encoder:
    """The tower, its position ids those of a full tile."""
    from vlm_models.shuffle import Idefics3Encoder, tower

    return Idefics3Encoder(tower(_config(checkpoint).vision_config))


def projector(checkpoint: Checkpoint, spec: VLMSpec) -> nn.Module:
    """Pixel shuffle and linear layer."""
    from vlm_models.shuffle import idefics3_connector

    return idefics3_connector(_config(checkpoint))


def pixel_values(checkpoint: Checkpoint, spec: VLMSpec, picture: Image.Image, pictures: int) -> Any:
    """Tiles (N, 3, s, s) by transformers' own image processor."""
    return image_processor(checkpoint)(images=picture, return_tensors="np")["pixel_values"][0]


def prompt_ids(checkpoint: Checkpoint, spec: VLMSpec, prompt: str, pictures: Sequence[Image.Image]) -> list[int]:
    """By transformers' own processor, which writes the rows and columns of each picture."""
    from transformers import Idefics3Processor

    tokenizer, bos = transformers_tokenizer(checkpoint), spec.prompt.bos_token
    special = not (bos is not None and prompt.startswith(bos))
    if not pictures:
        return list(tokenizer(prompt, add_special_tokens=special)["input_ids"])
    made = Idefics3Processor(image_processor(checkpoint), tokenizer, image_seq_len=spec.tile_tokens)
    out = made(text=[prompt], images=[list(pictures)], add_special_tokens=special)
    return [int(token) for token in out["input_ids"][0]]


def _config(checkpoint: Checkpoint) -> Any:
    # Old files name the tower after the model.
    family = str(checkpoint.config.get("model_type"))
    return vlm_config.read_config(checkpoint, "llama", (f"{family}_vision", family, "idefics3", "idefics3_vision"))


def _vision(checkpoint: Checkpoint, config: Any) -> VisionSpec:
    v = config.vision_config
    whole = isinstance(v.image_size, int) and isinstance(v.patch_size, int) and min(v.image_size, v.patch_size) > 0
    if not whole or v.image_size % v.patch_size:
        raise CheckpointError(
            f"{checkpoint.folder}: the tower's image_size {v.image_size} is not a whole number of its patches of "
            f"{v.patch_size}"
        )
    for name in ("weight", "bias"):  # which the towers of other families may lack
        if (shape := checkpoint.shape(f"vision_tower.post_layernorm.{name}")) != (v.hidden_size,):
            raise CheckpointError(
                f"{checkpoint.folder}: tensor 'vision_tower.post_layernorm.{name}' has shape {shape}, but config.json "
                f"asks for {(v.hidden_size,)}"
            )
    return VisionSpec(
        model_type=f"{config.model_type}_vision",
        image_size=v.image_size,
        patch_size=v.patch_size,
        hidden_size=v.hidden_size,
        layers=v.num_hidden_layers,
        feature_layers=(-1,),
        select_strategy="full",
        image_tokens=(v.image_size // v.patch_size) ** 2,
    )


def _projector(checkpoint: Checkpoint, config: Any, vision: VisionSpec, language: LanguageSpec) -> ProjectorSpec:
    edge, step = vision.image_size // vision.patch_size, int(config.scale_factor)
    if step < 1 or edge % step:
        raise CheckpointError(
            f"{checkpoint.folder}: scale_factor {step} does not divide tiles of {edge} × {edge} patches"
        )
    return ProjectorSpec(
        in_features=vision.hidden_size,
        hidden_size=language.hidden_size,
        out_features=language.hidden_size,
        activation="none",
        bias=False,
        kind="idefics3",
        out_tokens=(edge // step) ** 2,
    )


def _tiling(checkpoint: Checkpoint, edge: int, fake: str, overview: str) -> TilingSpec:
    processor = image_processor(checkpoint)
    tile, longest = dict(processor.max_image_size or {}).get("longest_edge"), 0
    if tile != edge:
        raise CheckpointError(
            f"{checkpoint.folder}: the image processor makes tiles of {tile} pixels, but the tower takes "
            f"{edge} × {edge}"
        )
    if processor.do_resize:
        longest = int(dict(processor.size).get("longest_edge") or 0)
        if longest < 1:
            raise CheckpointError(
                f"{checkpoint.folder}: the image processor's size {processor.size} has no longest_edge"
            )
    return TilingSpec(
        rule="split",
        max_tiles=0 if processor.do_image_splitting else 1,
        longest_edge=longest,
        overview="last",
        before=fake,
        after=fake,
        tag=overview,
    )
