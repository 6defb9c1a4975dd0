"""Vision encoder and projector as modules with the checkpoint's weights: transformers' own tower, `projectors`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.family import family_of
from vlm_models.projectors import check_widths
from vlm_models.projectors import projector as projector_of
from vlm_models.spec import VLMSpec
from vlm_models.torch_language import as_float32
from vlm_models.vlm_config import read_config


class Encoder(nn.Module):
    """What a family's vision encoder is: `tower` holds the weights of "vision_tower.…".

    `unused` are beginnings of their names that never reach the features, as SigLIP's pooling head and the norm before
    pooling never reach LLaVA's; many checkpoints leave them out.
    """

    tower: nn.Module
    unused: tuple[str, ...] = ("head.", "post_layernorm.")


class LastState(Encoder):
    """pixel_values (N, 3, s, s) → image_features (N, image_tokens, feature_size): the tower's output, norm and all."""

    unused = ("head.",)

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor) -> Tensor:
        return torch.as_tensor(self.tower(pixel_values, return_dict=True).last_hidden_state)


class VisionEncoder(Encoder):
    """pixel_values (N, 3, s, s) → image_features (N, image_tokens, feature_size), as LLaVA selects them."""

    def __init__(self, tower: nn.Module, spec: VLMSpec) -> None:
        super().__init__()
        self.tower = tower
        self.layers = spec.vision.feature_layers
        self.drop = int(spec.vision.select_strategy == "default")

    def forward(self, pixel_values: Tensor) -> Tensor:
        states = self.tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        return torch.cat([states[layer][:, self.drop :] for layer in self.layers], -1)


def load_vision_encoder(checkpoint: Checkpoint, spec: VLMSpec) -> Encoder:
    """The tower with the checkpoint's weights, float32, eval."""
    encoder = _encoder(checkpoint, spec)
    _fill(encoder.tower, checkpoint, "vision_tower.", encoder.unused)
    return encoder.eval()


def load_projector(checkpoint: Checkpoint, spec: VLMSpec) -> nn.Module:
    """The projector with the checkpoint's weights, float32, eval."""
    projector = _projector(checkpoint, spec)
    _fill(projector, checkpoint, "multi_modal_projector.")
    return projector.eval()


def required(checkpoint: Checkpoint, spec: VLMSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes that tower and projector need of the checkpoint."""
    encoder, projector = _encoder(checkpoint, spec), _projector(checkpoint, spec)
    parts = (("vision_tower.", encoder.tower, encoder.unused), ("multi_modal_projector.", projector, ()))
    return {
        prefix + name: tuple(tensor.shape)
        for prefix, module, unused in parts
        for name, tensor in module.state_dict().items()
        if not name.startswith(unused)
    }


def _encoder(checkpoint: Checkpoint, spec: VLMSpec) -> Encoder:
    """On the meta device: the family's own, or LLaVA's selection of a transformers tower's hidden states."""
    with torch.device("meta"):
        own = getattr(family_of(checkpoint), "vision_encoder", None)
        encoder: Encoder = VisionEncoder(tower(checkpoint), spec) if own is None else own(checkpoint, spec)
    return encoder


def _projector(checkpoint: Checkpoint, spec: VLMSpec) -> nn.Module:
    """On the meta device: the family's own, or the one of its kind."""
    with torch.device("meta"):
        own = getattr(family_of(checkpoint), "projector", None)
        projector: nn.Module = projector_of(spec) if own is None else own(checkpoint, spec)
    if own is None:
        check_widths(checkpoint, projector, spec, "multi_modal_projector.")
    return projector


def tower(checkpoint: Checkpoint) -> nn.Module:
    """transformers' module for vision_config, on the device that is set; its config class decides which."""
    from transformers import AutoModel

    auto: Any = AutoModel
    made: nn.Module = auto.from_config(read_config(checkpoint).vision_config, attn_implementation="sdpa")
    return made


def unused(name: str) -> bool:
    """Whether a tensor of a tower, named without its prefix, is one that LLaVA's encoders leave out."""
    return name.startswith(Encoder.unused)


def _fill(module: nn.Module, checkpoint: Checkpoint, prefix: str, unused: tuple[str, ...] = ()) -> None:
    state = {}
    for name, tensor in module.state_dict().items():
        if prefix + name in checkpoint:
            state[name] = as_float32(checkpoint, prefix + name)
            checkpoint.release(prefix + name)
        elif name.startswith(unused):
            state[name] = torch.zeros(tensor.shape)
        else:
            raise CheckpointError(f"{checkpoint.folder}: tensor {prefix + name!r} is missing")
    module.load_state_dict(state, assign=True)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta and name.endswith("position_ids"):
            owner = module.get_submodule(name.rpartition(".")[0])
            owner.register_buffer("position_ids", torch.arange(buffer.shape[-1])[None], persistent=False)
