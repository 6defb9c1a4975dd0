"""Phase 1: every patch names the object it shows, so that tower and projector see before the language model listens.

Linear heads on the tower's features predict kind, colour, digit, count and place of a patch's object; the projector's
output must point at the language model's own embeddings of the same words.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vlm_models.demo.parts import (
    HIDDEN,
    IMAGE_TOKENS,
    PATCH,
    new_projector,
    new_tower,
    to_pixels,
    tower_features,
    trained_parameters,
)
from vlm_models.demo.scenes import COLORS, COUNTS, KINDS, PLACES, SIZE, Object, draw_scene

log = logging.getLogger(__name__)

GRID = SIZE // PATCH
BATCH = 64
LEARNING_RATE = 1.5e-3
UNSCORED = -100
ATTRIBUTES = ("kind", "color", "digit", "count", "place")
WORDS = (
    (" empty", *(f" {kind}" for kind in KINDS)),
    (" empty", *(f" {color}" for color in COLORS)),
    tuple(str(digit) for digit in range(10)),
    tuple(f" {count}" for count in COUNTS),
    tuple(f" {place}" for place in PLACES),
)


def patch_labels(objects: tuple[Object, ...], cover: NDArray[np.float32]) -> NDArray[np.int64]:
    """(5, 36): kind, colour, digit, count and place of the object that each patch shows; -100 is not scored."""
    area = cover.reshape(len(objects), GRID, PATCH, GRID, PATCH).mean((2, 4)).reshape(len(objects), -1)
    shown = np.where(area.max(0) > 0.06, area.argmax(0), -1)
    labels = np.full((len(ATTRIBUTES), IMAGE_TOKENS), UNSCORED, np.int64)
    labels[:2], labels[3] = 0, len(objects) - 1
    for index, one in enumerate(objects):
        on = shown == index
        labels[0, on], labels[1, on] = KINDS.index(one.kind) + 1, list(COLORS).index(one.color) + 1
        labels[4, on] = one.place
        if one.kind == "digit":
            labels[2, on] = one.value
    return labels


def labelled_batch(first: int, count: int, split: str) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, 72, 72) and labels (B, 5, 36) of `count` scenes from seed `first` on."""
    scenes = [draw_scene(first + i, split) for i in range(count)]
    labels = np.stack([patch_labels(objects, cover) for _, objects, cover in scenes])
    return to_pixels(np.stack([pixels for pixels, _, _ in scenes])), torch.from_numpy(labels)


def word_table(language_model: Any, tokenizer: Any) -> list[Tensor]:
    """Unit directions (words, 576) of each attribute's words among the language model's embeddings."""
    embeddings: Tensor = language_model.get_input_embeddings().weight.float()
    mean = embeddings.mean(0)

    def direction(text: str) -> Tensor:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        return embeddings[ids].mean(0) - mean

    return [F.normalize(torch.stack([direction(word) for word in words]), dim=1) for words in WORDS]


class Phase1(nn.Module):
    """Tower, projector and the heads that supervise them."""

    def __init__(self, text_config: Any, words: list[Tensor]) -> None:
        super().__init__()
        self.tower = new_tower()
        self.projector = new_projector(text_config)
        self.heads = nn.ModuleList([nn.Linear(HIDDEN, len(table)) for table in words])
        self.words = words

    def forward(self, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logits per attribute, (B, 36, words): by the heads, and by the projector's output."""
        with torch.autocast("cpu", torch.bfloat16):
            features = tower_features(self.tower, pixels)
            named = F.normalize(self.projector(features).float(), dim=-1)
            seen = [head(features).float() for head in self.heads]
        return seen, [20 * named @ table.T for table in self.words]


@torch.no_grad()
def set_first_weights(model: Phase1) -> None:
    """Whitened principal components as patch filters, 2-D sinusoids as positions: both save minutes of training."""
    embeddings = model.tower.embeddings
    pixels, _ = labelled_batch(0, 512, "train")
    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    variance, basis = torch.linalg.eigh(torch.cov(patches.T))
    filters = (basis / (variance + 1e-2).sqrt()).T.flip(0)[:HIDDEN]
    embeddings.patch_embedding.weight.copy_(filters.reshape(HIDDEN, 3, PATCH, PATCH))
    quarter = HIDDEN // 4
    frequency = math.pi * torch.exp(torch.linspace(math.log(0.1), 0, quarter))
    row, column = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    waves = [f(axis.flatten()[:, None] * frequency) for axis in (row, column) for f in (torch.sin, torch.cos)]
    embeddings.position_embedding.weight[1:] = torch.cat(waves, 1)


def losses(logits: list[Tensor], labels: Tensor) -> Tensor:
    pairs = [(x.flatten(0, 1), labels[:, i].flatten()) for i, x in enumerate(logits)]
    return torch.stack([F.cross_entropy(x, gold, ignore_index=UNSCORED) for x, gold in pairs]).sum()


@torch.no_grad()
def patch_accuracy(model: Phase1, pictures: int = 512) -> dict[str, tuple[float, float]]:
    """Held-out accuracy on object patches, by attribute: (heads, projector against the words)."""
    hits, totals = torch.zeros(2, len(ATTRIBUTES)), torch.zeros(len(ATTRIBUTES))
    for first in range(0, pictures, BATCH):
        pixels, labels = labelled_batch(first, BATCH, "test")
        for side, logits in enumerate(model(pixels)):
            for i, x in enumerate(logits):
                scored = (labels[:, 0] > 0) & (labels[:, i] != UNSCORED)
                hits[side, i] += ((x.argmax(-1) == labels[:, i]) & scored).sum()
                totals[i] += scored.sum() if side == 0 else 0
    shares = (hits / totals).tolist()
    return {name: (round(shares[0][i], 3), round(shares[1][i], 3)) for i, name in enumerate(ATTRIBUTES)}


@torch.no_grad()
def match_embedding_norm(model: Phase1, language_model: Any) -> None:
    """Scale the projector's output to the norm of the language model's own embeddings."""
    pixels, _ = labelled_batch(0, BATCH, "train")
    wanted = language_model.get_input_embeddings().weight.float().norm(dim=1).mean()
    scale = wanted / model.projector(tower_features(model.tower, pixels)).norm(dim=-1).mean()
    model.projector.linear_2.weight.mul_(scale)
    model.projector.linear_2.bias.mul_(scale)


def train_tower(language_model: Any, tokenizer: Any, steps: int, state_path: Path) -> Phase1:
    """Train tower and projector; resume from `state_path` where it exists."""
    torch.manual_seed(0)
    model = Phase1(language_model.config, word_table(language_model, tokenizer))
    set_first_weights(model)
    parameters = [*trained_parameters(model.tower), *model.projector.parameters(), *model.heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.02, betas=(0.9, 0.98))
    step = 0
    if state_path.exists():
        state = torch.load(state_path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    start, first = time.monotonic(), step
    while step < steps:
        rate = LEARNING_RATE * min(1.0, (step + 1) / 100) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        pixels, labels = labelled_batch(step * BATCH, BATCH, "train")
        seen, named = model(pixels)
        loss = losses(seen, labels) + 0.5 * losses(named, labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            speed = (step - first) * BATCH / (time.monotonic() - start)
            log.info("tower step %d/%d loss %.3f, %.0f pictures/s", step, steps, loss.item(), speed)
        if step % 250 == 0 or step == steps:
            log.info("  held-out patches (heads, words): %s", patch_accuracy(model))
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, state_path)
    match_embedding_norm(model, language_model)
    return model
