"""What the families with vision_config and text_config share: config.json → specs of the parts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from vlm_models import family
from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.language_config import ACTIVATIONS
from vlm_models.spec import LanguageSpec, ProjectorSpec, VisionSpec, VLMSpec

if TYPE_CHECKING:
    from vlm_models.vision import Encoder


def read_config(checkpoint: Checkpoint, text: str = "llama", towers: tuple[str, ...] = ()) -> Any:
    """config.json through transformers' own config class, which fills in what old versions left out.

    `text` is the model type of a text config that does not name its own, `towers` what the vision config of a family
    with a tower of its own may be called. Raises CheckpointError where a part is missing, of no supported family, or
    of values that the class refuses.
    """
    from transformers import CONFIG_MAPPING

    raw = checkpoint.config
    for part in ("text_config", "vision_config"):
        if not isinstance(raw.get(part), dict):
            raise CheckpointError(f"{checkpoint.folder / 'config.json'} has no {part}")
    family.find(raw["text_config"].get("model_type", text), "language", f"{checkpoint.folder}: text_config.model_type")
    what, tower = f"{checkpoint.folder}: vision_config.model_type", raw["vision_config"].get("model_type")
    if not towers:
        family.find(tower or "clip_vision_model", "positions", what)
    elif tower not in (None, *towers):
        raise CheckpointError(f"{what} {tower!r} is not that of {raw['model_type']}: {', '.join(towers)}")
    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    except Exception as error:  # whatever a config class raises on values it does not take
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{checkpoint.folder / 'config.json'} is not a valid config: {reason}") from error


def vision(checkpoint: Checkpoint, config: Any) -> VisionSpec:
    """VisionSpec of a LLaVA config: vision_config, vision_feature_layer and vision_feature_select_strategy."""
    v, layer = config.vision_config, config.vision_feature_layer
    layers = tuple(int(n) for n in ((layer,) if isinstance(layer, int) else layer))
    states = int(v.num_hidden_layers) + 1
    if not layers or not all(-states <= n < states for n in layers):
        raise CheckpointError(
            f"{checkpoint.folder}: vision_feature_layer {layer} is outside the tower's {states} hidden states"
        )
    if v.image_size < v.patch_size:
        raise CheckpointError(f"{checkpoint.folder}: image_size {v.image_size} is less than a patch of {v.patch_size}")
    rows: int = family.find(v.model_type, "positions", "vision tower").positions(v)
    strategy = config.vision_feature_select_strategy
    return VisionSpec(
        model_type=v.model_type,
        image_size=int(v.image_size),
        patch_size=int(v.patch_size),
        hidden_size=int(v.hidden_size),
        layers=int(v.num_hidden_layers),
        feature_layers=layers,
        select_strategy=strategy,
        image_tokens=rows - (strategy == "default"),
    )


def last_state(checkpoint: Checkpoint, config: Any) -> VisionSpec:
    """VisionSpec of a tower whose output as a whole is taken, its last norm included."""
    if config.image_size < config.patch_size:
        raise CheckpointError(
            f"{checkpoint.folder}: image_size {config.image_size} is less than a patch of {config.patch_size}"
        )
    return VisionSpec(
        model_type=config.model_type,
        image_size=int(config.image_size),
        patch_size=int(config.patch_size),
        hidden_size=int(config.hidden_size),
        layers=int(config.num_hidden_layers),
        feature_layers=(-1,),
        select_strategy="full",
        image_tokens=int(family.find(config.model_type, "positions", "vision tower").positions(config)),
    )


def last_state_encoder(checkpoint: Checkpoint, spec: VLMSpec) -> Encoder:
    """The `vision_encoder` of families that take the tower's output as a whole."""
    from vlm_models.vision import LastState, tower

    return LastState(tower(checkpoint))


def language(checkpoint: Checkpoint, config: Any) -> LanguageSpec:
    """LanguageSpec of text_config; tied where config.json says so and the file holds no other head."""
    text = config.text_config
    # The outer flag and the text config's both tie, unless the file holds a head that differs from the table.
    text.tie_word_embeddings = bool(config.tie_word_embeddings or text.tie_word_embeddings) and _tied(checkpoint)
    out: LanguageSpec = family.find(text.model_type, "language", "language model").language(text)
    # LlavaForConditionalGeneration reads its own head and leaves out Gemma 2's final softcap; so was it trained.
    return dataclasses.replace(out, logit_softcap=0.0)


def _tied(checkpoint: Checkpoint) -> bool:
    head, table = "lm_head.weight", "language_model.embed_tokens.weight"
    if head not in checkpoint:
        return True
    same = checkpoint.shape(head) == checkpoint.shape(table) and checkpoint.dtype(head) == checkpoint.dtype(table)
    step = 4096
    return same and all(
        checkpoint.rows(head, n, n + step).tobytes() == checkpoint.rows(table, n, n + step).tobytes()
        for n in range(0, checkpoint.shape(head)[0], step)
    )


def projector(checkpoint: Checkpoint, config: Any, vision: VisionSpec, language: LanguageSpec) -> ProjectorSpec:
    """The projector that `mm_projector_type` of config.json names, and without such a name LLaVA's `mlp`."""
    if (kind := checkpoint.config.get("mm_projector_type")) is None:
        return mlp(checkpoint, config, vision, language)
    from vlm_models.projectors import projector_spec  # with torch, which a spec else does without

    return projector_spec(str(kind), vision, language.hidden_size, checkpoint.folder)


def mlp(checkpoint: Checkpoint, config: Any, vision: VisionSpec, language: LanguageSpec) -> ProjectorSpec:
    """transformers' projector of two linear layers. Raises CheckpointError for an activation that is not known."""
    name = config.projector_hidden_act
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"{checkpoint.folder}: projector_hidden_act {name!r} is not one of {', '.join(ACTIVATIONS)}"
        )
    return ProjectorSpec(
        in_features=vision.feature_size,
        hidden_size=language.hidden_size,
        out_features=language.hidden_size,
        activation=name,
        bias=bool(config.multimodal_projector_bias),
    )
