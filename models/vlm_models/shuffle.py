"""Towers whose patches are put together, r × r of them in a row, before they are projected: InternVL and Idefics3.

Everything that computes is transformers' own; what a picture of another size would need is left out, since tiles are
always full squares of the tower's size, and graphs stay as simple.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlm_models.vision import Encoder


def tower(config: Any) -> nn.Module:
    """transformers' module for a vision config, on the device that is set."""
    from transformers import AutoModel

    auto: Any = AutoModel
    made: nn.Module = auto.from_config(config, attn_implementation="sdpa")
    return made


class InternViT(Encoder):
    """pixel_values (N, 3, s, s) → image_features (N, T, F): a hidden state of InternViT without its class token."""

    def __init__(self, tower: nn.Module, layer: int) -> None:
        super().__init__()
        self.tower, self.layer = tower, layer
        # Tracing would resize the position embeddings to the size that they have.
        embeddings: Any = tower.embeddings
        embeddings.interpolate_pos_encoding = lambda patches, height, width: embeddings.position_embeddings

    def forward(self, pixel_values: Tensor) -> Tensor:
        if self.layer == -1:
            states = self.tower(pixel_values).last_hidden_state
        else:
            states = self.tower(pixel_values, output_hidden_states=True).hidden_states[self.layer]
        return cast(Tensor, states[:, 1:])


class Idefics3Encoder(Encoder):
    """pixel_values (N, 3, s, s) → image_features (N, T, F): the last hidden state of Idefics3's tower, normalised."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("places", _places(tower.embeddings), persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        embeddings: Any = self.tower.embeddings
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        states = patches + embeddings.position_embedding(self.places)
        states = self.tower.encoder(inputs_embeds=states, attention_mask=None).last_hidden_state  # type: ignore[operator]
        return cast(Tensor, self.tower.post_layernorm(states))  # type: ignore[operator]


def _places(embeddings: Any) -> Tensor:
    """(1, T): which position embedding each patch of a full tile gets, by transformers' own bucketing.

    Rounding makes it another than the patch's number for some sizes.
    """
    with torch.device("cpu"), torch.no_grad():
        patches, table = embeddings.num_patches_per_side, cast(Any, nn.Embedding)
        stand_in = copy.copy(embeddings)
        stand_in._modules = {
            "patch_embedding": nn.AvgPool2d(embeddings.patch_size),
            "position_embedding": table.from_pretrained(torch.arange(float(patches**2))[:, None]),
        }
        edge = patches * embeddings.patch_size
        found: Tensor = stand_in(torch.zeros(1, 1, edge, edge), torch.ones(1, patches, patches, dtype=torch.bool))
    return found[..., 0].long()


def internvl_connector(config: Any) -> nn.Module:
    """image_features (N, T, F) → image_embeds (N, T / r², H): pixel shuffle, LayerNorm, linear, activation, linear."""
    from transformers.models.internvl import modeling_internvl

    own: Any = modeling_internvl
    ratio, shuffle = float(config.downsample_ratio), own.InternVLModel.pixel_shuffle
    (height, _), (patch, _) = config.vision_config.image_size, config.vision_config.patch_size
    edge = height // patch

    class Connector(own.InternVLMultiModalProjector):  # type: ignore[misc]
        def forward(self, image_features: Tensor) -> Tensor:
            square = image_features.reshape(-1, edge, edge, config.vision_config.hidden_size)
            wide = shuffle(self, square, ratio)
            return cast(Tensor, super().forward(wide.flatten(1, 2)))

    made: nn.Module = Connector(config)
    return made


def idefics3_connector(config: Any) -> nn.Module:
    """image_features (N, T, F) → image_embeds (N, T / r², H): pixel shuffle and one linear layer."""
    from transformers.models.idefics3 import modeling_idefics3

    own: Any = modeling_idefics3
    made: nn.Module = own.Idefics3Connector(config)
    return made
